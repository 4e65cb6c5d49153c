"""Progressive distillation against the paper's formulas, and on a Gaussian, whose flow is known."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instaflow.flow.straightness import euler
from instaflow.flow.views import EpsilonView, VelocityView
from instaflow.training.draws import draws
from instaflow.training.progressive import HalvingLoss
from tests.models.made import ddim, load, noise

MEAN, DEVIATION = 1.5, 0.4
VIEWS = {
    "velocity": VelocityView(),
    "epsilon": EpsilonView(ddim().alphas_cumprod.double()),
    "v_prediction": EpsilonView(ddim().alphas_cumprod.double(), "v_prediction"),
}
GRIDS = [2**power for power in range(10)] + [3, 5, 6, 7, 10, 12, 13, 20, 24, 25, 50, 100, 125, 250, 500]


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("num_steps", GRIDS)
def test_a_student_s_grid_is_every_other_point_of_its_teacher_s(view, num_steps):
    (timesteps, times), (own, own_times) = view.grid(2 * num_steps), view.grid(num_steps)
    assert torch.equal(timesteps[::2], own)
    torch.testing.assert_close(times[::2], own_times, rtol=0, atol=1e-12)


# --- networks of which everything is known ----------------------------------------------------------------------------


def as_output(view, x: Tensor, timestep: Tensor, velocity: Tensor) -> Tensor:
    """What a network answers to mean this velocity."""
    if isinstance(view, VelocityView):
        return -velocity
    alpha, sigma = view.alpha_sigma(timestep)
    epsilon = (x - alpha * velocity) / (alpha + sigma)
    return epsilon if view.prediction_type == "epsilon" else (epsilon - sigma * x) / alpha


def gaussian(view):
    """The network of the flow from noise to data of N(MEAN, DEVIATION²): v(z, t) = E[data - noise | z_t = z]."""

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        if isinstance(view, VelocityView):
            t = (1 - timestep.double() / 1000).view(-1, 1, 1, 1)
        else:
            t = view.times()[timestep].view(-1, 1, 1, 1)
        z = view.state(x, timestep)
        variance = (1 - t) ** 2 + (t * DEVIATION) ** 2
        slope = (t * DEVIATION**2 - (1 - t)) / variance
        return as_output(view, x, timestep, MEAN + slope * (z - t * MEAN))

    return predict


class Affine(nn.Module):
    """velocity = slope z + shift at each point of a grid, as a U-Net that is read by `view`."""

    def __init__(self, view, num_steps: int) -> None:
        super().__init__()
        self.view, self.known = view, view.grid(num_steps)[0]
        self.slope, self.shift = (nn.Parameter(torch.zeros(num_steps, dtype=torch.float64)) for _ in range(2))

    def forward(self, x, timestep, return_dict=False):
        place = (timestep[:, None] == self.known).long().argmax(1)
        assert torch.equal(self.known[place], timestep)  # no other timestep is asked for
        slope, shift = (values[place].view(-1, 1, 1, 1) for values in (self.slope, self.shift))
        return (as_output(self.view, x, timestep, slope * self.view.state(x, timestep) + shift),)


def halving(view, predict, num_steps: int) -> HalvingLoss:
    return HalvingLoss(Affine(view, num_steps), view, lambda prompts: {}, lambda prompts: predict, num_steps)


def minimise(loss: HalvingLoss) -> None:
    """Set the student to the minimiser: what the loss wants at 0 and at 1 makes the line."""
    step = torch.arange(loss.num_steps)
    at_0, at_1 = (
        loss.mean_velocity(torch.full((loss.num_steps, 1, 1, 1), value).double(), step, []).flatten()
        for value in (0.0, 1.0)
    )
    loss.unet.slope.data, loss.unet.shift.data = at_1 - at_0, at_0


def fresh(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise and data, both drawn anew."""
    both = torch.randn(2, count, 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return both[0], MEAN + DEVIATION * both[1]


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_one_step_after_exact_halvings_is_all_steps_of_the_teacher(view):
    start, predict = fresh(50)[0], gaussian(view)
    wanted = euler(view, predict, start, 16).states[-1]
    for num_steps in (8, 4, 2, 1):
        loss = halving(view, predict, num_steps)
        minimise(loss)
        student = loss.unet
        predict = lambda x, timestep, student=student: student(x, timestep)[0].detach()  # noqa: E731
        reached = euler(view, predict, start, num_steps).states[-1]
        torch.testing.assert_close(reached, wanted, rtol=0, atol=1e-10)
        value = loss(*fresh(64, seed=1), [], draws(0, "student", 0, 64))
        assert value.item() < 1e-18
    assert (euler(view, gaussian(view), start, 1).states[-1] - wanted).abs().max() > 0.1  # there is something to learn
    assert float(wanted.mean()) == pytest.approx(MEAN, abs=0.2)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_training_comes_to_where_the_teacher_s_two_steps_land(view):
    predict, size = gaussian(view), 256
    loss, start = halving(view, predict, 2), fresh(200, seed=1)[0]
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for count in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - count / 400)
        optimizer.zero_grad()
        loss(*fresh(size, seed=count), [], draws(0, "student", count * size, size)).backward()
        optimizer.step()
    reached = euler(view, lambda x, timestep: loss.unet(x, timestep)[0].detach(), start, 2).states[-1]
    wanted = euler(view, predict, start, 4).states[-1]
    torch.testing.assert_close(reached, wanted, rtol=0, atol=0.02)
    assert (euler(view, predict, start, 2).states[-1] - wanted).abs().max() > 0.05


# --- the paper's own terms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
def test_the_loss_is_the_paper_s_of_ddim(name):
    """Algorithm 2 in α and σ: two DDIM steps, the x̃ that one would need, and the truncated SNR weight."""
    view, num_steps, rows = VIEWS[name], 20, 80
    alphas = [*view.alphas_cumprod.sqrt().tolist(), 1.0]
    sigmas = [*(1 - view.alphas_cumprod).sqrt().tolist(), 0.0]
    timesteps = [*range(999, 0, -25), 1000]  # 40 steps, and the data, beyond them all

    def teacher(x, timestep):
        return 0.8 * torch.sin(1.3 * x) + 0.1 * timestep.view(-1, 1, 1, 1) / 1000

    def student(x, timestep, return_dict=False):
        return (0.7 * torch.cos(x),)

    def data_of(output, z, place):
        alpha, sigma = alphas[place], sigmas[place]
        return (z - sigma * output) / alpha if name == "epsilon" else alpha * z - sigma * output

    def ddim_step(output, z, place, after):
        data = data_of(output, z, place)
        return alphas[after] * data + sigmas[after] / sigmas[place] * (z - alphas[place] * data)

    start, data = fresh(rows)
    numbers = draws(0, "student", 0, rows)
    loss = HalvingLoss(nn.Module(), view, lambda prompts: {}, lambda prompts: teacher, num_steps)
    loss.unet.forward = student
    found, wanted, weights = loss(start, data, [], numbers), [], set()
    for row in range(rows):
        step = int(numbers[row, 0] * num_steps)
        here, middle, end = timesteps[2 * step : 2 * step + 3]
        x = alphas[here] * data[row : row + 1] + sigmas[here] * start[row : row + 1]
        x = start[row : row + 1] if step == 0 else x  # in sampling the first input is the noise
        half = ddim_step(teacher(x, torch.tensor([here])), x, here, middle)
        landed = ddim_step(teacher(half, torch.tensor([middle])), half, middle, end)
        ratio = sigmas[end] / sigmas[here]
        target = (landed - ratio * x) / (alphas[end] - ratio * alphas[here])
        weight = max(alphas[here] ** 2 / sigmas[here] ** 2, 1)
        made = data_of(student(x, None)[0], x, here)
        wanted.append(weight * (target - made).square().mean())
        weights.add(weight)
    assert len(weights) > 1 and max(weights) > 10
    torch.testing.assert_close(found, torch.stack(wanted).mean(), rtol=1e-9, atol=0)


def test_a_velocity_s_loss_by_hand():
    """SNR = (t / (1-t))², and a step of length dt goes dt (noise - data) back."""
    view, rows = VelocityView(), 30
    start, data = fresh(rows)
    numbers = draws(0, "student", 0, rows)
    loss = HalvingLoss(nn.Module(), view, lambda prompts: {}, lambda prompts: lambda x, timestep: torch.sin(x), 2)
    loss.unet.forward = lambda x, timestep, return_dict: (torch.cos(x),)
    found, wanted = loss(start, data, [], numbers), []
    times = [0.001 + 0.999 * place / 4 for place in range(5)]
    for row in range(rows):
        place = 2 * int(numbers[row, 0] * 2)
        t, middle, end = times[place : place + 3]
        z = start[row] if place == 0 else (1 - t) * start[row] + t * data[row]
        half = z - (middle - t) * torch.sin(z)
        landed = half - (end - middle) * torch.sin(half)
        target = ((1 - t) * landed - (1 - end) * z) / (end - t)  # the data on the line through both
        weight = max((t / (1 - t)) ** 2, 1)
        wanted.append(weight * (target - (z - (1 - t) * torch.cos(z))).square().mean())
    torch.testing.assert_close(found, torch.stack(wanted).mean(), rtol=1e-9, atol=0)
    step = (numbers[:, 0] * 2).astype(int)  # at t = 0.001, the noise, or 0.5005
    sums, counts = loss.by_time.total()
    assert counts.tolist() == [(step == 0).sum(), 0, 0, 0, 0, (step == 1).sum(), 0, 0, 0, 0]
    assert sums[0].item() == pytest.approx(sum(value for value, place in zip(wanted, step, strict=True) if place == 0))


# --- what is trained, and what is not ---------------------------------------------------------------------------------


def test_only_the_student_is_trained_saved_and_given_gradients(folders):
    model, teacher = load(folders["epsilon"]), load(folders["epsilon"])
    model.unet.requires_grad_(True)

    def teach(prompts):
        text = teacher.encode(prompts)
        return lambda x, timestep: teacher.unet(x, timestep, **text, return_dict=False)[0]

    loss = HalvingLoss(model.unet, model.view(), model.encode, teach, 2)
    assert {name.removeprefix("unet.") for name in loss.state_dict()} == set(model.unet.state_dict())
    loss.train()
    loss(noise(3), noise(3, seed=1), ["a seven"] * 3, draws(0, "student", 0, 3)).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.unet.parameters())
    assert all(weight.grad is None for weight in teacher.unet.parameters()) and not teacher.unet.training
    assert loss.by_time.total()[1].sum() == 3


def test_each_grid_point_is_visited_as_often():
    view, seen = VelocityView(), []
    loss = halving(view, gaussian(view), 4)
    loss.mean_velocity = lambda z, step, prompts: (seen.append(step), z)[1]
    loss(*fresh(4000), [], draws(0, "student", 0, 4000))
    np.testing.assert_allclose(np.bincount(seen[0]) / 4000, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 4000))
