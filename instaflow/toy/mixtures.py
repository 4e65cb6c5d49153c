"""Toy data in closed form: Gaussian mixtures, the velocity of their flow, and how far samples lie from them.

Points are [..., N, D]; toward `instaflow.flow` a point is an image of one pixel with D channels. Labels are [N].
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from instaflow.flow.straightness import Trajectory, euler
from instaflow.flow.views import NUM_TIMESTEPS, VelocityView

VIEW = VelocityView()


@dataclass(frozen=True)
class Mixture:
    """Components N(mean, std² I), each with its weight and label."""

    means: Tensor  # [K, D]
    std: float
    weights: Tensor  # [K], sum 1
    labels: Tensor  # [K]

    @classmethod
    def standardized(
        cls, means: Tensor, std: float, weights: Tensor | None = None, labels: Tensor | None = None
    ) -> "Mixture":
        """The mixture moved to mean 0 and scaled, all axes alike, to variance 1."""
        weights = torch.ones(len(means)) if weights is None else weights
        weights = weights / weights.sum()
        means = means - weights @ means
        scale = float((weights @ means.square().mean(1) + std**2).sqrt())
        labels = torch.zeros(len(means), dtype=torch.long) if labels is None else labels
        return cls(means / scale, std / scale, weights, labels)

    @property
    def dimension(self) -> int:
        return self.means.shape[1]

    @cached_property
    def num_labels(self) -> int:
        return int(self.labels.max()) + 1

    def blocks(self, count: int) -> Tensor:
        """As many of each label, one label after the other. count: a multiple of `num_labels`."""
        return torch.arange(self.num_labels).repeat_interleave(count // self.num_labels)

    def sample(self, noise: Tensor) -> Tensor:
        """Data with the labels `blocks(len(noise))`, around means in turn; no component has one too many or too few."""
        share = len(noise) // self.num_labels
        places = (torch.arange(share) + 0.5) / share
        components = []
        for label in range(self.num_labels):
            own = self.weights * (self.labels == label)
            components.append(torch.searchsorted(own.cumsum(0) / own.sum(), places).clamp(max=len(own) - 1))
        return self.means[torch.cat(components)] + self.std * noise

    def expected_data(self, z: Tensor, t: float | Tensor, labels: Tensor | None) -> Tensor:
        """E[data | z_t = z, label], z_t = (1 - t) noise + t data; without labels, of the whole mixture.

        z: [..., N, D]; t: one time, or [..., N, 1]. The score is then ∇ log p_t(z) = (t E[data | z] - z) / (1 - t)².
        """
        variance = (t * self.std) ** 2 + (1 - t) ** 2
        nearness = t * z @ self.means.T - t**2 * self.means.square().sum(1) / 2
        logits = self.weights.log() + nearness / variance  # [..., N, K]
        if labels is not None:
            logits = logits.masked_fill(self.labels != labels[:, None], -math.inf)
        shrink = t * self.std**2 / variance
        return shrink * z + (1 - shrink * t) * (logits.softmax(-1) @ self.means)

    def output(self, x: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
        """What a perfect network returns in diffusers' flow convention, guided: noise - data = (z - data) / (1 - t)."""
        noise_level = float(timestep[0]) / NUM_TIMESTEPS
        z = x.flatten(1)
        data = self.expected_data(z, 1 - noise_level, labels)
        if guidance_scale != 1:
            unguided = self.expected_data(z, 1 - noise_level, None)
            data = unguided + guidance_scale * (data - unguided)
        return ((z - data) / noise_level)[:, :, None, None]

    def path(self, noise: Tensor, labels: Tensor, guidance_scale: float, num_steps: int) -> Trajectory:
        """The exact flow's path, by Euler's method on the library's grid."""

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            return self.output(x, timestep, labels, guidance_scale)

        return euler(VIEW, predict, noise[:, :, None, None], num_steps)

    def flow(self, noise: Tensor, labels: Tensor, guidance_scale: float, num_steps: int) -> Tensor:
        """Where the exact flow ends."""
        return self.path(noise, labels, guidance_scale, num_steps).states[-1].flatten(1)

    @property
    def reach(self) -> float:
        """How far from its mean a mode reaches: √D + 3 standard deviations; within are 99.8% of its data or more."""
        return (self.dimension**0.5 + 3) * self.std

    def off_modes(self, points: Tensor, labels: Tensor) -> float:
        """The share of samples that no mode of their label reaches; of data, under 0.2%."""
        distances = torch.cdist(points, self.means).masked_fill(self.labels != labels[:, None], math.inf)
        return float((distances.amin(1) > self.reach).float().mean())

    def shares(self, points: Tensor) -> Tensor:
        """The share [K] of the points [N, D] that each mode holds: the nearest one does, if it reaches them."""
        distances, nearest = torch.cdist(points, self.means).min(1)
        held = nearest[distances <= self.reach]
        return torch.bincount(held, minlength=len(self.means)) / len(points)


def ring() -> Mixture:
    """Eight modes on a circle."""
    angles = torch.arange(8) * math.pi / 4
    return Mixture.standardized(torch.stack([angles.cos(), angles.sin()], 1), 0.07)


def checkerboard() -> Mixture:
    """The eight dark fields of a board of four by four, each of nine narrow components."""
    cells = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2]
    means = torch.tensor([(i + k / 3, j + m / 3) for i, j in cells for k in range(3) for m in range(3)])
    return Mixture.standardized(means, 0.13)


def spiral() -> Mixture:
    """One arm of 1.6 turns, of 48 components side by side."""
    turn = torch.linspace(0.04, 1, 48).sqrt()
    angles = 4 * math.pi * turn
    return Mixture.standardized(torch.stack([turn * angles.cos(), turn * angles.sin()], 1), 0.03, turn)


def unbalanced() -> Mixture:
    """Six scattered modes with weights from 1% to 50%."""
    means = torch.tensor([(-1.0, -0.2), (0.2, 0.9), (0.9, -0.9), (1.3, 0.6), (-0.9, 1.4), (0.1, -0.1)])
    return Mixture.standardized(means, 0.07, torch.tensor([0.5, 0.25, 0.12, 0.08, 0.04, 0.01]))


def labelled() -> Mixture:
    """Sixteen modes on a grid of four by four; each of four labels has four of them, scattered."""
    places = [(i, j) for i in range(4) for j in range(4)]
    labels = [(i + 2 * j) % 4 for i, j in places]
    return Mixture.standardized(torch.tensor(places).float(), 0.12, labels=torch.tensor(labels))


def remote() -> Mixture:
    """Four modes around the mean, and one far off; distances in units of the noise, which is small beside them.

    So it is among images too: of 16,384 values of unit variance each, two lie √(2 · 16384) = 181 apart. Noise joins
    two modes only where it is as large as their distance, thus at fewer times the farther apart they are.
    """
    means = torch.tensor([(-2.4, -0.2), (-8.0, 3.0), (-7.6, -4.2), (-2.0, -5.3), (20.0, 6.7)])
    count = len(means)
    return Mixture(means, 0.75, torch.full((count,), 1 / count), torch.zeros(count, dtype=torch.long))


def scattered(modes: int, dimension: int) -> Mixture:
    """Modes at random, where there is more room than in a plane."""
    return Mixture.standardized(torch.randn(modes, dimension, generator=torch.Generator().manual_seed(0)), 0.1)


def even_noise(count: int, dimension: int, seed: int) -> Tensor:
    """Scrambled Sobol points as unit Gaussian noise: where a flow takes them, they lie more evenly than at random."""
    points = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return torch.special.ndtri(points.clamp(1e-9, 1 - 1e-9)).float()


def apart(points: Tensor) -> Tensor:
    """E|x - x'|, over labels [L, N, D], each of which counts alike."""
    return torch.cdist(points, points).mean()


def energy_distance(points: Tensor, reference: Tensor, reference_apart: Tensor) -> float:
    """√(2 E|x - y| - E|x - x'| - E|y - y'|) of points [L, N, D], reference [L, M, D] and what `apart` says of it.

    (Székely and Rizzo, Energy statistics, 2013, as of whole distributions: the square is never negative, and finite
    samples have a floor, which falls with their number and where they lie evenly.)
    """
    between = torch.cdist(points, reference).mean()
    return float((2 * between - apart(points) - reference_apart).clamp(min=0).sqrt())
