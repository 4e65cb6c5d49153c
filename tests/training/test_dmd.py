"""Distribution matching against the KL divergence of Gaussians, and what each of its two networks leaves alone."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from instaflow.errors import InstaFlowError
from instaflow.flow.views import EdmView, EpsilonView, VelocityView
from instaflow.models.samplers import few_step_scheduler
from instaflow.models.sampling import generator_of
from instaflow.sections import MatchingPhase, Regression
from instaflow.training import loop
from instaflow.training.dmd import (
    Discriminator,
    FakeScoreLoss,
    Generator,
    MatchingLoss,
    bottleneck,
    matching_direction,
    matching_loss,
)
from instaflow.training.draws import COLUMNS, CROP, PROMPT, STEP, TIME, draws
from instaflow.training.engine import Engine
from instaflow.training.loop import Critic, Job, train
from instaflow.training.progressive import Teacher
from tests.models.made import ddim, load, noise, write_model
from tests.training.made import folder_of, job_of

PROMPTS = ["a seven", "an odd digit", "the digit 4"]
MEAN, DEVIATION = 0.7, 0.5  # of real data; the generator's are others
VIEWS = {
    "velocity": VelocityView(),
    "epsilon": EpsilonView(ddim().alphas_cumprod.double()),
    "v_prediction": EpsilonView(ddim().alphas_cumprod.double(), "v_prediction"),
    "sample": EpsilonView(ddim().alphas_cumprod.double(), "sample"),
    "edm": EdmView(),
}


def levels(view, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ of x = α data + σ noise, [B, 1, 1, 1]."""
    if isinstance(view, VelocityView):
        level = (timestep.double() / 1000).view(-1, 1, 1, 1)
        return 1 - level, level
    if isinstance(view, EdmView):
        c_in = (view.sigma(timestep) ** 2 + view.sigma_data**2).rsqrt()
        return c_in, c_in * view.sigma(timestep)
    return view.alpha_sigma(timestep)


def expected_data(view, x: Tensor, timestep: Tensor, mean: float, deviation: float) -> Tensor:
    """E[data | x] where data are N(mean, deviation²)."""
    alpha, sigma = levels(view, timestep)
    variance = alpha**2 * deviation**2 + sigma**2
    return mean + alpha * deviation**2 / variance * (x - alpha * mean)


def knowing(view, mean: float, deviation: float) -> Teacher:
    """The network that has learned N(mean, deviation²), for any prompt."""

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        alpha, sigma = levels(view, timestep)
        data = expected_data(view, x.double(), timestep, mean, deviation)
        return view.target((x - alpha * data) / sigma, data, timestep)  # each of its targets is linear in both

    return lambda prompts: predict


class Scale(nn.Module):
    """A generator with two parameters: data = mean + deviation noise, whatever the view and the prompt."""

    def __init__(self, mean: float = 0.0, deviation: float = 1.0) -> None:
        super().__init__()
        self.mean, self.deviation = (
            nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (mean, deviation)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mean + self.deviation * x


class Asked(nn.Module):
    """A network of no parameters, called as a U-Net is."""

    def forward(self, x: Tensor, timestep: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        return (torch.sin(x),)


# --- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("share", [0.0405, 0.3005, 0.7005, 0.9605])
def test_the_surrogate_s_gradient_is_that_of_the_kl_divergence_of_gaussians(view, share):
    """Both integrals, over the generator's noise and the noising's, are exact: Gauss-Hermite quadrature."""
    nodes, masses = np.polynomial.hermite_e.hermegauss(12)
    masses = masses / masses.sum()
    z, fresh = (torch.from_numpy(part.reshape(-1, 1, 1, 1)) for part in np.meshgrid(nodes, nodes))
    mass = torch.from_numpy(np.outer(masses, masses).reshape(-1))
    generator, timestep = Scale(-0.4, 1.3), view.timestep(torch.full((len(z),), share).double())
    alpha, sigma = levels(view, timestep)
    made = generator(z)
    x = view.noised(fresh, made.detach(), timestep)
    real = expected_data(view, x, timestep, MEAN, DEVIATION)
    fake = expected_data(view, x, timestep, -0.4, 1.3)
    direction = matching_direction(made.detach(), real, fake)
    distance = (made.detach() - real).abs()
    torch.testing.assert_close(direction * distance, fake - real)
    # α (s_fake - s_real) = (α / σ)² (μ_fake - μ_real), each point with its mass
    weight = (alpha / sigma) ** 2 * distance
    (matching_loss(made, direction * weight * mass.view(-1, 1, 1, 1)) * len(z)).backward()

    mean, deviation = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-0.4, 1.3))
    a, s = (part.flatten()[0] for part in (alpha, sigma))
    own, other = (a * deviation) ** 2 + s**2, (a * DEVIATION) ** 2 + s**2
    divergence = 0.5 * (own / other + (a * (mean - MEAN)) ** 2 / other - 1 + torch.log(other / own))
    divergence.backward()
    torch.testing.assert_close(generator.mean.grad, mean.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(generator.deviation.grad, deviation.grad, rtol=1e-8, atol=1e-10)


def test_a_sample_at_its_end_gets_a_finite_direction():
    x = torch.zeros(2, 3, 4, 4)
    assert torch.equal(matching_direction(x, x, x), x)
    assert matching_direction(x, x, x + 1).isfinite().all()
    assert matching_direction(x, x + 2, x + 3).eq(0.5).all()  # one sample's distance is its own
    apart = torch.stack([x[0] + 1, x[1] + 10])
    assert torch.equal(matching_direction(x, apart, apart + 1)[:, 0, 0, 0], torch.tensor([1.0, 0.1]))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_the_loss_asks_both_scores_at_the_same_place_and_in_the_range(view):
    numbers = draws(0, "dmd/", 0, 64)
    seen = []

    def watched(teacher):
        def of(prompts):
            predict = teacher(prompts)
            return lambda x, timestep: (seen.append((x, timestep, prompts)), predict(x, timestep))[1]

        return of

    loss = matching(view, real=watched(knowing(view, MEAN, DEVIATION)), fake=watched(knowing(view, -0.4, 1.3)))
    made, fresh = (noise(64, seed=seed).double() for seed in (1, 2))
    found = loss.direction(made, fresh, ["x"] * 64, numbers)
    (x, timestep, prompts), (other, other_timestep, _) = seen
    assert torch.equal(x, other) and torch.equal(timestep, other_timestep) and prompts == ["x"] * 64
    low, high = view.timestep(torch.tensor([0.02, 0.98]))
    assert low <= timestep.min() < timestep.max() <= high
    share = torch.as_tensor(0.02 + 0.96 * numbers[:, TIME], dtype=torch.float32)
    assert torch.equal(timestep, view.timestep(share))
    torch.testing.assert_close(x, view.noised(fresh, made, timestep))
    real, fake = (expected_data(view, x, timestep, *of) for of in ((MEAN, DEVIATION), (-0.4, 1.3)))
    torch.testing.assert_close(found, matching_direction(made, real, fake), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_halves_of_a_direction_are_subtracted_in_double_precision(view):
    """What the scores' outputs mean is computed from them, bit for bit, as if nothing were rounded before the end."""
    told = []
    if isinstance(view, EpsilonView):  # as a folder's schedule is
        view = replace(view, alphas_cumprod=view.alphas_cumprod.float())

    def rounded(teacher):
        def of(prompts):
            def predict(x, timestep):
                told.append((x, timestep, teacher(prompts)(x.double(), timestep).float()))
                return told[-1][2]

            return predict

        return of

    scores = {"real": rounded(knowing(view, MEAN, DEVIATION)), "fake": rounded(knowing(view, -0.4, 1.3))}
    made, fresh = noise(64, seed=1), noise(64, seed=2)
    found = matching(view, **scores).direction(made, fresh, ["x"] * 64, draws(0, "dmd/", 0, 64))
    real, fake = (view.predicted_data(x.double(), timestep, output.double()) for x, timestep, output in told)
    assert found.dtype == torch.float32 and told[0][0].dtype in (torch.float32, torch.float64)
    assert torch.equal(found, matching_direction(made.double(), real, fake).float())


def test_the_gradient_s_precision_near_the_last_timestep():
    """Where α is 0.07, an error of float32 in ε would be 15 times as large in the data."""
    view = VIEWS["epsilon"]
    x, timestep = noise(2), torch.tensor([979, 999])
    output = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    exact = view.predicted_data(x.double(), timestep, output.double())
    alpha, sigma = view.alpha_sigma(timestep)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, (x.double() - sigma * output.double()) / alpha, rtol=1e-14, atol=0)


def matching(view, *, real, fake, num_steps=1, unet=None, **options) -> MatchingLoss:
    generator = Generator(unet or Scale(), view, lambda prompts: {}, num_steps)
    return MatchingLoss(
        generator, prompts=PROMPTS, view=view, real=real, fake=fake, noise_range=(0.02, 0.98), **options
    )


# --- the fake score ---------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """output = slope(t) x + shift(t): the form of every network that has learned a Gaussian."""

    def __init__(self, view) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = view.timestep(torch.tensor([0.0, 1.0])).double()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2)).double()

    def forward(self, x: Tensor, timestep: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        place = 2 * (timestep.double() - self.first) / (self.last - self.first) - 1
        slope, shift = self.net(place.view(-1, 1)).view(-1, 2, 1, 1, 1).unbind(1)
        return (slope * x + shift,)


@pytest.mark.parametrize("kind", ["velocity", "epsilon", "v_prediction", "edm"])
def test_the_fake_score_comes_to_know_a_fixed_generator(kind):
    view, mean, deviation = VIEWS[kind], -0.4, 0.6 if kind == "edm" else 1.3  # an EDM is scaled for data of 0.5
    network = Linear(view)
    loss = FakeScoreLoss(
        network, view, lambda prompts: {}, lambda noise, numbers: (mean + deviation * noise[:, 0], [""] * len(noise))
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    generator = torch.Generator().manual_seed(0)
    for step in range(1000):
        values = torch.randn(256, 2, 1, 1, 1, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss(values, None, [], draws(0, "fake", step, 256)).backward()
        optimizer.step()
        schedule.step()
    timestep = view.timestep(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    x = torch.linspace(-2, 2, 5).double().view(-1, 1, 1, 1)
    found = network(x, timestep, return_dict=False)[0]
    expected = knowing(view, mean, deviation)([])(x, timestep)
    assert (found - expected).abs().max() < 0.06


# --- real networks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("dmd") / "teacher")


def losses(place, *, gan=True, num_steps=1, regression=None, gan_weight=0.3) -> SimpleNamespace:
    """A generator and a fake score that ask each other, with a frozen teacher, all from the same small model."""
    model, teacher, fake = (load(place) for _ in range(3))
    view = model.view()
    discriminator = None
    if gan:
        torch.manual_seed(1)
        config = fake.unet.config
        discriminator = Discriminator(config.block_out_channels[-1], config.norm_num_groups)
    made = {}
    fake_score = FakeScoreLoss(
        fake.unet, view, fake.encode, lambda *given: made["loss"].generate(*given), discriminator, weight=0.5
    )
    made["loss"] = MatchingLoss(
        Generator(model.unet, view, model.encode, num_steps),
        prompts=PROMPTS,
        view=view,
        real=predictor(teacher, 3.0),
        fake=predictor(fake, 1.0),
        noise_range=(0.02, 0.98),
        regression=regression,
        judged=fake_score.judged if gan else None,
        gan_weight=gan_weight if gan else 0.0,
    )
    model.unet.requires_grad_(True)
    fake.unet.requires_grad_(True)
    return SimpleNamespace(matching=made["loss"], fake=fake_score, teacher=teacher, model=model, view=view)


def predictor(model, scale: float) -> Teacher:
    def of(prompts):
        text = model.conditioning(prompts, scale)
        return lambda x, timestep: model.guided(x, timestep, text, scale)

    return of


def stacked_noise(count: int, num_steps: int = 1, seed: int = 0) -> Tensor:
    return torch.stack([noise(count, seed=seed + place) for place in range(num_steps + 1)], 1)


def gradients(module: nn.Module) -> dict[str, bool]:
    return {name: value.grad is not None and bool(value.grad.any()) for name, value in module.named_parameters()}


def test_neither_loss_gives_the_other_network_a_gradient(place):
    made = losses(place, regression=Regression(couplings="pairs", loss="l2"))
    numbers = draws(0, "dmd/", 0, 4)
    coupled, data = noise(4, seed=5), noise(4, seed=6)
    made.matching(stacked_noise(4), coupled, data, [*PROMPTS, "a seven"], numbers).backward()
    assert all(gradients(made.matching.unet).values())
    assert not any(gradients(made.fake).values()) and not any(gradients(made.teacher.unet).values())
    made.matching.unet.zero_grad()
    made.fake(stacked_noise(4), noise(4, seed=7), ["a seven"] * 4, numbers).backward()
    assert all(gradients(made.fake).values())
    assert not any(gradients(made.matching.unet).values()) and not any(gradients(made.teacher.unet).values())


def test_each_optimizer_steps_its_own_network_alone(place, tmp_path):
    """Under DeepSpeed: with one of the two learning rates next to nothing, that one's weights stay."""
    for name, rate, scale in (("generator", 1e-3, 1e-30), ("fake", 1e-33, 1e30)):
        made = losses(place)
        before = {part: weights_of(getattr(made, part)) for part in ("matching", "fake")}
        phase = MatchingPhase(samples=8, global_batch_size=4, learning_rate=rate)
        trained = train(job(made, [phase], scale), folder_of(tmp_path / name), lambda: False)
        after = {part: weights_of(getattr(made, part)) for part in ("matching", "fake")}
        changed = {
            part: any((value - before[part][key]).abs().max() > 1e-20 for key, value in weights.items())
            for part, weights in after.items()
        }
        assert changed == {"matching": name == "generator", "fake": name == "fake"}
        assert trained.samples_seen == 8


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


RESTING = MatchingPhase(samples=4, global_batch_size=4, learning_rate=1e-3, gan_weight=0.0)
AWAKE = MatchingPhase(samples=4, global_batch_size=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def by_hand(place) -> dict[str, dict[str, Tensor]]:
    """AdamW's state of both networks, each stepped by PyTorch alone on the gradient of its own loss."""
    made = losses(place)
    trained = job(made, [RESTING, AWAKE, RESTING])
    both = {"optimizer": (made.matching, trained.batch), "critic-optimizer": (made.fake, trained.critic.batch)}
    keys = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": trained.settings.weight_decay}
    optimizers = {name: torch.optim.AdamW(loss.parameters(), **keys) for name, (loss, _) in both.items()}

    def update(name: str, stream: str, start: int) -> None:
        loss, batch = both[name]
        parameters, numbers = list(loss.parameters()), draws(0, stream, start, 4)
        found = torch.autograd.grad(loss(*batch(start, 4), numbers), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 2.5)
        optimizers[name].step()

    for position, phase in zip((0, 4, 8), trained.phases, strict=True):
        trained.begin(phase)
        for start in (2 * position, 2 * position + 4):
            update("critic-optimizer", "2rf/fit/critic", start)
        update("optimizer", "2rf/fit", position)
    return {
        name: {
            f"{key}/{part}": value
            for key, parameter in loss.named_parameters()
            for part, value in optimizers[name].state[parameter].items()
        }
        for name, (loss, _) in both.items()
    }


def saved_moments(run: Path, position: int) -> dict[str, dict[str, Tensor]]:
    folder = run / "2rf" / "checkpoints" / "fit" / f"{position:012d}"
    return {name: load_file(folder / f"{name}.safetensors") for name in ("optimizer", "critic-optimizer")}


@pytest.mark.parametrize(
    "settings",
    [{}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 2, "offload_optimizer": True}],
    ids=["0", "1", "2", "offloaded"],
)
def test_each_engine_s_moments_are_of_its_own_loss_and_of_what_is_awake(place, by_hand, tmp_path, settings):
    """Whatever the other engine has computed in between, and whoever rests: as if PyTorch took each step by itself."""
    trained = job(losses(place), [RESTING, AWAKE, RESTING], checkpoint_every=4, keep_checkpoints=3, **settings)
    train(trained, folder_of(tmp_path), lambda: False)
    asleep, awake, found = (saved_moments(tmp_path, position) for position in (4, 8, 12))
    for name, state in by_hand.items():
        assert found[name].keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-2, atol=5e-4 * value.abs().max().item())
    for key, value in found["critic-optimizer"].items():
        if key.startswith("discriminator."):
            assert not asleep["critic-optimizer"][key].any() and torch.equal(value, awake["critic-optimizer"][key])
        if key.endswith("/step"):
            assert value == (2 if key.startswith("discriminator.") else 6)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_leaves_the_other_engine_s_moments_as_they_are(place, tmp_path, monkeypatch, stage):
    engines, stepped = [], []

    class Watched(Engine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            engines.append(self)

        def step(self, learning_rate: float) -> float:
            before = [state_of(engine) for engine in engines]
            norm = super().step(learning_rate)
            changed = [
                {key for key, value in state_of(engine).items() if not torch.equal(value, old[key])}
                for engine, old in zip(engines, before, strict=True)
            ]
            mine = engines.index(self)
            assert changed[1 - mine] == set()
            assert {key for key in before[mine] if key.endswith("/step")} <= changed[mine]
            assert any(key.endswith("/exp_avg") for key in changed[mine])
            assert any(key.endswith("/exp_avg_sq") for key in changed[mine])
            stepped.append(mine)
            return norm

    def state_of(engine: Engine) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in engine.optimizer_state()}

    monkeypatch.setattr(loop, "Engine", Watched)
    phases = [AWAKE, AWAKE]
    train(job(losses(place), phases, zero_stage=stage), folder_of(tmp_path), lambda: False)
    assert stepped == [1, 1, 0, 1, 1, 0]


def job(made: SimpleNamespace, phases: list[MatchingPhase], scale: float = 1.0, **settings) -> Job:
    def batch(position: int, size: int) -> tuple:
        return stacked_noise(size, seed=position), None, None, []

    def critic_batch(position: int, size: int) -> tuple:
        return stacked_noise(size, seed=1000 + position), noise(size, seed=2000 + position), ["a seven"] * size

    def begin(phase: MatchingPhase) -> None:
        made.matching.begin(phase)
        discriminator.rests = not made.matching.gan_weight

    plain = job_of(made.matching, phases=phases, batch=batch, begin=begin, trackers=[], **settings)

    def describe(position: int, size: int) -> str:
        return f"the critic's samples {position} to {position + size - 1}"

    discriminator = made.fake.discriminator
    critic = Critic(made.fake, critic_batch, describe, updates=2, learning_rate_scale=scale, at_times=discriminator)
    return Job(**{**vars(plain), "critic": critic, "means": [made.matching.means, made.fake.means]})


def test_a_critic_s_loss_that_is_not_finite_names_what_the_critic_saw(place, tmp_path):
    """The third of its batches, two for each of the generator's."""
    made = losses(place)
    trained = job(made, [MatchingPhase(samples=8, global_batch_size=4, learning_rate=1e-3)])
    given = trained.critic.batch

    def batch(position: int, size: int) -> tuple:
        drawn, *others = given(position, size)
        return (drawn * math.nan if position == 8 else drawn, *others)

    broken = Job(**{**vars(trained), "critic": Critic(**{**vars(trained.critic), "batch": batch})})
    with pytest.raises(InstaFlowError, match="the critic's loss is nan at 4 samples, on the critic's samples 8 to 11;"):
        train(broken, folder_of(tmp_path), lambda: False)


def test_what_the_discriminator_says_to_the_generator_is_its_own_gradient(place):
    made = losses(place)
    numbers, fresh = draws(0, "dmd/", 0, 3), noise(3, seed=9)
    data = noise(3, seed=8).requires_grad_()
    value, found = made.fake.judged(data, fresh, PROMPTS, numbers)
    timestep = made.view.timestep(torch.as_tensor(numbers[:, TIME], dtype=torch.float32))
    seen = []
    handle = made.fake.unet.mid_block.register_forward_hook(lambda *call: seen.append(call[2]))
    x = made.view.noised(fresh, data, timestep)
    made.fake.unet(x, timestep, **made.model.encode(PROMPTS))
    handle.remove()
    expected = functional.softplus(-made.fake.discriminator(seen[0])).mean()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(found, torch.autograd.grad(expected, data)[0])
    assert found.abs().max() > 0
    held = bottleneck(made.fake.unet, x, timestep, made.model.encode(PROMPTS))
    torch.testing.assert_close(held, seen[0])
    assert not made.fake.unet.mid_block._forward_hooks


def test_the_whole_loss_is_the_sum_of_its_terms(place):
    made = losses(place, regression=Regression(couplings="pairs", loss="l2", weight=0.25))
    numbers, start = draws(0, "dmd/", 0, 4), stacked_noise(4)
    coupled, data = noise(2, seed=5), noise(2, seed=6)
    whole = made.matching(start, coupled, data, PROMPTS[:2], numbers)
    prompts, steps = made.matching.asked(numbers)
    assert prompts == [PROMPTS[int(3 * number)] for number in numbers[:, PROMPT]] and steps.eq(0).all()
    with torch.no_grad():
        last = torch.full((4,), 999)
        x = made.view.one_step(start[:, 0], made.model.unet(start[:, 0], last, **made.model.encode(prompts))[0])
        y = made.view.one_step(coupled, made.model.unet(coupled, last[:2], **made.model.encode(PROMPTS[:2]))[0])
        matched = 0.5 * made.matching.direction(x, start[:, 1], prompts, numbers).square().mean()
        regressed = (y - data).square().mean()
        told, _ = made.fake.judged(x, start[:, 1], prompts, numbers)
    torch.testing.assert_close(whole.detach(), matched + 0.25 * regressed + 0.3 * told, rtol=1e-4, atol=1e-5)
    means = dict(zip(made.matching.means.names, made.matching.means.total()[0].tolist(), strict=True))
    assert means == pytest.approx(
        {"matching_loss": float(matched), "regression_loss": float(regressed), "gan_loss": float(told)}, rel=1e-4
    )
    made.matching.begin(MatchingPhase(samples=4, global_batch_size=4, learning_rate=1.0, regression_weight=2.0))
    heavier = made.matching(start, coupled, data, PROMPTS[:2], numbers)
    torch.testing.assert_close(heavier.detach(), whole.detach() + 1.75 * regressed, rtol=1e-4, atol=1e-5)
    made.matching.begin(MatchingPhase(samples=4, global_batch_size=4, learning_rate=1.0, gan_weight=0.0))
    without = made.matching(start, coupled, data, PROMPTS[:2], numbers)
    torch.testing.assert_close(without.detach(), whole.detach() - 0.3 * told, rtol=1e-4, atol=1e-5)


def test_matched_pairs_weigh_as_much_as_any_other_sample(place):
    regression = Regression(couplings="pairs", loss="lpips", weight=0.0, share=0.5, matched=True)
    made = losses(place, gan=False, regression=regression)
    made.matching.distance = lambda *given: pytest.fail("what has no weight is measured")
    numbers, start, coupled = draws(0, "dmd/", 0, 4), stacked_noise(4), noise(2, seed=5)
    whole = made.matching(start, coupled, noise(2, seed=6), PROMPTS[:2], numbers)
    prompts, _ = made.matching.asked(numbers)
    with torch.no_grad():
        x = made.matching.generator(start[:, :-1], prompts, torch.zeros(4).long())
        y = made.matching.generator(coupled[:, None], PROMPTS[:2], torch.zeros(2).long())
        own = made.matching.direction(x, start[:, 1], prompts, numbers)
        pairs = made.matching.direction(y, start[::2, 1], PROMPTS[:2], numbers[::2])
    torch.testing.assert_close(whole.detach(), 0.5 * torch.cat([own, pairs]).square().mean(), rtol=1e-4, atol=1e-5)


class Cropped:
    """Stands for a perceptual distance: a mean square that is as large as the draws of the crop say."""

    def __call__(self, made: Tensor, data: Tensor, draws: np.ndarray) -> Tensor:
        return torch.as_tensor(draws[:, CROP].sum(1)).float() * (made - data).square().mean((1, 2, 3))


def test_a_perceptual_regression_is_a_mean_over_pairs_each_with_the_draws_of_a_sample_of_its_own():
    view = VIEWS["velocity"]
    of = Regression(couplings="pairs", loss="lpips", weight=0.25)
    scores = {"real": knowing(view, MEAN, DEVIATION), "fake": knowing(view, -0.4, 1.3)}
    loss = matching(view, **scores, regression=of, distance=Cropped(), unet=Asked())
    numbers, start, coupled, data = draws(0, "dmd/", 0, 6), stacked_noise(6), noise(3, seed=5), noise(3, seed=6)
    whole = loss(start, coupled, data, PROMPTS, numbers)
    alone = loss(start, None, None, [], numbers)
    made = view.one_step(coupled, torch.sin(coupled))
    each = [
        numbers[row, CROP].sum() * (made[place] - data[place]).square().mean() for place, row in enumerate((0, 2, 4))
    ]
    torch.testing.assert_close(whole - alone, 0.25 * torch.stack(each).mean(), rtol=1e-4, atol=0)


def test_the_discriminator_s_loss_is_of_real_images_with_their_captions_and_made_ones_with_their_prompts(place):
    made = losses(place)
    numbers, start, real, captions = draws(0, "dmd/", 0, 3), stacked_noise(3), noise(3, seed=7), PROMPTS[::-1]
    whole = made.fake(start, real, captions, numbers)
    data, prompts = made.matching.generate(start[:, :-1], numbers)
    assert prompts != captions
    timestep, fresh = made.fake.timestep(numbers, start.device), start[:, 1]

    def seen(images, texts):
        held = []
        handle = made.fake.unet.mid_block.register_forward_hook(lambda *call: held.append(call[2]))
        output = made.fake.unet(made.view.noised(fresh, images, timestep), timestep, **made.model.encode(texts))[0]
        handle.remove()
        layers, head = made.fake.discriminator.layers, made.fake.discriminator.head
        return output, head(layers(held[0]).mean((2, 3))).squeeze(1)

    output, of_made = seen(data, prompts)
    _, of_real = seen(real, captions)
    denoising = (output - fresh).square().mean()
    telling = torch.log1p(of_made.exp()).mean() + torch.log1p((-of_real).exp()).mean()  # made ones to be told as such
    expected = denoising + 0.5 * telling
    torch.testing.assert_close(whole, expected)
    weight = made.fake.unet.conv_in.weight
    torch.testing.assert_close(torch.autograd.grad(whole, weight)[0], torch.autograd.grad(expected, weight)[0])


def test_the_generator_walks_to_what_the_discriminator_takes_for_real(place):
    made = losses(place)
    numbers, start = draws(0, "dmd/", 0, 4), stacked_noise(4)
    weight = made.model.unet.conv_out.weight

    def gradient(gan_weight: float) -> Tensor:
        made.matching.gan_weight = gan_weight
        return torch.autograd.grad(made.matching(start, None, None, [], numbers), weight)[0]

    found = gradient(2.0) - gradient(0.0)
    prompts, steps = made.matching.asked(numbers)
    data = made.matching.generator(start[:, :-1], prompts, steps)
    timestep = made.fake.timestep(numbers, data.device)
    features = bottleneck(
        made.fake.unet, made.view.noised(start[:, 1], data, timestep), timestep, made.model.encode(prompts)
    )
    loss = 2 * functional.softplus(-made.fake.discriminator(features)).mean()
    (expected,) = torch.autograd.grad(loss, weight)
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("kind", VIEWS)
def test_a_draw_next_to_one_is_the_last_timestep(kind):
    """As float32 it is 1; a run of millions of draws meets it."""
    view = VIEWS[kind]
    last, nearly = (view.timestep(torch.as_tensor([share]).float()) for share in (1 - 2.0**-12, 1 - 2.0**-26))
    assert view.noised(noise(1), noise(1, seed=1), nearly).isfinite().all()
    torch.testing.assert_close(nearly, last, rtol=1e-3, atol=0)
    assert nearly <= (math.log(80) / 4 + 1e-6 if kind == "edm" else 1000 if kind == "velocity" else 999)


# --- several steps ----------------------------------------------------------------------------------------------------


def test_each_sample_goes_to_its_own_step_and_has_the_gradient_of_that_one(place):
    made = losses(place, gan=False, num_steps=4)
    generator = made.matching.generator
    assert generator.timesteps.tolist() == [999, 749, 499, 249]
    start, steps = stacked_noise(3, 3), torch.tensor([2, 0, 1])
    found = generator(start, PROMPTS, steps)
    for row, wanted in enumerate(steps.tolist()):
        x, prompt = start[row : row + 1, 0], [PROMPTS[row]]
        for step in range(wanted + 1):
            timestep = generator.timesteps[step : step + 1]
            with torch.set_grad_enabled(step == wanted):
                output = made.model.unet(x, timestep, **made.model.encode(prompt))[0]
                data = made.view.predicted_data(x, timestep, output)
            if step < wanted:
                x = made.view.noised(start[row : row + 1, step + 1], data, generator.timesteps[step + 1 : step + 2])
        torch.testing.assert_close(found[row : row + 1], data, rtol=1e-4, atol=1e-4)
        (own,) = torch.autograd.grad(found[row].sum(), made.model.unet.conv_in.weight, retain_graph=True)
        (expected,) = torch.autograd.grad(data.sum(), made.model.unet.conv_in.weight)
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
    numbers = draws(0, "dmd/", 0, 4000)
    _, chosen = made.matching.asked(numbers)
    assert torch.equal(chosen, torch.as_tensor(numbers[:, STEP] * 4).long())
    assert np.bincount(chosen).min() > 900
    assert numbers.shape[1] == COLUMNS


def test_the_stock_sampler_of_several_steps_is_what_was_trained(place):
    made = losses(place, gan=False, num_steps=4)
    scheduler = few_step_scheduler(made.model.scheduler, 4)
    found = made.model.sample(noise(3), PROMPTS, num_steps=4, guidance_scale=1.0, scheduler=scheduler)
    between = [torch.randn(3, *one.shape, generator=generator_of(one)) for one in noise(3)]
    start = torch.cat([noise(3)[:, None], torch.stack(between)], 1)
    with torch.no_grad():
        expected = made.matching.generator(start, PROMPTS, torch.full((3,), 3))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
