"""Distribution matching distillation: DMD (arXiv 2311.18828) and DMD2 (arXiv 2405.14867).

A generator's images, noised again, are judged by two diffusion models: one knows what real images look like, the other
is trained on the generator's own all along. Where the two expect different data, the generator is moved from the one
towards the other, which is the gradient of the KL divergence between the two noised distributions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from instaflow.flow.views import View
from instaflow.sections import MatchingPhase, Regression
from instaflow.training.draws import PROMPT, STEP, TIME
from instaflow.training.figures import Means
from instaflow.training.losses import Encode
from instaflow.training.perceptual import PerceptualDistance
from instaflow.training.progressive import Teacher

LEAST = 1e-4
"""The normaliser's floor: a sample that is nearer to what its teacher expects is at the end of its way."""


def matching_direction(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(μ_fake - μ_real) / mean|x - μ_real| of each sample: what to walk against (DMD, Eq. 7 and 8).

    Up to the paper's weight w_t that is α (s_fake - s_real), the gradient of the KL divergence with respect to x. x:
    the generator's data; real, fake: the data that the two models expect behind x noised, [B, C, H, W] each.
    """
    distance = (x - real).abs().flatten(1).mean(1).clamp(min=LEAST)
    return (fake - real) / distance.view(-1, *[1] * (x.ndim - 1))


def matching_loss(x: Tensor, direction: Tensor) -> Tensor:
    """A scalar whose gradient in x is `direction`, divided by the number of x's values."""
    return 0.5 * functional.mse_loss(x, (x - direction).detach())


class Generator:
    """How a network makes data in few steps: what it sees in noise, noised again to the next level (DMD2, Sec. 4.4).

    In one step it is the network at the last timestep, read as data (DMD, Sec. 3.1).
    """

    def __init__(self, unet: nn.Module, view: View, encode: Encode, num_steps: int) -> None:
        self.unet, self.view, self.encode = unet, view, encode
        self.timesteps = view.grid(num_steps)[0]

    def __call__(self, noise: Tensor, prompts: list[str], steps: Tensor) -> Tensor:
        """The data [B, C, H, W] after each sample's own step, `steps` [B]; gradients go through that one alone.

        noise: [B, K, C, H, W], that of the start and of each noising since. A sample takes part up to its own step.
        """
        x, made = noise[:, 0], torch.empty_like(noise[:, 0])
        for step in range(int(steps.max()) + 1):
            on, last = steps > step, steps == step
            if last.any():
                rows = last.nonzero().squeeze(1)
                made = made.index_copy(0, rows, self.step(x[rows], [prompts[row] for row in rows.tolist()], step))
            if on.any():
                rows = on.nonzero().squeeze(1)
                with torch.no_grad():
                    data = self.step(x[rows], [prompts[row] for row in rows.tolist()], step)
                    timestep = self.at(step + 1, len(rows), noise.device)
                    x = x.index_copy(0, rows, self.view.noised(noise[rows, step + 1], data, timestep))
        return made

    def step(self, x: Tensor, prompts: list[str], step: int) -> Tensor:
        """What the network at a step's timestep takes for the data in x."""
        timestep = self.at(step, len(x), x.device)
        output = self.unet(x, timestep, **self.encode(prompts), return_dict=False)[0]
        if step == 0:
            return self.view.one_step(x, output)
        return self.view.predicted_data(x, timestep, output)

    def at(self, step: int, count: int, device: torch.device) -> Tensor:
        return self.timesteps[step].to(device).expand(count)


class Discriminator(nn.Module):
    """Tells noised real data from noised made ones by what a U-Net's bottleneck holds (DMD2, Sec. 4.3)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.rests = False
        """Set in a phase that does not ask it: then it learns nothing."""
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.GroupNorm(groups, channels), nn.SiLU()
        )
        self.head = nn.Linear(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B] of being real, float32. features: [B, C, h, w]."""
        logits: Tensor = self.head(self.layers(features).mean((2, 3))).squeeze(1)
        return logits.float()


class FakeScoreLoss(nn.Module):
    """What keeps the fake score at the generator's images: the denoising loss of its own kind (DMD, Eq. 6).

    With a discriminator comes its loss, softplus(D(made)) + softplus(-D(real)), both noised alike (DMD2, Eq. 4).
    """

    def __init__(
        self,
        unet: Any,
        view: View,
        encode: Encode,
        generate: Callable[[Tensor, np.ndarray], tuple[Tensor, list[str]]],
        discriminator: Discriminator | None = None,
        weight: float = 0.0,
    ) -> None:
        """`generate` gives the generator's data and their prompts, without a gradient; `weight`: of D's loss."""
        super().__init__()
        self.unet, self.view, self.encode, self.generate = unet, view, encode, generate
        self.discriminator, self.weight = discriminator, weight
        self.means = Means("fake_loss", *(["discriminator_loss"] if discriminator else ()))

    @property
    def takes_real(self) -> bool:
        """Whether the present phase has work for real samples: the discriminator's, unless it rests."""
        return self.discriminator is not None and not self.discriminator.rests

    def forward(self, noise: Tensor, real: Tensor | None, captions: list[str], draws: np.ndarray) -> Tensor:
        """Scalar. noise: [B, K + 1, C, H, W], the generator's and, at last, what its data are noised with; real:
        [B, C, H, W] with its captions, where a discriminator does not rest; draws: [B, COLUMNS]."""
        data, prompts = self.generate(noise[:, :-1], draws)
        fresh, timestep = noise[:, -1], self.timestep(draws, noise.device)
        x = self.view.noised(fresh, data, timestep)
        held: list[Tensor] = []
        judging = self.discriminator if self.takes_real else None
        hook = self.unet.mid_block.register_forward_hook(lambda *call: held.append(call[2])) if judging else None
        output = self.unet(x, timestep, **self.encode(prompts), return_dict=False)[0]
        if hook:
            hook.remove()
        loss = (output - self.view.target(fresh, data, timestep)).square().mean()
        self.means.add("fake_loss", loss)
        if judging and real is not None:
            made = judging(held[0])
            noised = self.view.noised(fresh, real, timestep)
            known = judging(bottleneck(self.unet, noised, timestep, self.encode(captions)))
            telling = functional.softplus(made).mean() + functional.softplus(-known).mean()
            self.means.add("discriminator_loss", telling)
            loss = loss + self.weight * telling
        return loss

    def timestep(self, draws: np.ndarray, device: torch.device) -> Tensor:
        """Of the whole noise schedule, [B]."""
        return self.view.timestep(torch.as_tensor(draws[:, TIME]).to(device, torch.float32))

    def judged(self, data: Tensor, noise: Tensor, prompts: list[str], draws: np.ndarray) -> tuple[Tensor, Tensor]:
        """softplus(-D) of made data that are noised, a mean, and its gradient in the data [B, C, H, W].

        No parameter is given a gradient.
        """
        if self.discriminator is None:
            raise ValueError("there is no discriminator")
        timestep = self.timestep(draws, data.device)
        with torch.enable_grad():
            made = data.detach().requires_grad_()
            x = self.view.noised(noise, made, timestep)
            logits = self.discriminator(bottleneck(self.unet, x, timestep, self.encode(prompts)))
            value = functional.softplus(-logits).mean()
            (gradient,) = torch.autograd.grad(value, made)
        return value.detach(), gradient


class Reached(Exception):
    """Carries what a bottleneck holds out of the network's forward, of which the rest is not needed."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def bottleneck(unet: Any, x: Tensor, timestep: Tensor, text: dict[str, Any]) -> Tensor:
    """What a U-Net's middle makes of its input, [B, C, h, w]."""

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        raise Reached(output)

    hook = unet.mid_block.register_forward_hook(leave)
    try:
        unet(x, timestep, **text)
    except Reached as reached:
        return reached.features
    finally:
        hook.remove()
    raise ValueError("the network's forward passes by its mid_block")


class MatchingLoss(nn.Module):
    """What the generator minimises: the matching of distributions, a regression, and what a discriminator says."""

    def __init__(
        self,
        generator: Generator,
        *,
        prompts: Sequence[str],
        view: View,
        real: Teacher,
        fake: Teacher,
        noise_range: tuple[float, float],
        regression: Regression | None = None,
        distance: PerceptualDistance | None = None,
        judged: Callable[[Tensor, Tensor, list[str], np.ndarray], tuple[Tensor, Tensor]] | None = None,
        gan_weight: float = 0.0,
    ) -> None:
        """`view` is how the two scores are read.

        `distance`: what a regression by lpips measures by; `judged`: that of the `FakeScoreLoss`.
        """
        super().__init__()
        self.unet, self.generator, self.prompts, self.view = generator.unet, generator, prompts, view
        self.real, self.fake, self.noise_range = real, fake, noise_range
        self.regression, self.distance, self.judged = regression, distance, judged
        self.own_weights = regression.weight if regression else 0.0, gan_weight
        self.regression_weight, self.gan_weight = self.own_weights
        names = ["matching_loss", *(["regression_loss"] if regression else []), *(["gan_loss"] if judged else [])]
        self.means = Means(*names)

    def begin(self, phase: MatchingPhase) -> None:
        """Take over the weights of a phase, where it has its own."""
        asked = phase.regression_weight, phase.gan_weight
        self.regression_weight, self.gan_weight = (
            own if weight is None else weight for own, weight in zip(self.own_weights, asked, strict=True)
        )

    @property
    def takes_pairs(self) -> bool:
        """Whether the present phase has work for coupled samples: to be regressed or, where they are, matched."""
        return self.regression is not None and (self.regression_weight > 0 or self.regression.matched)

    def forward(
        self, noise: Tensor, coupled: Tensor | None, data: Tensor | None, captions: list[str], draws: np.ndarray
    ) -> Tensor:
        """Scalar. noise: [B, K + 1, C, H, W], the generator's and, at last, what its data are noised with; coupled,
        data and captions: the regression's samples, [B', C, H, W], B' ≤ B, or None; draws: [B, COLUMNS]."""
        prompts, steps = self.asked(draws)
        start, fresh, size = noise[:, :-1], noise[:, -1], len(noise)
        if coupled is not None:
            start = torch.cat([start, coupled.unsqueeze(1)])
            prompts, steps = prompts + captions, torch.cat([steps, steps.new_zeros(len(coupled))])
        made = self.generator(start, prompts, steps)
        loss = matching_loss(made[:size], self.direction(made[:size], fresh, prompts[:size], draws))
        self.means.add("matching_loss", loss)
        if self.regression and coupled is not None and data is not None:
            pairs, few = made[size:], len(made) - size
            rows = np.arange(few) * size // few  # whose numbers and noise they share
            if self.regression.matched:
                more = matching_loss(pairs, self.direction(pairs, fresh[rows], captions, draws[rows]))
                loss = (size * loss + few * more) / (size + few)
            if self.regression_weight:
                missed = self.missed(pairs, data, draws[rows])
                self.means.add("regression_loss", missed)
                loss = loss + self.regression_weight * missed
        if self.judged and self.gan_weight:
            value, gradient = self.judged(made[:size], fresh, prompts[:size], draws)
            self.means.add("gan_loss", value)
            own = made[:size]
            loss = loss + self.gan_weight * (value + ((own - own.detach()) * gradient).sum())
        return loss

    def asked(self, draws: np.ndarray) -> tuple[list[str], Tensor]:
        """The prompt and the step of the generator that each sample is for."""
        prompts = [self.prompts[place] for place in (draws[:, PROMPT] * len(self.prompts)).astype(int)]
        return prompts, torch.as_tensor(draws[:, STEP] * len(self.generator.timesteps)).long()

    @torch.no_grad()
    def generate(self, noise: Tensor, draws: np.ndarray) -> tuple[Tensor, list[str]]:
        """Data of noise [B, K, C, H, W] as they are now, for the fake score to learn from, and their prompts."""
        prompts, steps = self.asked(draws)
        return self.generator(noise, prompts, steps), prompts

    @torch.no_grad()
    def direction(self, made: Tensor, noise: Tensor, prompts: list[str], draws: np.ndarray) -> Tensor:
        """`matching_direction` of data [B, C, H, W] at a time drawn for each; the data behind noise in float64."""
        low, high = self.noise_range
        share = torch.as_tensor(low + (high - low) * draws[:, TIME])
        timestep = self.view.timestep(share.to(made.device, torch.float32))
        x = self.view.noised(noise, made, timestep)
        real, fake = (
            self.view.predicted_data(x.double(), timestep, score(prompts)(x, timestep).double())
            for score in (self.real, self.fake)
        )
        return matching_direction(made.double(), real, fake).to(made.dtype)

    def missed(self, made: Tensor, data: Tensor, draws: np.ndarray) -> Tensor:
        """How far coupled samples are from their data."""
        if self.distance is None:
            return functional.mse_loss(made, data)
        return self.distance(made, data, draws).mean()
