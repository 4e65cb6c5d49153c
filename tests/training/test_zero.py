"""Every ZeRO stage trains, stops, resumes and fails as one process without ZeRO does, with real DeepSpeed on gloo."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from instaflow.training import engine
from instaflow.training.checkpoint import complete_checkpoints, load_checkpoint
from tests.training.zero_worker import STAGES, STOPPED, TOTAL, Odd, finish, resume

pytestmark = pytest.mark.slow
LOSS, NORM = "loss", "gradient_norm"


def launch(count, *arguments):
    """Some processes by torchrun."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    worker = ["-m", "tests.training.zero_worker", *map(str, arguments)]
    subprocess.run([*torchrun, *worker], cwd=root, env=environment, check=True, timeout=600)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process without ZeRO."""
    run = tmp_path_factory.mktemp("alone")
    finish(run, "whole", Odd())
    return run / "whole"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes: the folder of their cases."""
    from tests.models.made import write_flow

    run = tmp_path_factory.mktemp("two")
    launch(2, "together", run, write_flow(run / "model", "velocity"))
    return run


def weights(case, name="raw"):
    return load_file(case / f"{name}.safetensors")


def lines(case):
    return json.loads((case / "figures.json").read_text())


def final(case):
    return load_checkpoint(case / "2rf" / "checkpoints" / "fit")


def near(one, other, rtol=1e-5, atol=1e-6, skipped=()):
    assert one.keys() == other.keys()
    for name in one.keys() - skipped:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol, check_dtype=False)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def same_run(case, other):
    """Weights, average, AdamW's state and every figure, to the last bit."""
    assert same(weights(case), weights(other)) and same(weights(case, "ema"), weights(other, "ema"))
    assert same(final(case).optimizer, final(other).optimizer)
    assert final(case).state == final(other).state and lines(case) == lines(other)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_as_one_process_does(alone, two, stage):
    case = two / f"whole-{stage}"
    for name in ("raw", "ema"):
        own = weights(case, name)
        near(own, weights(alone, name), skipped={"seen", "level"})  # each process counts its own samples
        assert {value.dtype for value in own.values()} == {torch.float32, torch.int64}
    near(final(case).optimizer, final(alone).optimizer)
    for line, expected in zip(lines(case), lines(alone), strict=True):
        assert line[LOSS] == pytest.approx(expected[LOSS], rel=1e-6)
        assert line[NORM] == pytest.approx(expected[NORM], rel=1e-5)
        assert line["ema_distance"] == pytest.approx(expected["ema_distance"], rel=1e-4)
    norms = [line[NORM] for line in lines(alone)]
    assert min(norms) < 1.0 < max(norms)  # some steps are clipped, some not


@pytest.mark.parametrize("stage", STAGES)
def test_after_training_the_module_holds_whole_weights(two, stage):
    case = two / f"whole-{stage}"
    assert same(weights(case, "module"), weights(case)) and weights(case)["net.0.weight"].shape == (7, 3)


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_is_that_of_the_weights_after_each_step(two, stage):
    case = two / f"whole-{stage}"
    reference = weights(case, "reference")
    assert reference["net.0.weight"].dtype == torch.float64
    reference["seen"] = final(case).model["seen"]
    near(weights(case, "ema"), reference, rtol=1e-6, atol=1e-7)
    assert not same(weights(case, "ema"), weights(case))


@pytest.mark.parametrize("stage", STAGES)
def test_accumulated_gradients_are_those_of_one_batch(two, stage):
    one, many = lines(two / f"whole-{stage}"), lines(two / f"micro-{stage}")
    assert [line[LOSS] for line in many] == pytest.approx([line[LOSS] for line in one], rel=1e-6)
    assert [line[NORM] for line in many] == pytest.approx([line[NORM] for line in one], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("sort", ["", "half-", "offloaded-"])
def test_a_resumed_run_is_one_that_never_stopped(two, stage, sort):
    if (sort, stage) != ("offloaded-", 0):
        same_run(two / f"{sort}resumed-{stage}", two / f"{sort or 'whole-'}{stage}")


@pytest.mark.parametrize("stage", STAGES[1:])
def test_an_offloaded_optimizer_takes_the_same_steps(two, stage):
    offloaded, whole = two / f"offloaded-{stage}", two / f"whole-{stage}"
    for name in ("raw", "ema"):
        near(weights(offloaded, name), weights(whole, name))
    near(final(offloaded).optimizer, final(whole).optimizer)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_trains_float32_weights(two, stage):
    half, full = two / f"half-{stage}", two / f"whole-{stage}"
    for name in ("raw", "ema"):
        own = weights(half, name)["net.0.weight"]
        assert own.dtype == torch.float32 and not torch.equal(own, own.bfloat16().float())
    differences = [abs(a[LOSS] / b[LOSS] - 1) for a, b in zip(lines(half), lines(full), strict=True)]
    assert 0 < max(differences) < 1e-2


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("case", "what"),
    [("loss", "loss is nan"), ("gradient", "gradient's norm is"), ("offloaded-gradient", "gradient's norm is")],
)
def test_what_is_not_finite_stops_every_process(two, stage, case, what):
    if (case, stage) == ("offloaded-gradient", 0):
        return
    folder = two / f"{case}-{stage}"
    good = complete_checkpoints(folder / "2rf" / "checkpoints" / "fit")[-1]
    for rank in (0, 1):
        message = json.loads((folder / f"error-{rank}.json").read_text())
        assert what in message and "12 samples" in message and str(good) in message
    saved = final(folder)
    assert saved.state["samples_seen"] == 12 and int(good.name) == 12
    assert all(torch.isfinite(value).all() for value in {**saved.model, **saved.ema, **saved.optimizer}.values())


def test_a_unet_trains_in_shards_with_its_activations_computed_anew(two):
    whole, shards = lines(two / "unet-0"), lines(two / "unet-3")
    assert [line[LOSS] for line in shards] == pytest.approx([line[LOSS] for line in whole], rel=1e-5)
    assert [line[NORM] for line in shards] == pytest.approx([line[NORM] for line in whole], rel=1e-4)
    near(weights(two / "unet-3"), weights(two / "unet-0"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", ["text", "text-again"])
def test_a_text_encoder_trains_in_shards_alone_and_then_once_more(two, case):
    """As a teacher's does: before the U-Net, and with it."""
    whole, shards = lines(two / f"{case}-0"), lines(two / f"{case}-3")
    assert [line[LOSS] for line in shards] == pytest.approx([line[LOSS] for line in whole], rel=1e-5)
    own = weights(two / f"{case}-3")
    noisy = {name for name in own if name.endswith("k_proj.bias")}  # attention ignores it: its gradient is rounding
    near(own, weights(two / f"{case}-0"), rtol=1e-3, atol=1e-5, skipped=noisy)


@pytest.mark.parametrize("count", [1, 3])
def test_others_go_on_with_what_two_processes_stopped(alone, two, tmp_path, monkeypatch, count):
    """Another number of processes, each run under another stage than before."""
    for stage in STAGES:
        shutil.copytree(two / f"stopped-{stage}", tmp_path / f"stopped-{stage}")
        assert final(tmp_path / f"stopped-{stage}").state["samples_seen"] == 6 * STOPPED < TOTAL
    if count == 1:
        monkeypatch.setattr(engine, "PERSISTENT", 0)
        resume(tmp_path)
    else:
        launch(count, "resume", tmp_path)
    for stage in STAGES:
        case = tmp_path / f"stopped-{stage}"
        for name in ("raw", "ema"):
            near(weights(case, name), weights(alone, name), skipped={"seen", "level"})
        near(final(case).optimizer, final(alone).optimizer)
        own, expected = lines(case), lines(alone)
        assert [line["samples_seen"] for line in own] == [line["samples_seen"] for line in expected]
        assert [line[LOSS] for line in own] == pytest.approx([line[LOSS] for line in expected], rel=1e-5)
