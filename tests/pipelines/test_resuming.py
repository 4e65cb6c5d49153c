"""Stages that are killed, stopped, copied, damaged or shared among processes end in the same bytes."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from instaflow.files import sha256_of
from tests.pipelines.runs import CONFIG, copy_parents, cut_to_a_tenth, instaflow, losses, shards, stop_when, together

pytestmark = pytest.mark.slow
TENTH = cut_to_a_tenth()


def previews(run: Path, stage: str) -> list[tuple[float, ...] | str]:
    """The figures of a stage's previews, and their pictures' hashes."""
    lines = [json.loads(line) for line in (run / stage / "stats.jsonl").read_text().splitlines()]
    found = [line for line in lines if "preview_distance" in line]
    figures = [(line["samples_seen"], line["preview_distance"], line["preview_frechet"]) for line in found]
    return [*figures, *(sha256_of(file) for file in sorted((run / stage / "previews").iterdir()))]


def weights(run: Path, stage: str) -> dict[str, str]:
    return {
        str(file.relative_to(run)): sha256_of(file)
        for name in ("model", "model-raw")
        for file in sorted((run / stage / name).rglob("*.safetensors"))
    }


def lines_in(file: Path, count: int) -> Callable[[], bool]:
    return lambda: file.exists() and file.read_text().count("\n") >= count


def files_in(folder: Path, count: int) -> Callable[[], bool]:
    return lambda: folder.is_dir() and len(list(folder.glob("*.json"))) >= count


def test_couplings_killed_at_any_moment_end_in_the_same_bytes(small_run: Path, tmp_path: Path) -> None:
    run = copy_parents(small_run, tmp_path, "teacher")
    arguments = ("couple", CONFIG, "--run-dir", run, "--stage", "pairs", *TENTH)
    folder = run / "pairs" / "shards"
    stop_when(files_in(folder, 1), signal.SIGKILL, *arguments)
    stop_when(files_in(folder, 3), signal.SIGKILL, *arguments)
    stopped = stop_when(files_in(folder, 5), signal.SIGTERM, *arguments)
    assert stopped.returncode == 75, stopped.stderr
    assert "instaflow couple" in stopped.stderr
    instaflow(*arguments)
    assert shards(run, "pairs") == shards(small_run, "pairs")


@pytest.mark.parametrize(
    ("kind", "stage", "parents", "number"),
    [
        ("reflow", "2rf", ("teacher", "pairs"), signal.SIGKILL),
        ("distill", "student", ("teacher", "2rf", "pairs2"), signal.SIGINT),
    ],
)
def test_training_resumes_exactly(
    small_run: Path, tmp_path: Path, kind: str, stage: str, parents: tuple[str, ...], number: signal.Signals
) -> None:
    run = copy_parents(small_run, tmp_path, *parents)
    often = f"stages.{stage}.checkpoint_every=1000"
    arguments = (kind, CONFIG, "--run-dir", run, "--stage", stage, *TENTH, "--set", often)
    stats, whole = run / stage / "stats.jsonl", len(losses(small_run, stage))
    stopped = stop_when(lines_in(stats, whole // 3), number, *arguments)
    assert stopped.returncode == (75 if number == signal.SIGINT else -9), stopped.stderr
    stopped = stop_when(lines_in(stats, 2 * whole // 3), signal.SIGTERM, *arguments)
    assert stopped.returncode == 75, stopped.stderr
    assert json.loads((run / stage / "state.json").read_text())["state"] == "interrupted"
    instaflow(*arguments)
    assert losses(run, stage) == losses(small_run, stage)
    assert previews(run, stage) == previews(small_run, stage)
    assert weights(run, stage) == weights(small_run, stage)


def test_a_model_is_the_average_of_the_weights_and_model_raw_the_weights(small_run: Path) -> None:
    stage = small_run / "2rf"
    newest = max((stage / "checkpoints").glob("[0-9]*"))
    saved = {}
    for name, checkpoint in (("model", "ema"), ("model-raw", "model")):
        saved[name] = load_file(stage / name / "unet" / "diffusion_pytorch_model.safetensors")
        expected = load_file(newest / f"{checkpoint}.safetensors")
        assert {f"unet.{key}" for key in saved[name]} == set(expected)
        assert all(np.array_equal(value, expected[f"unet.{key}"]) for key, value in saved[name].items())
    differing = [key for key, value in saved["model"].items() if not np.array_equal(value, saved["model-raw"][key])]
    assert len(differing) > 0.9 * len(saved["model"])


def test_the_teacher_resumes_exactly(small_run: Path, tmp_path: Path) -> None:
    arguments = ("teacher", CONFIG, "--run-dir", tmp_path, *TENTH, "--set", "stages.teacher.checkpoint_every=1000")
    stats, whole = tmp_path / "teacher" / "stats.jsonl", len(losses(small_run, "teacher"))
    stop_when(lines_in(stats, whole // 4), signal.SIGKILL, *arguments)  # in the autoencoder's training
    stop_when(lines_in(stats, 3 * whole // 4), signal.SIGKILL, *arguments)  # in the U-Net's
    instaflow(*arguments)
    assert losses(tmp_path, "teacher") == losses(small_run, "teacher")
    assert weights(tmp_path, "teacher") == weights(small_run, "teacher")


def test_two_processes_make_the_same_couplings(small_run: Path, tmp_path: Path) -> None:
    run = copy_parents(small_run, tmp_path, "teacher")
    together(2, "couple", CONFIG, "--run-dir", run, "--stage", "pairs", *TENTH)
    assert shards(run, "pairs") == shards(small_run, "pairs")


def test_two_processes_train_the_same_up_to_rounding(small_run: Path, tmp_path: Path) -> None:
    run = copy_parents(small_run, tmp_path, "teacher", "pairs")
    together(2, "reflow", CONFIG, "--run-dir", run, "--stage", "2rf", *TENTH)
    two, one = losses(run, "2rf"), losses(small_run, "2rf")
    assert [entry[:2] for entry in two] == [entry[:2] for entry in one]
    np.testing.assert_allclose([loss for *_, loss in two], [loss for *_, loss in one], rtol=1e-4)
    shown = [[entry for entry in previews(place, "2rf") if isinstance(entry, tuple)] for place in (run, small_run)]
    assert len(shown[0]) == 5
    np.testing.assert_allclose(*shown, rtol=1e-2)


def test_damaged_shards_are_named_and_made_again(small_run: Path, tmp_path: Path) -> None:
    run = copy_parents(small_run, tmp_path, "teacher", "pairs")
    whole = shards(run, "pairs")
    folder = run / "pairs" / "shards"
    names = sorted(folder.glob("*.tar"))
    content = bytearray(names[1].read_bytes())
    content[len(content) // 2] ^= 1
    names[1].write_bytes(content)
    names[3].write_bytes(names[3].read_bytes()[: 512 * 8])  # cut at a member's boundary
    names[5].unlink()
    found = instaflow("verify", run / "pairs", expect=1)
    for name in (names[1], names[3], names[5]):
        assert name.name in found.stderr
    assert names[0].name not in found.stderr
    refused = instaflow("reflow", CONFIG, "--run-dir", run, "--stage", "2rf", *TENTH, expect=1)
    assert "instaflow repair" in refused.stderr
    untouched = names[0].stat().st_mtime_ns
    instaflow("repair", run / "pairs")
    assert shards(run, "pairs") == whole
    assert names[0].stat().st_mtime_ns == untouched
    assert "8 shards" in instaflow("verify", run / "pairs").stdout


def test_repair_refuses_another_model_than_the_one_that_made_the_couplings(small_run: Path, tmp_path: Path) -> None:
    run = copy_parents(small_run, tmp_path, "teacher", "pairs")
    weights_file = run / "teacher" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-4] ^= 1  # the lowest bit of one weight
    weights_file.write_bytes(content)
    (run / "pairs" / "shards" / "00001.tar").unlink()
    before = shards(run, "pairs")
    refused = instaflow("repair", run / "pairs", expect=1)
    assert "is not the model that made the couplings" in refused.stderr
    assert "Hint:" in refused.stderr
    assert shards(run, "pairs") == before


def test_a_changed_setting_is_refused_with_old_and_new(small_run: Path, tmp_path: Path) -> None:
    run = copy_parents(small_run, tmp_path, "teacher", "pairs")
    arguments = ("couple", CONFIG, "--run-dir", run, "--stage", "pairs", *TENTH)
    refused = instaflow(*arguments, "--set", "stages.pairs.guidance_scale=7.25", expect=1)
    assert "guidance_scale" in refused.stderr
    assert "7.25" in refused.stderr
    assert "done before" in instaflow(*arguments).stdout  # copied, and valid


def test_a_loss_that_is_not_finite_stops_the_run(small_run: Path, tmp_path: Path) -> None:
    run = copy_parents(small_run, tmp_path, "teacher", "pairs")
    arguments = ("reflow", CONFIG, "--run-dir", run, "--stage", "2rf", *TENTH)
    rate = ("--set", "stages.2rf.phases.0.learning_rate=1e30", "--set", "stages.2rf.gradient_clipping=1e30")
    refused = instaflow(*arguments, *rate, expect=1)
    assert "not finite" in refused.stderr or "the loss is" in refused.stderr
    assert "Hint:" in refused.stderr
    assert not (run / "2rf" / "model").exists()
    assert json.loads((run / "2rf" / "state.json").read_text())["state"] == "failed"


def test_a_stage_that_waits_says_for_what(tmp_path: Path) -> None:
    waiting = instaflow("reflow", CONFIG, "--run-dir", tmp_path, expect=1)
    assert "'2rf' waits for 'teacher' and 'pairs'" in waiting.stderr
    assert "instaflow teacher" in waiting.stderr
