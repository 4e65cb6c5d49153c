"""Distribution matching distillation (DMD, arXiv 2311.18828) of a mixture whose score is known, in three cases.

Time is the library's: z_t = (1 - t) noise + t data. A prediction of the data at z_t stands for a score there,
∇ log p_t(z) = (t E[data | z] - z) / (1 - t)², so that a difference of scores is a difference of predicted data.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from instaflow.flow.paths import velocity
from instaflow.progress import Progress
from instaflow.toy.mixtures import VIEW, Mixture
from instaflow.toy.nets import BATCH, Adam, Couplings, Nets, one_hot
from instaflow.training.dmd import matching_direction, matching_loss

Case = Literal["real score", "real and fake score", "with regression"]
CASES: tuple[Case, ...] = get_args(Case)
NOISIEST, CLEAREST = 0.02, 0.98  # times at which scores are compared
REGRESSION = 0.25
"""The weight of the regression loss, the paper's λ."""


def match(case: Case, start: Nets, mixture: Mixture, pairs: Couplings, rate: float, *, steps: int, seed: int) -> Nets:
    """One-step generators, trained from the weights `start`, which the fake score starts from as well.

    "real score" follows the mixture's score alone: the sample itself stands where the fake score's prediction would.
    "real and fake score" has a network for the latter, trained online on the generator's samples (Algorithm 1).
    "with regression" adds the squared distance to the teacher's data of `pairs`, from the same noise.
    """
    generators, fakes = start.copy(), start.copy()
    optimizer, fake_optimizer = Adam(generators), Adam(fakes)
    random = torch.Generator().manual_seed(seed)
    count = len(start.flat) * BATCH
    labels = unlabelled(len(start.flat), BATCH)

    def normal() -> Tensor:
        return torch.randn(count, start.dimension, 1, 1, generator=random)

    with Progress(case, total=steps, unit="updates") as progress:
        for step in range(steps):
            rates = torch.full((len(start.flat),), rate * (1 - step / steps))
            x = generators.generated(normal(), labels)
            samples = x.detach()
            t = NOISIEST + (CLEAREST - NOISIEST) * torch.rand(count, generator=random)
            z, timestep = VIEW.point(normal(), samples, t)
            real = mixture.expected_data(z.flatten(1), t[:, None], None).view(z.shape)
            fake = samples if case == "real score" else predicted(fakes, z, timestep, labels)
            loss = matching_loss(x, matching_direction(samples, real, fake))
            if case == "with regression":
                noise, data, _ = pairs.batch(random)
                loss = loss + REGRESSION * functional.mse_loss(generators.generated(noise, labels), data)
            optimizer.step(loss, rates)
            if case != "real score":
                noise, t = normal(), torch.rand(count, generator=random)
                z, timestep = VIEW.point(noise, samples, t)
                error = VIEW.velocity(z, timestep, fakes.output(z, timestep, labels)) - velocity(noise, samples)
                fake_optimizer.step(error.square().mean(), rates)
            progress.update(step + 1)
    return generators


@torch.no_grad()
def predicted(nets: Nets, z: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    """The data that networks predict at z."""
    return VIEW.data(z, timestep, VIEW.velocity(z, timestep, nets.output(z, timestep, labels)))


def unlabelled(nets: int, count: int) -> Tensor:
    """The one label of all, for so many networks with so many points each."""
    return one_hot(torch.zeros(nets, count, dtype=torch.long))
