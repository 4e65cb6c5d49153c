"""The benchmark of couplings runs, and measures the architecture that it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.couple import sd15_networks

ROOT = Path(__file__).parents[2]


def test_it_prints_every_rate_and_its_ratio(tmp_path: Path) -> None:
    words = ["--batch-size", "2", "--num-steps", "2", "--rounds", "3", "--output", "result.json"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "couple.py", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pairs/s") == 3 and done.stdout.count("times stock") == 2
    result = json.loads((tmp_path / "result.json").read_text())
    assert all(len(seconds) == 3 for seconds in result["seconds"].values())
    for name in ("ours", "compiled"):
        pairs = zip(result["seconds"][name], result["seconds"]["stock"], strict=True)
        assert result["ratio"][name] == sorted(theirs / own for own, theirs in pairs)[1]


def test_sd15_has_the_size_of_the_real_one() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in network.parameters()) for network in sd15_networks()]
    assert sizes == [859_520_964, 83_653_863, 123_060_480]
