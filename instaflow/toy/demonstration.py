"""One mixture, two ways to one step: distribution matching in its three cases, and reflow; measured over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instaflow.flow.straightness import Straightness, Trajectory, straightness
from instaflow.toy.matching import CASES, match, unlabelled
from instaflow.toy.mixtures import Mixture, apart, energy_distance, even_noise
from instaflow.toy.nets import Couplings, Nets, one_hot, reflow_error, starting_error, train

WIDTH = 64  # of the networks' three hidden layers
STARTING_PAIRS, STARTING_SAMPLES, STARTING_RATE = 2**14, 2**17, 1e-2
PAIRS = 2**11
TEACHER_STEPS = 100
MATCHING_STEPS, MATCHING_RATE = 1600, 1e-3
REFLOW_SAMPLES, REFLOW_RATE = 2**18, 1e-2
EVALUATED = 2**11
FAIR = 0.2
"""A mode is covered if it holds at least this part of the share that it has of the data."""
START, REFLOWED, TEACHER = "start", "reflow", "teacher"
MODELS = (START, *CASES, REFLOWED, TEACHER)


@dataclass(frozen=True)
class Measures:
    """What a model's samples from one noise show."""

    shares: list[float]
    """Of all samples, on each mode."""
    covered: int
    """Modes that hold at least `FAIR` of their share of the data."""
    off_modes: float
    energy_distance: float
    """To the data."""
    teacher_distance: float
    """To the teacher's sample from the same noise, as the root of the mean square."""


@dataclass(frozen=True)
class Demonstration:
    """Measures of each model and straightness of both flows, by seed; samples and paths of the first."""

    mixture: Mixture
    seeds: list[int]
    measures: dict[str, list[Measures]]
    straightness: dict[str, list[Straightness]]
    samples: dict[str, Tensor]
    """[N, 2], of each model from the same noise."""
    paths: dict[str, Trajectory]
    """Of `TEACHER` and `REFLOWED`, from the same noise."""

    def covered(self, model: str) -> list[int]:
        """How many modes, by seed."""
        return [measures.covered for measures in self.measures[model]]


def demonstrate(mixture: Mixture, seeds: Sequence[int]) -> Demonstration:
    """Train all that is shown, the seeds' networks side by side.

    Every network starts as the teacher's small copy, a 1-rectified flow of the data (DMD and InstaFlow both start from
    the teacher's weights); the teacher itself, its couplings and the real score are exact.
    """
    together, start = len(seeds), started(mixture, seeds)
    pairs = Couplings([exact_pairs(mixture, seed) for seed in seeds])
    nets = {START: start}
    for case in CASES:
        nets[case] = match(case, start, mixture, pairs, MATCHING_RATE, steps=MATCHING_STEPS, seed=seeds[0])
    rates = torch.full((together,), REFLOW_RATE)
    nets[REFLOWED] = train(reflow_error, start, pairs, rates, samples=REFLOW_SAMPLES, seed=seeds[0], label=REFLOWED)

    noise = torch.stack([even_noise(EVALUATED, mixture.dimension, seed) for seed in seeds])
    labels = unlabelled(together, EVALUATED)
    exact = mixture.path(noise.flatten(0, 1), torch.zeros(noise[..., 0].numel(), dtype=torch.long), 1.0, TEACHER_STEPS)
    paths = {
        TEACHER: of_each(exact, together),
        REFLOWED: of_each(nets[REFLOWED].flow(noise, labels, TEACHER_STEPS), together),
    }
    samples = {model: net.one_step(noise, labels) for model, net in nets.items()}
    samples[TEACHER] = exact.states[-1].view(noise.shape)
    return Demonstration(
        mixture=mixture,
        seeds=list(seeds),
        measures={
            model: [measured(mixture, *pair) for pair in zip(samples[model], samples[TEACHER], strict=True)]
            for model in MODELS
        },
        straightness={model: [straightness(path) for path in own] for model, own in paths.items()},
        samples={model: samples[model][0] for model in MODELS},
        paths={model: own[0] for model, own in paths.items()},
    )


def started(mixture: Mixture, seeds: Sequence[int]) -> Nets:
    """1-rectified flows of the mixture, one for each seed."""
    return train(
        starting_error,
        Nets.fresh(seeds, WIDTH, mixture.dimension),
        Couplings([random_pairs(mixture, seed) for seed in seeds]),
        torch.full((len(seeds),), STARTING_RATE),
        samples=STARTING_SAMPLES,
        seed=seeds[0],
        label=START,
    )


def random_pairs(mixture: Mixture, seed: int) -> Tensor:
    """Noise beside data that have nothing to do with it: what a diffusion model learns from."""
    random = torch.Generator().manual_seed(10**4 + seed)
    noise, shift = torch.randn(2, STARTING_PAIRS, mixture.dimension, generator=random)
    labels = torch.zeros(STARTING_PAIRS, dtype=torch.long)
    return torch.cat([noise, mixture.sample(shift), one_hot(labels)], 1)


def exact_pairs(mixture: Mixture, seed: int) -> Tensor:
    """Noise beside where the exact flow leads from it."""
    noise = torch.randn(PAIRS, mixture.dimension, generator=torch.Generator().manual_seed(2 * 10**4 + seed))
    labels = torch.zeros(PAIRS, dtype=torch.long)
    return torch.cat([noise, mixture.flow(noise, labels, 1.0, TEACHER_STEPS), one_hot(labels)], 1)


def of_each(path: Trajectory, count: int) -> list[Trajectory]:
    """The paths of `count` networks, apart."""
    parts = zip(path.states.chunk(count, 1), path.velocities.chunk(count, 1), strict=True)
    return [Trajectory(states, velocities, path.times) for states, velocities in parts]


def measured(mixture: Mixture, samples: Tensor, teacher: Tensor) -> Measures:
    """samples, teacher: [N, 2], from the same noise."""
    shares = mixture.shares(samples)
    data = mixture.sample(even_noise(2 * len(samples), mixture.dimension, seed=999))[None]
    return Measures(
        shares=shares.tolist(),
        covered=int((shares >= FAIR * mixture.weights).sum()),
        off_modes=float(1 - shares.sum()),
        energy_distance=energy_distance(samples[None], data, apart(data)),
        teacher_distance=float((samples - teacher).square().sum(-1).mean().sqrt()),
    )
