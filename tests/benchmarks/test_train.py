"""The benchmark of training: its sides do the same work, in turns."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision

from benchmarks.train import Options, Side, make_couplings, prompts_of
from tests.benchmarks.programs import run


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    """For what the tests start: threads that wait for each other are slow where other work runs beside them."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.slow
def test_it_prints_every_rate_its_memory_and_its_ratio(tmp_path: Path) -> None:
    sizes = ["--batch-size", "16", "--micro-batch-size", "8", "--steps", "5", "--rounds", "3", "--records", "300"]
    said, result = run("train", sizes, tmp_path)
    assert said.count("samples/s") == 3 and said.count("times stock") == 2
    sides = {"ours", "compiled", "stock"}
    assert set(result["seconds"]) == sides and all(len(seconds) == 3 for seconds in result["seconds"].values())
    for name in sides - {"stock"}:
        pairs = zip(result["seconds"][name], result["seconds"]["stock"], strict=True)
        assert result["ratio"][name] == sorted(theirs / own for own, theirs in pairs)[1]
    for name, seconds in result["seconds"].items():
        assert result["samples_per_second"][name] == 16 * 5 / sorted(seconds)[1]
        assert 0.2 < result["peak_memory_gib"][name] < 4
    assert result["mean_loss"]["compiled"] == pytest.approx(result["mean_loss"]["ours"], rel=1e-3)
    assert result["mean_loss"]["stock"] == pytest.approx(result["mean_loss"]["ours"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "steps", "near"), [("distill", 20, 0.02), ("lpips", 5, 0.1)])
def test_the_sides_distill_with_the_same_loss(tmp_path, monkeypatch, loss, steps, near) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # DeepSpeed's, of a test before: accelerate would look for a launch
    couplings = make_couplings(tmp_path, (4, 8, 8), prompts_of("digits"), 300)
    options = Options("digits", loss, 16, 8, "float32", steps, 1, 0, couplings)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), options.backbone)
    losses = {}
    for name in ("ours", "stock"):
        side = Side(name, options)
        assert side.ask("run") > 0
        losses[name] = side.ask("end")
    assert losses["stock"] == pytest.approx(losses["ours"], rel=near)  # as many samples each, in another order
