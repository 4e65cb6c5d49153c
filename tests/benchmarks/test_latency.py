"""The benchmark of latency: its sides draw the same, and its figures follow from the seconds."""

import statistics
from pathlib import Path

import pytest

from tests.benchmarks.programs import run


@pytest.mark.slow
def test_it_tells_every_side_its_parts_and_its_ratios(tmp_path: Path) -> None:
    said, result = run("latency", ["--batch-size", "1", "--batch-size", "2", "--rounds", "3", "--eager"], tmp_path)
    sides = {"ours", "stock", "teacher"}
    assert said.count("first ") == 2 * (1 + len(sides)) and said.count(" times as fast as stock and ") == 2
    assert result["architecture"] == "digits" and result["image_size"] == [32, 32]
    assert result["flops_per_image"]["unet"] > result["flops_per_image"]["text"] > 0
    assert set(result["batches"]) == {"1", "2"}
    for found in result["batches"].values():
        assert set(found["seconds"]) == set(found["first_call"]) == set(found["parts"]) == sides
        assert found["levels_apart"] < 0.01
        for side, seconds in found["seconds"].items():
            assert len(seconds) == len(found["seconds_of_parts"][side]) == 3
            assert found["median"][side] == statistics.median(seconds)
            low, high = found["quartiles"][side]
            assert min(seconds) <= low <= found["median"][side] <= high <= max(seconds)
            for whole, parts in zip(seconds, found["seconds_of_parts"][side], strict=True):
                assert set(parts) == {"text", "unet", "vae", "rest"} and min(parts.values()) > 0
                assert sum(parts.values()) == pytest.approx(whole)
        for reference, ratio in found["ratio"].items():
            pairs = zip(found["seconds"]["ours"], found["seconds"][reference], strict=True)
            assert ratio == sorted(theirs / own for own, theirs in pairs)[1]
