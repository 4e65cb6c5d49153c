"""Distribution matching and reflow on a mixture in the plane: train, measure, draw, write and tell."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from instaflow.errors import ConfigError
from instaflow.evaluation.wording import number, percent
from instaflow.files import write_file, write_json
from instaflow.toy.demonstration import MODELS, Demonstration, demonstrate
from instaflow.toy.figure import poster
from instaflow.toy.mixtures import remote
from instaflow.toy.page import NAMES, average, bend, covered, page
from instaflow.world import hardware
from pipelines.compare import aligned


def run(*, seed: int, seeds: int, output: Path) -> list[str]:
    """Write toy.png, toy.html and toy.json to the folder `output`; returns the lines that tell what came out.

    seeds: how many, from `seed` on, are trained side by side.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"'{output}' is a file, and must be a folder", "Choose another place: --output runs/toy")
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a second thread would mostly wait: the networks are tiny
    torch.set_flush_denormal(True)
    shown = demonstrate(remote(), range(seed, seed + seeds))
    write_json(output / "toy.json", as_json(shown))
    write_file(output / "toy.png", poster(shown))
    write_file(output / "toy.html", page(shown, hardware()))
    return [*told(shown), "", f"The figure: {output / 'toy.png'}", f"The page: {output / 'toy.html'}"]


def as_json(shown: Demonstration) -> dict[str, Any]:
    """What was measured, by model and in the order of the seeds."""
    return {
        "seeds": shown.seeds,
        "hardware": hardware(),
        "modes": shown.mixture.means.tolist(),
        "measures": {model: [asdict(one) for one in every] for model, every in shown.measures.items()},
        "straightness": {
            model: [{"value": one.value, "relative": one.relative} for one in every]
            for model, every in shown.straightness.items()
        },
    }


def told(shown: Demonstration) -> Sequence[str]:
    """The table for a terminal, and the straightness."""
    table = [("", "model", "modes covered", "off the modes", "distance to data", "to teacher's sample")]
    for model in MODELS:
        own = average(shown, model)
        figures = (percent(own.off_modes), number(own.energy_distance), number(own.teacher_distance))
        table.append(("", NAMES[model], covered(shown, model), *figures))
    before, after = (bend(shown, model) for model in shown.straightness)
    lines = [*aligned(table), "", f"Straightness S(Z) of the paths: {before} before reflow, {after} after"]
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]
