"""A benchmark run as its users run it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(program: str, words: list[str], folder: Path) -> tuple[str, dict[str, Any]]:
    """What a benchmark prints, and the result that it writes."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{program}", *words, "--output", "result.json"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**{key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "result.json").read_text())
