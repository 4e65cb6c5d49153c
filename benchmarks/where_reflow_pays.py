"""Where reflow pays at one step, and where distilling the teacher directly is as good or better: a map on toy data.

    python -m benchmarks.where_reflow_pays                the whole map, in 10 minutes of one core of an Intel Xeon
    python -m benchmarks.where_reflow_pays --quick        two settings, to see that it works

From one teacher, with equal couplings and training samples in all:
    direct    distilled from the teacher's couplings
    reflow    a 2-rectified flow of the first half of the couplings, which couples the noise of the other half again,
              and is distilled; samples are split 4:5, as InstaFlow split them
    2rf       a 2-rectified flow of all couplings, one step of it
All start from the same network, a 1-rectified flow of the data (1rf), as a pretrained teacher is; the couplings are the
exact flow's of a Gaussian mixture, or that network's own. The optimizer's rate of each method is the best of four, by
the mean energy distance over seeds that are used for nothing else. Paired differences have 95% t-intervals over seeds;
among many settings, one in twenty lies outside its interval by chance.
"""

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from scipy.stats import t as student_t
from torch import Tensor

from benchmarks.reflow_map import MEASURES, METHODS, as_page, line
from instaflow.flow.straightness import Trajectory, straightness
from instaflow.toy.mixtures import (
    Mixture,
    apart,
    checkerboard,
    energy_distance,
    even_noise,
    labelled,
    ring,
    scattered,
    spiral,
    unbalanced,
)
from instaflow.toy.nets import BATCH, Couplings, Nets, couple, distill_error, one_hot, parts, reflow_error, train
from instaflow.world import hardware

SHAPES = {"ring": ring, "checkerboard": checkerboard, "spiral": spiral, "unbalanced": unbalanced, "labelled": labelled}
PLANE = [*((name, 1.0) for name in SHAPES), ("labelled", 3.0), ("labelled", 6.0)]
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
STARTING_RATE = 1e-2
STARTING_PAIRS = 65536
NUM_STEPS = 25  # of the 2-rectified flow that couples again
EVALUATED, REFERENCE = 1024, 4096
TOGETHER = 32  # networks; more leave the processor's cache


@dataclass(frozen=True)
class Setting:
    """data: a shape's name, or modes and dimension ("64 in 8"). samples: seen in training, by each method in all."""

    data: str
    width: int = 32
    samples: int = 2**16
    couplings: int = 4096
    guidance_scale: float = 1.0
    teacher_steps: int = 25
    own_teacher: bool = False
    """The starting network makes the couplings, in place of the exact flow."""
    reflow_share: float = 4 / 9


@dataclass(frozen=True)
class Effort:
    """How much is spent on each setting."""

    seeds: int = 8
    tuning_seeds: int = 3
    starting_samples: int = 2**17


def settings() -> dict[str, list[Setting]]:
    """The map's parts."""
    plane = [Setting(data, guidance_scale=guidance) for data, guidance in PLANE]
    typical = [Setting("ring"), Setting("labelled", guidance_scale=6.0), Setting("16 in 8", width=16)]
    return {
        "Shapes in the plane, by the network's width and the samples seen": [
            replace(setting, width=width, samples=samples)
            for setting in plane
            for width, samples in [(8, 2**14), (8, 2**17), (32, 2**14), (32, 2**17), (128, 2**14)]
        ],
        "Scattered modes, by their number, dimension and the network's width": [
            Setting(f"{modes} in {dimension}", width=width)
            for modes in (16, 64)
            for dimension in (4, 8)
            for width in (8, 16, 32, 128)
        ],
        "Scattered modes, by the samples seen": [
            Setting(data, width=width, samples=samples)
            for data, width in [("16 in 4", 8), ("16 in 8", 16), ("64 in 8", 32)]
            for samples in (2**14, 2**16, 2**18)
        ],
        "Number of couplings": [
            replace(setting, couplings=count) for setting in typical for count in (64, 256, 1024, 4096, 16384)
        ],
        "A teacher that is itself the network that all start from": [
            Setting(data, width=width, own_teacher=True)
            for data in ("ring", "16 in 4", "64 in 4", "64 in 8")
            for width in (32, 128)
        ],
        "The exact teacher's steps, and more of the samples for reflow": [
            replace(setting, **change)
            for setting in (typical[0], typical[2])
            for change in ({"teacher_steps": 8}, {"teacher_steps": 100}, {"reflow_share": 0.6})
        ],
    }


def quick_settings() -> dict[str, list[Setting]]:
    return {"Quick": [Setting("ring", samples=2**13), Setting("labelled", samples=2**13, guidance_scale=3.0)]}


@click.command()
@click.option("--quick", is_flag=True, help="Two settings and few seeds, in seconds.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON.")
@click.option("--page", type=click.Path(dir_okay=False, path_type=Path), help="Write the map as HTML.")
def main(quick: bool, output: Path | None, page: Path | None) -> None:
    """Compare reflow with direct distillation at one step, over data, networks, samples and couplings."""
    torch.set_num_threads(1)
    effort = Effort(seeds=4, tuning_seeds=1, starting_samples=2**14) if quick else Effort()
    wanted = quick_settings() if quick else settings()
    began = time.process_time()
    found = compare([setting for part in wanted.values() for setting in part], effort)
    result: dict[str, Any] = {
        "hardware": hardware(),
        "processor_seconds": round(time.process_time() - began),
        "effort": asdict(effort),
        "rates": RATES,
        "parts": {name: [found[setting] for setting in part] for name, part in wanted.items()},
    }
    for name, rows in result["parts"].items():
        click.echo(name)
        for row in rows:
            click.echo(f"  {row['name']:<60} {line(row)}")
    if output:
        output.write_text(json.dumps(result) + "\n")
    if page:
        page.write_text(as_page(result))


def compare(wanted: Sequence[Setting], effort: Effort) -> dict[Setting, dict[str, Any]]:
    """What each setting showed: rates by the tuning seeds, then all methods on the others."""
    wanted = list(dict.fromkeys(wanted))
    tuning = [(setting, 1000 + seed) for setting in wanted for _ in RATES for seed in range(effort.tuning_seeds)]
    rates = torch.tensor(RATES).repeat_interleave(effort.tuning_seeds).repeat(len(wanted))
    tried = trials(tuning, dict.fromkeys(METHODS, rates), effort)
    shape = (len(wanted), len(RATES), effort.tuning_seeds)
    best = {method: best_rates(tried[method][:, 0].view(shape)) for method in METHODS}
    models = [(setting, seed) for setting in wanted for seed in range(effort.seeds)]
    found = trials(models, {method: best[method].repeat_interleave(effort.seeds) for method in METHODS}, effort)
    rows = {}
    for i, setting in enumerate(wanted):
        own = {name: values.view(len(wanted), effort.seeds, -1)[i] for name, values in found.items()}
        rows[setting] = {
            "name": name_of(setting),
            "setting": asdict(setting),
            "gaussian": gaussian_distance(setting.data, setting.guidance_scale, guided_steps(setting)),
            "rates": {method: round(float(best[method][i]), 4) for method in METHODS},
            "straightness": {name: float(own.pop(f"straightness of {name}").mean()) for name in ("1rf", "2rf")},
            "measures": {
                name: {measure: mean_and_error(values[:, k]) for k, measure in enumerate(MEASURES)}
                for name, values in own.items()
            },
            "direct less": {
                other: {measure: interval((own["direct"] - own[other])[:, k]) for k, measure in enumerate(MEASURES)}
                for other in ("reflow", "2rf")
            },
        }
    return rows


def best_rates(distances: Tensor) -> Tensor:
    """Each setting's rate of the smallest mean distance [settings, rates, seeds]; never one that diverged."""
    return torch.tensor(RATES)[distances.mean(-1).nan_to_num(nan=torch.inf).argmin(-1)]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over seeds and its standard error."""
    return round(float(values.mean()), 5), round(float(values.std() / len(values) ** 0.5), 6)


def interval(values: Tensor) -> tuple[float, float]:
    """The mean over seeds and half of its 95% t-interval."""
    mean, error = mean_and_error(values)
    return mean, error * float(student_t.ppf(0.975, len(values) - 1))


Model = tuple[Setting, int]
"""A setting and a seed."""


def trials(models: list[Model], rates: dict[str, Tensor], effort: Effort) -> dict[str, Tensor]:
    """The measures of all models, [N, ...] each; those of one size train together."""

    def size(index: int) -> tuple[Any, ...]:
        setting = models[index][0]
        dimension = mixture_of(setting.data).dimension
        return (
            dimension,
            setting.width,
            setting.samples,
            setting.own_teacher,
            setting.reflow_share,
            setting.teacher_steps,
        )

    order = sorted(range(len(models)), key=lambda index: (size(index), models[index][0].couplings))
    groups: list[list[int]] = []
    for index in order:
        if not groups or size(groups[-1][0]) != size(index) or len(groups[-1]) == TOGETHER:
            groups.append([])
        groups[-1].append(index)
    found = [
        trial([models[i] for i in group], {method: rates[method][group] for method in METHODS}, effort)
        for group in groups
    ]
    place = torch.tensor(order).argsort()
    return {name: torch.cat([part[name] for part in found])[place] for name in found[0]}


def trial(models: list[Model], rates: dict[str, Tensor], effort: Effort) -> dict[str, Tensor]:
    """Every method on models of one size: its measures [S, 4]; rates: [S]."""
    shared = models[0][0]
    samples, first = shared.samples, int(shared.samples * shared.reflow_share) // BATCH * BATCH
    start = starting_nets(models, effort)
    pairs = [
        exact_couplings(setting.data, setting.guidance_scale, setting.teacher_steps, seed) for setting, seed in models
    ]
    pairs = [table[: setting.couplings] for table, (setting, _) in zip(pairs, models, strict=True)]
    ends = [exact_ends(setting.data, setting.guidance_scale, setting.teacher_steps, seed) for setting, seed in models]
    if shared.own_teacher:
        pairs = couple(start, pairs, shared.teacher_steps)
        ends = couple(start, ends, shared.teacher_steps)
    noise, data, labels = parts(torch.stack(ends))

    def distilled(nets: Nets, tables: list[Tensor], method: str, samples: int) -> Nets:
        return train(distill_error, nets, Couplings(tables), rates[method], samples=samples, seed=1)

    def reflowed(tables: list[Tensor], method: str, samples: int) -> Nets:
        return train(reflow_error, start, Couplings(tables), rates[method], samples=samples, seed=2)

    def one_step(nets: Nets) -> Tensor:
        return measures(models, nets.one_step(noise, labels), data)

    def straight(nets: Nets) -> Tensor:
        path = nets.flow(noise[:, ::8], labels[:, ::8], NUM_STEPS)
        states, velocities = path.states.chunk(len(models), 1), path.velocities.chunk(len(models), 1)
        return torch.tensor([
            straightness(Trajectory(state, velocity, path.times)).relative
            for state, velocity in zip(states, velocities, strict=True)
        ])  # fmt: skip

    two = reflowed([table[: len(table) // 2] for table in pairs], "reflow", first)
    again = couple(two, [table[len(table) // 2 :] for table in pairs], NUM_STEPS)
    _, two_ends, _ = parts(torch.stack(couple(two, ends, NUM_STEPS)))
    return {
        "teacher": measures(models, data, data),
        "1rf": one_step(start),
        "direct": one_step(distilled(start, pairs, "direct", samples)),
        "reflow": one_step(distilled(two, again, "reflow", samples - first)),
        "2rf": one_step(reflowed(pairs, "2rf", samples)),
        f"reflow's 2rf, {NUM_STEPS} steps": measures(models, two_ends, data),
        "straightness of 1rf": straight(start),
        "straightness of 2rf": straight(two),
    }


def measures(models: list[Model], points: Tensor, ends: Tensor) -> Tensor:
    """MEASURES of samples [S, N, D] against the data, and against the teacher's from the same noise: [S, 4].

    Guided, the teacher's own samples from other noise stand for the data. Spread: variance relative to the teacher's.
    """
    rows = []
    for (setting, _), own, teacher in zip(models, points, ends, strict=True):
        mixture = mixture_of(setting.data)
        by_label = own.unflatten(0, (mixture.num_labels, -1))
        rows.append([
            energy_distance(by_label, *reference(setting.data, setting.guidance_scale, guided_steps(setting))),
            mixture.off_modes(own, mixture.blocks(len(own))),
            float((own - teacher).square().sum(-1).mean().sqrt()),
            float(by_label.var(1).mean() / teacher.unflatten(0, (mixture.num_labels, -1)).var(1).mean()),
        ])  # fmt: skip
    return torch.tensor(rows)


@functools.cache
def mixture_of(data: str) -> Mixture:
    if data in SHAPES:
        return SHAPES[data]()
    modes, dimension = data.split(" in ")
    return scattered(int(modes), int(dimension))


def guided_steps(setting: Setting) -> int | None:
    """The teacher's, where its samples stand for the data."""
    return setting.teacher_steps if setting.guidance_scale != 1 else None


@functools.cache
def reference(data: str, guidance_scale: float, num_steps: int | None) -> tuple[Tensor, Tensor]:
    """What samples are held against, [L, N, D], and how far apart its points are."""
    mixture = mixture_of(data)
    noise = even_noise(REFERENCE, mixture.dimension, seed=999)
    if num_steps is None:
        points = mixture.sample(noise)
    else:
        points = mixture.flow(noise, mixture.blocks(REFERENCE), guidance_scale, num_steps)
    points = points.unflatten(0, (mixture.num_labels, -1))
    return points, apart(points)


@functools.cache
def gaussian_distance(data: str, guidance_scale: float, num_steps: int | None) -> float:
    """The energy distance of a Gaussian with each label's mean and covariance, which a linear map would reach."""
    points, _ = reference(data, guidance_scale, num_steps)
    mean, dimension = points.mean(1, keepdim=True), points.shape[-1]
    covariance = (points - mean).mT @ (points - mean) / points.shape[1]
    noise = even_noise(EVALUATED, dimension, seed=0).unflatten(0, (len(points), -1))
    gaussian = mean + noise @ torch.linalg.cholesky(covariance).mT
    return energy_distance(gaussian, *reference(data, guidance_scale, num_steps))


@functools.cache
def exact_couplings(data: str, guidance_scale: float, num_steps: int, seed: int) -> Tensor:
    """As many couplings of the exact flow as any setting takes, with labels in turn."""
    mixture, count = mixture_of(data), 2**14
    noise = torch.randn(count, mixture.dimension, generator=torch.Generator().manual_seed(2 * 10**4 + seed))
    labels = torch.arange(count) % mixture.num_labels
    return torch.cat([noise, mixture.flow(noise, labels, guidance_scale, num_steps), one_hot(labels)], 1)


@functools.cache
def exact_ends(data: str, guidance_scale: float, num_steps: int, seed: int) -> Tensor:
    """Fresh noise, on which all are measured, coupled with where the exact flow leads."""
    mixture = mixture_of(data)
    noise, labels = even_noise(EVALUATED, mixture.dimension, seed), mixture.blocks(EVALUATED)
    return torch.cat([noise, mixture.flow(noise, labels, guidance_scale, num_steps), one_hot(labels)], 1)


STARTED: dict[tuple[str, int, int, int], Tensor] = {}


def starting_nets(models: list[Model], effort: Effort) -> Nets:
    """1-rectified flows of the data, unguided; one for each data, width and seed, whatever the setting."""
    dimension = mixture_of(models[0][0].data).dimension
    width = models[0][0].width
    keys = [(setting.data, width, seed, effort.starting_samples) for setting, seed in models]
    new = [key for key in dict.fromkeys(keys) if key not in STARTED]
    if new:
        tables = []
        for data, _, seed, _ in new:
            mixture, generator = mixture_of(data), torch.Generator().manual_seed(10**4 + seed)
            noise, shift = torch.randn(2, STARTING_PAIRS, mixture.dimension, generator=generator)
            tables.append(torch.cat([noise, mixture.sample(shift), one_hot(mixture.blocks(STARTING_PAIRS))], 1))
        nets = Nets.fresh([seed for _, _, seed, _ in new], width, dimension)
        rates = torch.full((len(new),), STARTING_RATE)
        nets = train(reflow_error, nets, Couplings(tables), rates, samples=effort.starting_samples, seed=0)
        STARTED.update(zip(new, nets.flat, strict=True))
    return Nets(torch.stack([STARTED[key] for key in keys]), width, dimension)


def name_of(setting: Setting) -> str:
    """The setting in words."""
    words = [
        setting.data if setting.data in SHAPES else "{} modes in {} dimensions".format(*setting.data.split(" in "))
    ]
    if setting.data == "labelled":
        words.append(f"guidance {setting.guidance_scale:g}")
    words += [f"width {setting.width}", f"{setting.samples // 1024}k samples", f"{setting.couplings} couplings"]
    if setting.own_teacher:
        words.append("own teacher")
    if setting.teacher_steps != Setting.teacher_steps:
        words.append(f"teacher of {setting.teacher_steps} steps")
    if setting.reflow_share != Setting.reflow_share:
        words.append(f"{setting.reflow_share:.0%} for reflow")
    return ", ".join(words)


if __name__ == "__main__":
    main()
