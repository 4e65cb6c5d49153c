"""Many small networks of one shape, trained at once on couplings in memory, each with its own couplings and rate.

A coupling is a row of noise [D], data [D] and one-hot label [LABELS].
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from instaflow.flow.paths import velocity
from instaflow.flow.straightness import Trajectory, euler
from instaflow.flow.views import NUM_TIMESTEPS
from instaflow.progress import Progress
from instaflow.toy.mixtures import VIEW

BATCH = 128
LABELS = 4
FREQUENCIES = torch.pi * torch.arange(1, 5)  # of time's embedding


def one_hot(labels: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, LABELS).float()


class Nets:
    """S perceptrons with three hidden layers: a point, its time and label to noise - data, as `VelocityView` reads it.

    flat: [S, P], their parameters.
    """

    def __init__(self, flat: Tensor, width: int, dimension: int) -> None:
        self.flat, self.width, self.dimension = flat, width, dimension
        self.layers = []  # weights and biases by turns, in the memory of `flat`
        start = 0
        for fan_in, fan_out in itertools.pairwise(self.sizes(width, dimension)):
            for rows in (fan_in, 1):
                part = flat[:, start : start + rows * fan_out].unflatten(1, (rows, fan_out))
                self.layers.append(part.detach().requires_grad_())
                start += rows * fan_out

    @staticmethod
    def sizes(width: int, dimension: int) -> list[int]:
        return [dimension + len(FREQUENCIES) + LABELS, width, width, width, dimension]

    @classmethod
    def fresh(cls, seeds: Sequence[int], width: int, dimension: int) -> "Nets":
        """Networks with PyTorch's usual random weights, one of each seed."""
        flats = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            uniform = [
                (2 * torch.rand((fan_in + 1) * fan_out, generator=generator) - 1) / fan_in**0.5
                for fan_in, fan_out in itertools.pairwise(cls.sizes(width, dimension))
            ]
            flats.append(torch.cat(uniform))
        return cls(torch.stack(flats), width, dimension)

    def copy(self) -> "Nets":
        return Nets(self.flat.clone(), self.width, self.dimension)

    def output(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """Of S batches in a row. x: [S * B, D, 1, 1]; timestep: [S * B]; labels: one-hot [S, B, LABELS]."""
        x = x.view(len(self.flat), -1, self.dimension)
        angles = (timestep / NUM_TIMESTEPS).view(len(self.flat), -1, 1) * FREQUENCIES
        hidden = torch.cat([x, angles.cos(), labels], -1)
        *within, (weight, bias) = zip(self.layers[::2], self.layers[1::2], strict=True)
        for inner_weight, inner_bias in within:
            hidden = torch.nn.functional.silu(torch.baddbmm(inner_bias, hidden, inner_weight))
        return torch.baddbmm(bias, hidden, weight).reshape(-1, self.dimension, 1, 1)

    @torch.no_grad()
    def flow(self, noise: Tensor, labels: Tensor, num_steps: int) -> Trajectory:
        """Each network's path from its noise [S, B, D] with labels [S, B, LABELS], as one batch of S * B."""
        x = noise.reshape(-1, self.dimension, 1, 1)
        return euler(VIEW, lambda z, timestep: self.output(z, timestep, labels), x, num_steps)

    def generated(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Where one step leads from noise [S * B, D, 1, 1], as the sampler takes it."""
        return VIEW.one_step(noise, self.output(noise, last_timestep(noise), labels))

    @torch.no_grad()
    def one_step(self, noise: Tensor, labels: Tensor) -> Tensor:
        """The same of noise [S, B, D]."""
        return self.generated(noise.reshape(-1, self.dimension, 1, 1), labels).view(noise.shape)


def last_timestep(x: Tensor) -> Tensor:
    return torch.full((len(x),), NUM_TIMESTEPS - 1)


class Couplings:
    """The couplings of S networks, each with as many as it has. tables: S of [n, D + D + LABELS]."""

    def __init__(self, tables: Sequence[Tensor]) -> None:
        self.rows = torch.cat(list(tables))
        self.counts = torch.tensor([[len(table)] for table in tables])
        self.starts = self.counts.cumsum(0) - self.counts

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noise and data [S * BATCH, D, 1, 1] and labels [S, BATCH, LABELS], drawn with repetition."""
        uniform = torch.rand(len(self.counts), BATCH, generator=generator)
        index = self.starts + (uniform * self.counts).long()
        noise, data, labels = parts(self.rows[index.flatten()])
        return noise[:, :, None, None], data[:, :, None, None], labels.view(len(self.counts), BATCH, LABELS)


def parts(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, data and labels of couplings."""
    dimension = (table.shape[-1] - LABELS) // 2
    noise, data, labels = table.split((dimension, dimension, LABELS), -1)
    return noise, data, labels


def couple(nets: Nets, tables: Sequence[Tensor], num_steps: int) -> list[Tensor]:
    """The same noise and labels, coupled with the data that each network's flow leads to."""
    longest = max(map(len, tables))
    padded = torch.stack([torch.cat([table, table[:1].expand(longest - len(table), -1)]) for table in tables])
    coupled = []
    for some in padded.split(512, 1):  # so that what is computed at once stays near the processor
        noise, _, labels = parts(some)
        data = nets.flow(noise, labels, num_steps).states[-1].view(noise.shape)
        coupled.append(torch.cat([noise, data, labels], -1))
    return [row[: len(table)] for row, table in zip(torch.cat(coupled, 1), tables, strict=True)]


def reflow_error(nets: Nets, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """v(x_t, t) - (data - noise) at uniform times (InstaFlow, Eq. 5)."""
    return velocity_error(nets, batch, torch.rand(len(batch[0]), generator=generator))


def starting_error(nets: Nets, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """The same with a quarter of the times at 0, so that one step from noise is learned as well as the many."""
    return velocity_error(nets, batch, (4 * torch.rand(len(batch[0]), generator=generator) - 1).clamp(min=0) / 3)


def velocity_error(nets: Nets, batch: tuple[Tensor, Tensor, Tensor], t: Tensor) -> Tensor:
    noise, data, labels = batch
    x, timestep = VIEW.point(noise, data, VIEW.time(t))
    return VIEW.velocity(x, timestep, nets.output(x, timestep, labels)) - velocity(noise, data)


def distill_error(nets: Nets, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """One step from the noise, less the coupled data (InstaFlow, Eq. 6, with L2)."""
    noise, data, labels = batch
    return nets.generated(noise, labels) - data


class Adam:
    """Adam (0.9, 0.99) of networks side by side, each with its rate."""

    def __init__(self, nets: Nets) -> None:
        self.nets, self.steps = nets, 0
        self.mean, self.square = torch.zeros_like(nets.flat), torch.zeros_like(nets.flat)

    def step(self, loss: Tensor, rates: Tensor) -> None:
        """One step down `loss`, a sum or mean over the networks; rates: [S]."""
        gradients = torch.autograd.grad(loss, self.nets.layers)
        gradient = torch.cat([part.flatten(1) for part in gradients], 1)
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.lerp_(gradient.square_(), 0.01)
        size = (self.square / (1 - 0.99**self.steps)).sqrt_().add_(1e-8)
        self.nets.flat.sub_(self.mean / size * (rates[:, None] / (1 - 0.9**self.steps)))


Error = Callable[[Nets, tuple[Tensor, Tensor, Tensor], torch.Generator], Tensor]


def train(
    error: Error, start: Nets, couplings: Couplings, rates: Tensor, *, samples: int, seed: int, label: str = ""
) -> Nets:
    """Adam on the mean squared error, each network with its rate [S], which falls linearly to 0.

    label: what it is called where its progress is told, which it is not without.
    """
    nets = start.copy()
    optimizer = Adam(nets)
    generator = torch.Generator().manual_seed(seed)
    steps = samples // BATCH
    with Progress(label, total=steps, unit="updates", quiet=not label) as progress:
        for step in range(steps):
            loss = error(nets, couplings.batch(generator), generator).square().sum() / BATCH
            optimizer.step(loss, rates * (1 - step / steps))
            progress.update(step + 1)
    return nets
