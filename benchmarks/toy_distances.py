"""Where matching without regression misses the toy's far mode: at other distances, and at twice the learning rate.

    python -m benchmarks.toy_distances --output benchmarks/results/toy-distances.json

What came out is told in docs/dmd-toy.
"""

import json
from pathlib import Path

import click
import torch

from instaflow.toy.demonstration import EVALUATED, FAIR, MATCHING_RATE, MATCHING_STEPS, exact_pairs, started
from instaflow.toy.matching import match, unlabelled
from instaflow.toy.mixtures import Mixture, even_noise, remote
from instaflow.toy.nets import Couplings
from instaflow.world import hardware

SETTINGS = {
    "as in the toy": (1.0, 1.0),
    "all distances and deviations halved": (0.5, 1.0),
    "all distances and deviations quartered": (0.25, 1.0),
    "both learning rates doubled": (1.0, 2.0),
}
"""Factors of the mixture's size, and of the learning rate of generator and fake score."""


def shares_of(mixture: Mixture, rate: float, seeds: list[int]) -> list[list[float]]:
    """Of a one-step generator's samples, those on each mode: a list for each seed."""
    start = started(mixture, seeds)
    pairs = Couplings([exact_pairs(mixture, seed) for seed in seeds])  # unused without regression
    generators = match("real and fake score", start, mixture, pairs, rate, steps=MATCHING_STEPS, seed=seeds[0])
    noise = torch.stack([even_noise(EVALUATED, mixture.dimension, seed) for seed in seeds])
    return [
        mixture.shares(samples).tolist() for samples in generators.one_step(noise, unlabelled(len(seeds), EVALUATED))
    ]


@click.command()
@click.option("--seeds", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON.")
def main(seeds: int, output: Path | None) -> None:
    """Train case (b) of `instaflow toy` in each setting; print how many modes each seed covers."""
    toy, found = remote(), {}
    for setting, (size, speed) in SETTINGS.items():
        mixture = Mixture(size * toy.means, size * toy.std, toy.weights, toy.labels)
        shares = shares_of(mixture, speed * MATCHING_RATE, list(range(seeds)))
        least = [FAIR * weight for weight in mixture.weights.tolist()]
        covered = [sum(map(float.__ge__, own, least)) for own in shares]
        far = sum(own[-1] >= least[-1] for own in shares)
        print(f"{setting}: the far mode in {far} of {seeds} seeds; modes covered {covered}", flush=True)
        found[setting] = {"size": size, "rate": speed * MATCHING_RATE, "shares": shares, "covered": covered, "far": far}
    if output:
        content = {"seeds": list(range(seeds)), "hardware": hardware(), "settings": found}
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
