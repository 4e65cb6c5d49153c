"""The benchmark of training runs: its sides do the same work, in turns."""

from pathlib import Path

import pytest

from tests.benchmarks.programs import run


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["reflow", "distill"])
def test_it_prints_every_rate_its_memory_and_its_ratio(tmp_path: Path, loss: str) -> None:
    sizes = ["--batch-size", "4", "--micro-batch-size", "2", "--steps", "4", "--rounds", "3", "--records", "300"]
    said, result = run("train", ["--loss", loss, *sizes], tmp_path)
    assert said.count("samples/s") == 3 and said.count("times stock") == 2
    sides = {"ours", "compiled", "stock"}
    assert result["loss"] == loss and result["micro_batch_size"] == 2
    assert set(result["seconds"]) == sides and all(len(seconds) == 3 for seconds in result["seconds"].values())
    for name in sides - {"stock"}:
        pairs = zip(result["seconds"][name], result["seconds"]["stock"], strict=True)
        assert result["ratio"][name] == sorted(theirs / own for own, theirs in pairs)[1]
    for name, seconds in result["seconds"].items():
        assert result["samples_per_second"][name] == 4 * 4 / sorted(seconds)[1]
        assert 0.2 < result["peak_memory_gib"][name] < 4
    losses = result["mean_loss"]  # of the same network near its start; stock has other draws
    assert losses["compiled"] == pytest.approx(losses["ours"], rel=1e-3)
    assert losses["stock"] == pytest.approx(losses["ours"], rel=0.3)
