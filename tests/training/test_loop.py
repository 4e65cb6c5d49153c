"""The training loop with real DeepSpeed, on a network of sixty weights."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from instaflow.errors import ConfigError, DataError, InstaFlowError, Interrupted
from instaflow.files import sha256_of
from instaflow.sections import Phase
from instaflow.training import loop
from instaflow.training.checkpoint import complete_checkpoints, load_checkpoint
from instaflow.training.draws import draws
from instaflow.training.loop import Span, spans_of, train
from tests.training.made import PHASES, STEPS, TOTAL, Fit, StopAt, batch, figures, folder_of, job_of


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def train_in(folder, **changes):
    """Train a fresh network in a folder, or what its checkpoint says."""
    stop = changes.pop("stop", StopAt())
    loss = changes.pop("loss", None) or Fit()
    return train(job_of(loss, **changes), folder_of(folder), stop)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that never stopped: its folder and outcome."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_in(folder)


def previewed(folder, **changes):
    """A preview's figure at each position, with the weights that it was of, of a run that is trained in a folder."""
    seen = {}

    def preview(averages, samples_seen):
        seen[samples_seen] = {name: value.clone() for name, value in averages.items()}
        return {"level": float(averages["net.0.bias"].sum())}

    trained = train_in(folder, preview=preview, preview_every=10, **changes)
    return trained, seen


def final(folder):
    return load_checkpoint(folder / "2rf" / "checkpoints" / "fit")


# --- what a run is ----------------------------------------------------------------------------------------------------


def test_the_loop_is_adamw_with_clipping_schedule_and_average(whole):
    """The same run written out in plain PyTorch."""
    torch.manual_seed(0)
    loss = Fit()
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    ema = {name: value.double() for name, value in loss.net.state_dict().items()}
    position, clipped = 0, 0
    for step in range(STEPS):
        size = 4 if step < 7 else 8
        if step < 7:  # warm-up over 8 samples, then constant
            rate = 1e-2 * min(1, (position + 4) / 12)
        else:  # a half cosine from the start of the phase
            rate = 4e-3 * 0.5 * (1 + math.cos(math.pi * (step - 7) / 4))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss(*batch(position, size), draws(0, "2rf/fit", position, size)).backward()
        clipped += float(nn.utils.clip_grad_norm_(loss.parameters(), 2.5)) > 2.5
        optimizer.step()
        decay = min(0.7, (1 + step) / (10 + step))
        for name, value in loss.net.state_dict().items():
            ema[name] += (1 - decay) * (value.double() - ema[name])
        position += size
    assert position == TOTAL and 0 < clipped < STEPS
    trained = whole[1]
    assert trained.samples_seen == TOTAL
    for name, value in loss.net.state_dict().items():
        torch.testing.assert_close(trained.raw[f"net.{name}"], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(trained.ema[f"net.{name}"].double(), ema[name], rtol=1e-5, atol=1e-6)
    assert int(trained.raw["seen"]) == int(trained.ema["seen"]) == TOTAL


def test_what_is_written_of_a_run(whole):
    folder, trained = whole
    lines = figures(folder_of(folder))
    assert [line["samples_seen"] for line in lines] == [*range(4, 29, 4), 36, 44, 52, 60]
    assert [line["phase"] for line in lines] == [0] * 7 + [1] * 4
    rates = [line["learning_rate"] for line in lines]
    np.testing.assert_allclose(rates[:3], [1e-2 / 3, 2e-2 / 3, 1e-2])
    np.testing.assert_allclose(rates[7:], [4e-3, 4e-3 * (2 + 2**0.5) / 4, 2e-3, 4e-3 * (2 - 2**0.5) / 4])
    fresh = Fit()
    first = fresh(*batch(0, 4), draws(0, "2rf/fit", 0, 4))
    first.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in fresh.parameters()]).norm()
    assert lines[0]["loss"] == pytest.approx(first.item(), rel=1e-6)
    assert lines[0]["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)  # before clipping
    saved = final(folder)
    assert saved.state["samples_seen"] == TOTAL and same(saved.model, trained.raw) and same(saved.ema, trained.ema)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulated_gradients_are_those_of_one_batch(whole, tmp_path, micro_batch_size):
    loss = Fit()
    trained = train_in(tmp_path, loss=loss, micro_batch_size=micro_batch_size)
    for name, value in trained.raw.items():
        torch.testing.assert_close(value, whole[1].raw[name], rtol=1e-5, atol=2e-6)
    for name, value in trained.ema.items():
        torch.testing.assert_close(value, whole[1].ema[name], rtol=1e-5, atol=2e-6)
    assert max(len(numbers) for numbers in loss.draws) == micro_batch_size
    for line, expected in zip(figures(folder_of(tmp_path)), figures(folder_of(whole[0])), strict=True):
        assert line.pop("job") == expected.pop("job")
        assert line == pytest.approx(expected, rel=1e-4)


def test_draws_do_not_depend_on_how_a_batch_is_split(tmp_path):
    one, many = Fit(), Fit()
    train_in(tmp_path / "one", loss=one)
    train_in(tmp_path / "many", loss=many, micro_batch_size=1)
    assert np.array_equal(np.concatenate(one.draws), np.concatenate(many.draws))
    assert len(np.unique(np.concatenate(one.draws)[:, 0])) == TOTAL


def test_two_jobs_in_one_process(whole, tmp_path):
    """As a teacher is trained: the second engine's run is as if it were alone."""
    train_in(tmp_path, name="first")
    assert same(train_in(tmp_path).raw, whole[1].raw)
    jobs = [line["job"] for line in figures(folder_of(tmp_path))]
    assert jobs == ["first"] * STEPS + ["fit"] * STEPS


def test_nothing_is_compiled(tmp_path, monkeypatch):
    from deepspeed.ops.op_builder.builder import OpBuilder

    def refuse(self, *arguments, **keywords):
        raise AssertionError(f"{self.name} would be compiled")

    monkeypatch.setattr(OpBuilder, "jit_load", refuse)
    monkeypatch.setattr(OpBuilder, "load", refuse)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    train_in(tmp_path)
    assert not (tmp_path / "extensions").exists()


# --- stop and resume --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(step,) for step in range(STEPS)] + [(2, 3, 2)])
def test_a_resumed_run_is_one_that_never_stopped(whole, tmp_path, steps):
    folder, trained = whole
    for step in steps:
        with pytest.raises(Interrupted) as caught:
            train_in(tmp_path, stop=StopAt(step))
        assert caught.value.exit_code == 75 and "SIGTERM" in caught.value.message
        assert f"instaflow reflow digits.yaml --run-dir {tmp_path} --stage 2rf" in caught.value.hint
    again = train_in(tmp_path)
    assert same(again.raw, trained.raw) and same(again.ema, trained.ema)
    assert same(final(tmp_path).optimizer, final(folder).optimizer)
    assert final(tmp_path).state == final(folder).state
    assert figures(folder_of(tmp_path)) == figures(folder_of(folder))


def test_a_mean_loss_over_several_steps_survives_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_LINES", 4)  # a line for each three steps, then for each two
    train_in(tmp_path / "whole")
    expected = figures(folder_of(tmp_path / "whole"))
    assert [line["samples_seen"] for line in expected] == [12, 24, 28, 44, 60]
    for step in (1, 2, 5, 8):
        with pytest.raises(Interrupted):
            train_in(tmp_path / str(step), stop=StopAt(step))
        train_in(tmp_path / str(step))
        assert figures(folder_of(tmp_path / str(step))) == expected


def test_stopping_says_where(tmp_path):
    with pytest.raises(Interrupted, match=r"36 of 60 samples \(SIGTERM\); saved"):
        train_in(tmp_path, stop=StopAt(8))
    assert final(tmp_path).state["samples_seen"] == 36


class Killed(BaseException):
    """As `kill -9` does, it leaves things as they are."""


@pytest.mark.parametrize("killed_at", [0, 12, 28, 52])
def test_a_killed_run_goes_on_from_its_last_checkpoint(whole, tmp_path, killed_at):
    """Log lines past the checkpoint are written twice, and stand once."""

    def deadly(position, size):
        if position >= killed_at:
            raise Killed
        return batch(position, size)

    with pytest.raises(Killed):
        train_in(tmp_path, batch=deadly, checkpoint_every=8)
    again = train_in(tmp_path, checkpoint_every=12)
    assert same(again.raw, whole[1].raw) and same(again.ema, whole[1].ema)
    assert figures(folder_of(tmp_path)) == figures(folder_of(whole[0]))


def test_a_finished_run_is_taken_from_its_checkpoint(whole):
    def never(position, size):
        raise AssertionError

    again = train_in(whole[0], batch=never)
    assert same(again.raw, whole[1].raw) and same(again.ema, whole[1].ema) and again.samples_seen == TOTAL
    assert len(figures(folder_of(whole[0]))) == STEPS


@pytest.mark.parametrize("part", ["model", "ema", "optimizer", "state"])
def test_a_checkpoint_that_lacks_something_is_named(tmp_path, part):
    with pytest.raises(Interrupted):
        train_in(tmp_path, stop=StopAt(5))
    newest = complete_checkpoints(tmp_path / "2rf" / "checkpoints" / "fit")[-1]
    if part == "state":
        (newest / "state.json").write_text("{}")
    else:
        tensors = load_file(newest / f"{part}.safetensors")
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, newest / f"{part}.safetensors")
        state = json.loads((newest / "state.json").read_text())
        state["hashes"][part] = sha256_of(newest / f"{part}.safetensors")
        (newest / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=rf"'{newest}' is damaged: (it lacks|Error\(s\) in loading)") as caught:
        train_in(tmp_path)
    assert f"rm -r {newest}" in caught.value.hint


def test_another_seed_is_another_run(whole, tmp_path):
    other = train(job_of(Fit()), folder_of(tmp_path, seed=1), StopAt())
    assert not same(other.raw, whole[1].raw)


# --- phases -----------------------------------------------------------------------------------------------------------


class Weighed(Fit):
    """A loss that is what the phase makes of it."""

    def __init__(self):
        super().__init__()
        self.begun = []

    def begin(self, phase):
        self.begun.append(phase)

    def forward(self, x, y, draws):
        return super().forward(x, y, draws) * (1 if self.begun[-1] == PHASES[0] else 3)


def test_the_loss_is_told_each_phase_and_once_more_when_it_goes_on(whole, tmp_path):
    loss = Weighed()
    expected = train_in(tmp_path / "whole", loss=loss, begin=loss.begin)
    assert loss.begun == PHASES and not same(expected.raw, whole[1].raw)
    for step, told in ((3, PHASES), (7, PHASES[1:]), (9, PHASES[1:])):
        first, second = Weighed(), Weighed()
        with pytest.raises(Interrupted):
            train_in(tmp_path / str(step), loss=first, begin=first.begin, stop=StopAt(step))
        assert same(train_in(tmp_path / str(step), loss=second, begin=second.begin).raw, expected.raw)
        assert second.begun == told


# --- previews ---------------------------------------------------------------------------------------------------------


def test_previews_are_of_the_average_at_each_multiple_and_at_the_end(whole, tmp_path):
    """Batches of 4, then 8: the first position at or past each multiple of 10, and the last, 60, once."""
    trained, seen = previewed(tmp_path, checkpoint_every=1)
    assert list(seen) == [12, 20, 36, 44, 52, 60]
    assert same(trained.raw, whole[1].raw) and same(seen[60], trained.ema)
    assert same(trained.ema, whole[1].ema) and not same(seen[60], trained.raw)
    saved = tmp_path / "2rf" / "checkpoints" / "fit" / f"{52:012d}" / "ema.safetensors"
    assert same(seen[52], load_file(saved))
    lines = figures(folder_of(tmp_path))
    assert [line for line in lines if "loss" in line] == figures(folder_of(whole[0]))
    levels = {line["samples_seen"]: line["level"] for line in lines if "level" in line}
    assert levels == {position: float(average["net.0.bias"].sum()) for position, average in seen.items()}


@pytest.mark.parametrize("killed_at", [12, 16, 36, 52])
def test_a_preview_stands_once_wherever_a_run_was_killed(tmp_path, killed_at):
    def deadly(position, size):
        if position >= killed_at:
            raise Killed
        return batch(position, size)

    previewed(tmp_path / "whole")
    with pytest.raises(Killed):
        previewed(tmp_path / "killed", batch=deadly, checkpoint_every=12)
    previewed(tmp_path / "killed")
    assert figures(folder_of(tmp_path / "killed")) == figures(folder_of(tmp_path / "whole"))


# --- losses that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    def spoilt(position, size):
        x, y = batch(position, size)
        return (x, y * value) if position == 36 else (x, y)

    with pytest.raises(InstaFlowError) as caught:
        train_in(tmp_path, batch=spoilt, checkpoint_every=8)
    good = tmp_path / "2rf" / "checkpoints" / "fit" / f"{36:012d}"
    for word in ("'2rf fit'", f"loss is {value}", "36 samples", "samples 36 to 43", str(good)):
        assert word in caught.value.message
    assert "learning_rate" in caught.value.hint and not isinstance(caught.value, Interrupted)
    saved = final(tmp_path)
    assert complete_checkpoints(good.parent)[-1] == good and saved.state["samples_seen"] == 36
    assert all(torch.isfinite(value).all() for value in {**saved.model, **saved.ema, **saved.optimizer}.values())


def test_without_a_checkpoint_it_says_so(tmp_path):
    with pytest.raises(InstaFlowError, match="there is no checkpoint yet"):
        train_in(tmp_path, batch=lambda position, size: (batch(position, size)[0] * math.nan, batch(0, size)[1]))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    """The loss itself is fine; one update later every weight would not be."""

    class Root(Fit):
        def forward(self, x, y, draws):
            extra = self.net(x).sum() * 0 if self.seen == 8 else torch.zeros(())
            return super().forward(x, y, draws) + extra.abs().sqrt()

    with pytest.raises(InstaFlowError, match=r"gradient's norm is nan at 8 samples"):
        train_in(tmp_path, loss=Root(), checkpoint_every=4)
    assert all(torch.isfinite(value).all() for value in final(tmp_path).model.values())


# --- sharing out ------------------------------------------------------------------------------------------------------


def test_spans_hold_whole_batches():
    spans = spans_of(PHASES, None, 1)
    assert [(span.start, span.end, span.micro_batch_size) for span in spans] == [(0, 28, 4), (28, 60, 8)]
    assert [span.micro_batch_size for span in spans_of(PHASES, None, 2)] == [2, 4]
    assert [span.micro_batch_size for span in spans_of(PHASES, 2, 2)] == [2, 2]


def test_a_batch_smaller_than_the_micro_batch_is_taken_whole():
    """64 samples, then 1024, with 256 at a time."""
    assert [span.micro_batch_size for span in spans_of(PHASES, 8, 1)] == [4, 8]
    assert [span.micro_batch_size for span in spans_of(PHASES, 8, 4)] == [1, 2]


@pytest.mark.parametrize(("micro_batch_size", "processes"), [(3, 1), (None, 3), (4, 3), (None, 8), (3, 2)])
def test_batches_that_cannot_be_shared_out_are_refused(tmp_path, micro_batch_size, processes):
    with pytest.raises(ConfigError, match=r"'phases\.[01]': global_batch_size is [48].*cannot share evenly") as caught:
        spans_of(PHASES, micro_batch_size, processes)
    multiple = int(caught.value.hint.rpartition(" ")[2])
    phase = Phase(samples=multiple, global_batch_size=multiple, learning_rate=1.0)
    assert spans_of([phase], micro_batch_size, processes)  # the hint is right


def test_the_learning_rate():
    phase = Phase(samples=1000, global_batch_size=10, learning_rate=2.0, warmup_samples=100, schedule="cosine")
    span = Span(phase, 500, 1500, 10)
    rates = [span.learning_rate(position) for position in range(500, 1500, 10)]
    np.testing.assert_allclose(rates[:10], 2 * np.arange(10, 110, 10) / 110)
    assert rates[10] == 2.0 and max(rates) == 2.0
    assert rates[10 + 45] == pytest.approx(1.0)  # half-way down
    assert 0 < rates[-1] < 0.001 and (np.diff(rates[10:]) < 0).all()
    constant = phase.model_copy(update={"schedule": "constant", "warmup_samples": 0})
    assert {Span(constant, 0, 1000, 10).learning_rate(position) for position in (0, 10, 990)} == {2.0}


# --- several processes ------------------------------------------------------------------------------------------------


def launch(run, seconds_per_batch):
    """Two processes by torchrun, with no compiler in reach."""
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PATH": "/nonexistent",
        "TORCH_EXTENSIONS_DIR": str(run / "extensions"),
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ["-m", "tests.training.worker", str(run), str(seconds_per_batch)]
    return subprocess.Popen([*torchrun, *worker], cwd=root, env=environment)


def wait_for(condition, process, seconds=300):
    for _ in range(seconds * 10):
        if condition():
            return
        assert process.poll() is None, "it ended early"
        time.sleep(0.1)
    raise AssertionError("it took too long")


@pytest.mark.slow
def test_two_processes_stop_together_and_equal_one(whole, tmp_path):
    stats = tmp_path / "2rf" / "stats.jsonl"
    process = launch(tmp_path, 0.3)
    try:
        wait_for(lambda: stats.exists() and stats.read_text().count("\n") >= 2, process)
        os.kill(json.loads((tmp_path / "listening-1.json").read_text())["pid"], signal.SIGTERM)  # one of them is told
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
    first, second = (json.loads((tmp_path / f"outcome-{rank}.json").read_text()) for rank in (0, 1))
    assert (first["heard"], second["heard"]) == (None, "SIGTERM")
    where = f"stopped at {final(tmp_path).state['samples_seen']} of {TOTAL} samples"
    assert f"{where} (another process was told to)" in first["message"] and f"{where} (SIGTERM)" in second["message"]
    assert 8 <= final(tmp_path).state["samples_seen"] < TOTAL

    process = launch(tmp_path, 0.0)
    try:
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
    for name in ("raw", "ema"):
        together, alone = load_file(tmp_path / f"{name}.safetensors"), getattr(whole[1], name)
        for key in alone.keys() - {"seen"}:
            torch.testing.assert_close(together[key], alone[key], rtol=1e-5, atol=1e-6)
    for line, expected in zip(figures(folder_of(tmp_path)), figures(folder_of(whole[0])), strict=True):
        assert line.pop("job") == expected.pop("job")
        assert line == pytest.approx(expected, rel=1e-4)
    assert not (tmp_path / "extensions").exists()
