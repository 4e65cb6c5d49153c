"""What a line of stats.jsonl tells, and that TensorBoard and Weights & Biases are told the same."""

import json
import math
import struct
import sys
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from instaflow.errors import InstaFlowError, Interrupted
from instaflow.training import loop
from instaflow.training.checkpoint import load_checkpoint
from instaflow.training.figures import BINS, Figures, LossByTime
from instaflow.training.loop import train
from tests.training.made import STEPS, Fit, StopAt, batch, figures, folder_of, job_of


def test_losses_are_sorted_by_time():
    by_time = LossByTime()
    generator = torch.Generator().manual_seed(0)
    t, losses = torch.rand(500, generator=generator) * 0.65, torch.rand(500, generator=generator)
    made = Figures(by_time, None)
    for part in range(0, 500, 100):
        by_time.add(t[part : part + 100], losses[part : part + 100])
    by_time.add(torch.tensor([1.0]), torch.tensor([7.0]))
    made.add(1.0, 501)
    line = made.take()["loss_by_time"]
    edges = np.arange(BINS + 1) / BINS
    for place in range(7):
        inside = (t.numpy() >= edges[place]) & (t.numpy() < edges[place + 1])
        assert line[place] == pytest.approx(losses.numpy()[inside].mean(), rel=1e-6)
    assert line[7:] == [None, None, 7.0]


class Timed(Fit):
    """A network whose samples' losses are noted by time, the first of the draws."""

    def __init__(self):
        super().__init__()
        self.by_time = LossByTime()

    def forward(self, x, y, draws):
        loss = super().forward(x, y, draws)
        self.by_time.add(torch.as_tensor(draws[:, 0]), loss.detach().expand(len(x)))
        return loss


def timed(folder, stop=None, **changes):
    loss = Timed()
    return train(job_of(loss, by_time=loss.by_time, **changes), folder_of(folder), stop or StopAt())


def test_a_line_holds_what_fell_since_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_LINES", 4)  # a line for each three steps, then for each two
    timed(tmp_path)
    lines = figures(folder_of(tmp_path))
    assert [line["samples_seen"] for line in lines] == [12, 24, 28, 44, 60]
    for line in lines:
        assert len(line["loss_by_time"]) == BINS and line["skipped_steps"] == 0
        assert min(filter(None, line["loss_by_time"])) <= line["loss"] * (1 + 1e-6)
    whole = folder_of(tmp_path).stats()
    assert all(line["samples_per_second"] > 0 and 0.05 < line["peak_memory_gib"] < 100 for line in whole)


@pytest.mark.parametrize("step", [1, 2, 5, 8])
def test_losses_by_time_survive_a_stop(tmp_path, monkeypatch, step):
    monkeypatch.setattr(loop, "LOG_LINES", 4)
    timed(tmp_path / "whole")
    with pytest.raises(Interrupted):
        timed(tmp_path / "stopped", StopAt(step))
    timed(tmp_path / "stopped")
    assert figures(folder_of(tmp_path / "stopped")) == figures(folder_of(tmp_path / "whole"))


@pytest.mark.parametrize(("rank", "counted"), [("0", 5.0), ("1", 0.0)])
def test_one_process_goes_on_with_the_losses_of_all(monkeypatch, rank, counted):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    by_time = LossByTime()
    Figures(by_time, {"loss_sum": 3.0, "loss_count": 2, "loss_by_time": [[1.0] * BINS, [0.5] * BINS]})
    assert float(by_time.sums[1].sum()) == counted


def test_the_distance_of_the_average(tmp_path):
    trained = train(job_of(Fit()), folder_of(tmp_path), StopAt())
    names = [name for name in trained.raw if name != "seen"]
    apart = sum(float((trained.raw[name] - trained.ema[name]).double().square().sum()) for name in names)
    length = sum(float(trained.raw[name].double().square().sum()) for name in names)
    assert figures(folder_of(tmp_path))[-1]["ema_distance"] == pytest.approx(math.sqrt(apart / length), rel=1e-5)


# --- trackers ---------------------------------------------------------------------------------------------------------


def scalars(folder, job="fit"):
    events = EventAccumulator(str(folder / "2rf" / "tensorboard" / job), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_is_told_what_stats_are(tmp_path):
    timed(tmp_path)
    told, lines = scalars(tmp_path), figures(folder_of(tmp_path))
    for name in ("loss", "gradient_norm", "learning_rate", "ema_distance"):
        expected = [(line["samples_seen"], pytest.approx(line[name], rel=1e-6)) for line in lines]
        assert told[name] == expected
    for place in range(BINS):
        expected = [(line["samples_seen"], line["loss_by_time"][place]) for line in lines]
        expected = [(step, pytest.approx(value, rel=1e-6)) for step, value in expected if value is not None]
        assert told.get(f"loss_by_time/{place}", []) == expected
    assert {"samples_per_second", "peak_memory_gib"} <= told.keys()


def test_tensorboard_forgets_what_a_killed_run_told_past_its_checkpoint(tmp_path):
    class Killed(BaseException):
        pass

    def deadly(position, size):
        if position >= 20:
            raise Killed
        return batch(position, size)

    with pytest.raises(Killed):
        timed(tmp_path, batch=deadly, checkpoint_every=12)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [4, 8, 12, 16, 20]
    timed(tmp_path)
    steps = [step for step, _ in scalars(tmp_path)["loss"]]
    assert steps == [line["samples_seen"] for line in figures(folder_of(tmp_path))] and len(steps) == STEPS


def test_no_tracker_leaves_no_trace(tmp_path):
    timed(tmp_path, trackers=[])
    assert not (tmp_path / "2rf" / "tensorboard").exists() and len(figures(folder_of(tmp_path))) == STEPS


def wandb_history(file):
    """The figures in a .wandb file: LevelDB's log of protocol buffers, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:  # the end of a block
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole, place = whole + data[place + 7 : place + 7 + length], place + 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            items = Record.FromString(whole).history.item
            yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            whole = b""


@pytest.mark.slow
def test_weights_and_biases_is_told_too_under_one_id(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(Interrupted):
        timed(tmp_path, StopAt(5), trackers=["wandb"])
    known = json.loads((tmp_path / "2rf" / "wandb.json").read_text())["id"]
    time.sleep(1)  # its folders are named by the second
    timed(tmp_path, trackers=["wandb"])
    wandb.teardown()  # its own process writes the files to their ends
    files = sorted((tmp_path / "2rf" / "wandb").glob(f"offline-run-*/run-{known}.wandb"))
    told = [items for file in files for items in wandb_history(file) if "fit/loss" in items]
    lines = figures(folder_of(tmp_path))
    assert len(files) == 2 and len(told) == STEPS
    for items, line in zip(told, lines, strict=True):
        assert items["samples_seen"] == line["samples_seen"] and items["fit/loss"] == pytest.approx(line["loss"])


def test_without_an_account_the_error_says_what_to_do(tmp_path, monkeypatch):
    import wandb

    wandb.teardown()  # what another test has told it
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115
    with pytest.raises(InstaFlowError, match="does not take the figures") as caught:
        timed(tmp_path, trackers=["wandb"])
    assert "wandb login" in caught.value.hint
    assert load_checkpoint(tmp_path / "2rf" / "checkpoints" / "fit") is None
