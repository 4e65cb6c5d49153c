"""The losses against their formulas by hand, and against one step of the stock sampler."""

import numpy as np
import pytest
import torch
from torch import nn

from instaflow.flow.views import EpsilonView, VelocityView
from instaflow.models.samplers import flow_scheduler
from instaflow.sections import FlowPhase
from instaflow.training.draws import draws
from instaflow.training.losses import DistillLoss, RectifiedDiffusionLoss, ReflowLoss, pseudo_huber
from instaflow.training.perceptual import PerceptualDistance, PerceptualNetwork, small_layers
from tests.models.made import ddim, load, noise, teacher_scheduler, write_model

PROMPTS = ["the digit 7", "an odd digit", "a digit"]


class Recorder(nn.Module):
    """A network of one weight that remembers what it was fed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))
        self.calls = []

    def forward(self, x, timestep, encoder_hidden_states, return_dict):
        self.calls.append((x, timestep))
        return (self.weight * torch.sin(x) + encoder_hidden_states.mean((1, 2))[:, None, None, None],)


class Encoder:
    def __init__(self):
        self.seen = []

    def __call__(self, prompts):
        self.seen += prompts
        return {"encoder_hidden_states": torch.tensor([[[float(len(prompt or ""))]] for prompt in prompts]) / 10}


def numbers(times, dropout=0.5):
    return np.array([[t, dropout] for t in times])


def test_reflow_of_a_velocity_by_hand():
    unet, encode = Recorder(), Encoder()
    start, data = noise(3), noise(3, seed=1)
    loss = ReflowLoss(unet, VelocityView(), encode, 0.1)(start, data, PROMPTS, numbers([0.0, 0.3, 0.99]))
    t = torch.tensor([0.0, 0.3, 0.99]).view(3, 1, 1, 1)
    x = t * data + (1 - t) * start
    lengths = torch.tensor([11.0, 12.0, 7.0]).view(3, 1, 1, 1) / 10
    output = 0.3 * torch.sin(x) + lengths
    expected = ((data - start) - (-output)).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(unet.calls[0][0], x)
    torch.testing.assert_close(unet.calls[0][1], torch.tensor([999.0, 700.0, 10.0]))
    loss.backward()
    assert unet.weight.grad.abs() > 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_reflow_of_a_diffusion_by_hand(prediction_type):
    unet, start, data = Recorder(), noise(3), noise(3, seed=1)
    view = EpsilonView(ddim().alphas_cumprod, prediction_type)
    loss = ReflowLoss(unet, view, Encoder(), 0.0)(start, data, PROMPTS, numbers([0.0, 0.5, 0.9999]))
    alpha_bar = ddim().alphas_cumprod.double()
    times = alpha_bar.sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())
    wanted = times[999] + (times[0] - times[999]) * torch.tensor([0.0, 0.5, 0.9999], dtype=torch.float64)
    timestep = (times[:, None] - wanted).abs().argmin(0)
    assert timestep.tolist() == unet.calls[0][1].tolist() and timestep[0] == 999
    a = alpha_bar[timestep].sqrt().view(3, 1, 1, 1)
    s = (1 - alpha_bar[timestep]).sqrt().view(3, 1, 1, 1)
    x = a * data + s * start
    x[0] = start[0]  # at the last timestep, the noise itself
    output = 0.3 * torch.sin(x) + torch.tensor([11.0, 12.0, 7.0]).view(3, 1, 1, 1) / 10
    epsilon = output if prediction_type == "epsilon" else s * x + a * output
    read = (x - s * epsilon) / a - epsilon
    torch.testing.assert_close(loss.double(), (data - start - read).square().mean(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["l2", "pseudo-huber", "lpips"])
def test_rectified_diffusion_by_hand(prediction_type, kind):
    """The teacher's own training, on paired noise: x_τ of the DDPM schedule, and the loss on the predicted data."""
    unet, start, data = Recorder(), noise(3), noise(3, seed=1)
    view = EpsilonView(ddim().alphas_cumprod, prediction_type)
    loss = RectifiedDiffusionLoss(unet, view, Encoder(), 0.0, Squares())
    loss.begin(FlowPhase(samples=3, global_batch_size=3, learning_rate=1.0, loss=kind))
    found = loss(start, data, PROMPTS, numbers([0.0, 0.7496, 0.9999]))
    timestep = torch.tensor([999, 250, 0])
    assert unet.calls[0][1].tolist() == timestep.tolist()
    x = ddim().add_noise(data, start, timestep)
    x[0] = start[0]  # as in sampling
    torch.testing.assert_close(unet.calls[0][0], x, rtol=1e-5, atol=1e-5)
    x = x.double()
    alpha_bar = ddim().alphas_cumprod.double()[timestep].view(3, 1, 1, 1)
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    output = 0.3 * torch.sin(x) + torch.tensor([11.0, 12.0, 7.0]).view(3, 1, 1, 1) / 10
    predicted = (x - s * output) / a if prediction_type == "epsilon" else a * x - s * output
    misses = predicted - data
    expected = {
        "l2": misses.square(),
        "pseudo-huber": (misses.square() + 0.001**2).sqrt() - 0.001,
        "lpips": misses.square() / 2,  # whatever the time
    }[kind]
    torch.testing.assert_close(found.double(), expected.mean(), rtol=1e-4, atol=1e-5)


def test_rectified_diffusion_visits_every_timestep_equally_often():
    loss = RectifiedDiffusionLoss(Recorder(), EpsilonView(ddim().alphas_cumprod), Encoder(), 0.0)
    middles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.equal(loss.times(middles), loss.view.times().flip(0))


def test_rectified_diffusion_has_no_velocity_to_train():
    with pytest.raises(ValueError, match="a diffusion's network"):
        RectifiedDiffusionLoss(Recorder(), VelocityView(), Encoder(), 0.0).times(torch.zeros(1))


def test_dropped_captions_are_no_prompt():
    encode = Encoder()
    loss = ReflowLoss(Recorder(), VelocityView(), encode, 0.25)
    columns = np.array([[0.5, 0.2], [0.5, 0.25], [0.5, 0.3]])
    loss(noise(3), noise(3, seed=1), PROMPTS, columns)
    assert encode.seen == [None, "an odd digit", "a digit"]


def test_the_share_of_dropped_captions():
    encode, size = Encoder(), 500
    loss = ReflowLoss(Recorder(), VelocityView(), encode, 0.1)
    start = torch.zeros(size, 1, 1, 1)
    for position in range(0, 20 * size, size):
        loss(start, start, ["a digit"] * size, draws(0, "2rf/", position, size))
    share = encode.seen.count(None) / len(encode.seen)
    assert abs(share - 0.1) < 4 * np.sqrt(0.1 * 0.9 / len(encode.seen))
    encode.seen.clear()
    ReflowLoss(Recorder(), VelocityView(), encode, 0.0)(start, start, ["a digit"] * size, draws(0, "2rf/", 0, size))
    assert None not in encode.seen


@pytest.mark.parametrize(
    ("parametrization", "prediction_type"),
    [("velocity", "epsilon"), ("epsilon", "epsilon"), ("epsilon", "v_prediction")],
)
def test_distillation_is_the_error_of_one_stock_step(tmp_path, parametrization, prediction_type):
    scheduler = flow_scheduler(parametrization, teacher_scheduler(prediction_type=prediction_type))
    model = load(write_model(tmp_path / "model", scheduler, kind="student", parametrization=parametrization))
    start, data = noise(3), noise(3, seed=1)
    loss = DistillLoss(model.unet, model.view(), model.encode)(start, data, PROMPTS, None)
    sample = model.sample(start, PROMPTS, num_steps=1, guidance_scale=1.0)  # by the folder's stock scheduler
    torch.testing.assert_close(loss, (sample - data).square().mean(), rtol=1e-5, atol=1e-5)


def test_a_loss_trains_the_network_and_nothing_else(folders):
    model = load(folders["velocity"])
    loss = ReflowLoss(model.unet, model.view(), model.encode, 0.1)
    own = {name.removeprefix("unet.") for name in loss.state_dict()}
    assert own == set(model.unet.state_dict())


# --- the other losses -------------------------------------------------------------------------------------------------


def phase(loss):
    return FlowPhase(samples=8, global_batch_size=4, learning_rate=1e-3, loss=loss)


class Squares:
    """Stands for a perceptual distance: half the mean square of what is between."""

    def __call__(self, latents, targets, draws):
        self.draws = draws
        return (latents - targets).square().mean((1, 2, 3)) / 2


def huber(error):
    """As 2-rectified flow++ has it, of one sample, in float64."""
    error = error.double()
    d = error.numel()
    return ((error.square().sum() + (0.00054 * d) ** 2).sqrt() - 0.00054 * d) / d


def test_pseudo_huber_by_hand():
    errors = noise(3) * torch.tensor([1e-6, 1e-2, 30.0]).view(3, 1, 1, 1)
    expected = torch.stack([huber(error) for error in errors])
    torch.testing.assert_close(pseudo_huber(errors.double()).flatten(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(pseudo_huber(errors).flatten().double(), expected, rtol=1e-5, atol=0)


def test_a_phase_says_how_a_student_is_measured():
    start, data, numbers = noise(3), noise(3, seed=1), draws(0, "student/", 0, 3)
    distance = Squares()
    loss = DistillLoss(Recorder(), VelocityView(), Encoder(), distance)
    output = 0.3 * torch.sin(start) + torch.tensor([11.0, 12.0, 7.0]).view(3, 1, 1, 1) / 10
    errors = start - 0.999 * output - data
    expected = {
        "l2": errors.square().mean(),
        "pseudo-huber": torch.stack([huber(error) for error in errors]).mean().float(),
        "lpips": errors.square().mean() / 2,
    }
    torch.testing.assert_close(loss(start, data, PROMPTS, numbers), expected["l2"])  # before any phase
    for name, value in expected.items():
        loss.begin(phase(name))
        torch.testing.assert_close(loss(start, data, PROMPTS, numbers), value)
    assert distance.draws is numbers


def test_a_perceptual_distance_is_not_trained_with_the_network(folders):
    model = load(folders["velocity"])
    network = PerceptualNetwork(small_layers([3, 8], [1]), [2], of_imagenet=False)
    loss = DistillLoss(model.unet, model.view(), model.encode, PerceptualDistance(model.vae, network))
    assert {name.removeprefix("unet.") for name in loss.state_dict()} == set(model.unet.state_dict())
    model.unet.requires_grad_(True)
    loss.begin(phase("lpips"))
    loss(noise(3), noise(3, seed=1), PROMPTS, draws(0, "student/", 0, 3)).backward()
    assert all(weight.grad.isfinite().all() for weight in model.unet.parameters())
    assert sum(float(weight.grad.abs().sum()) for weight in model.unet.parameters()) > 0
    assert all(weight.grad is None for weight in [*model.vae.parameters(), *network.parameters()])


# --- time densities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", ["u-shaped", "logit-normal"])
def test_a_velocity_flow_visits_the_density_s_times(density):
    unet, u = Recorder(), np.array([0.0, 0.1, 0.5, 0.9])
    loss = ReflowLoss(unet, VelocityView(), Encoder(), 0.0, time_density=density)
    loss(noise(4), noise(4, seed=1), ["a digit"] * 4, numbers(u))
    t = {
        "u-shaped": 0.5 + np.arcsinh((2 * u - 1) * np.sinh(2)) / 4,
        "logit-normal": np.array([0, 1 / (1 + np.exp(1.2815515655)), 0.5, 1 / (1 + np.exp(-1.2815515655))]),
    }[density]
    np.testing.assert_allclose(unet.calls[0][1].numpy(), np.minimum(1000 * (1 - t), 999), rtol=1e-6)


def test_an_epsilon_flow_visits_the_density_over_the_teacher_s_range():
    unet, u = Recorder(), np.array([0.0, 0.1, 0.5, 0.9])
    view = EpsilonView(ddim().alphas_cumprod)
    loss = ReflowLoss(unet, view, Encoder(), 0.0, time_density="u-shaped")
    loss(noise(4), noise(4, seed=1), ["a digit"] * 4, numbers(u))
    alpha_bar = ddim().alphas_cumprod.double().numpy()
    known = np.sqrt(alpha_bar) / (np.sqrt(alpha_bar) + np.sqrt(1 - alpha_bar))
    t = known[-1] + (known[0] - known[-1]) * (0.5 + np.arcsinh((2 * u - 1) * np.sinh(2)) / 4)
    assert unet.calls[0][1].tolist() == [int(np.abs(known - time).argmin()) for time in t]


# --- what 2-rectified flow++ minimises --------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrization", ["velocity", "epsilon"])
@pytest.mark.parametrize("name", ["l2", "pseudo-huber", "lpips", "lpips-huber"])
def test_reflow_losses_by_hand(parametrization, name):
    """In the paper's own terms, where t is 0 at the data: z = (1-t) x + t z', target z' - x, x̂ = z - t pred."""
    view = VelocityView() if parametrization == "velocity" else EpsilonView(ddim().alphas_cumprod)
    unet, start, data = Recorder(), noise(4), noise(4, seed=1)
    loss, u = ReflowLoss(unet, view, Encoder(), 0.0, Squares()), [0.05, 0.3, 0.5, 0.9]
    loss.begin(phase(name))
    found = loss(start, data, [*PROMPTS, ""], numbers(u))
    ((x, timestep),) = unet.calls
    lengths = torch.tensor([11.0, 12.0, 7.0, 0.0]).view(4, 1, 1, 1) / 10
    output = (0.3 * torch.sin(x) + lengths).double()
    losses = []
    for row in range(4):
        if parametrization == "velocity":
            t = 1 - u[row]
            z, pred = (1 - t) * data[row] + t * start[row], output[row]
        else:
            alpha_bar = float(ddim().alphas_cumprod.double()[timestep[row]])
            a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
            t, z = s / (a + s), (a * data[row] + s * start[row]) / (a + s)
            pred = output[row] - (z * (a + s) - s * output[row]) / a  # ε̂ - x̂0
        errors = pred - (start[row] - data[row])
        lpips = (z - t * pred - data[row]).square().mean() / 2
        losses.append(
            {
                "l2": errors.square().mean(),
                "pseudo-huber": huber(errors),
                "lpips": lpips / t,
                "lpips-huber": (1 - t) * huber(errors) + lpips / t,
            }[name]
        )
    torch.testing.assert_close(found.double(), torch.stack(losses).mean(), rtol=3e-3, atol=0)  # the nearest timestep
    if parametrization == "velocity":
        torch.testing.assert_close(found.double(), torch.stack(losses).mean(), rtol=1e-5, atol=0)
    by_time = loss.by_time.total()
    assert float(by_time[0].sum() / by_time[1].sum()) == pytest.approx(found.item(), rel=1e-5)
    found.backward()
    assert unet.weight.grad.abs() > 0


def test_losses_by_time_go_from_noise_to_data():
    loss, u = ReflowLoss(Recorder(), VelocityView(), Encoder(), 0.0), [0.05, 0.25, 0.85]
    start, data = noise(3), noise(3, seed=1)
    alone = [
        loss(start[row : row + 1], data[row : row + 1], PROMPTS[row : row + 1], numbers([u[row]])) for row in range(3)
    ]
    sums, counts = loss.by_time.total()
    assert counts.tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 1, 0]
    assert sums[counts > 0].tolist() == pytest.approx([value.item() for value in alone], rel=1e-5)


@pytest.mark.parametrize("u", [0.0, 1e-7, 1 - 1e-7, 1 - 2**-53])
def test_the_weights_are_finite_at_both_ends_of_time(u):
    loss = ReflowLoss(Recorder(), VelocityView(), Encoder(), 0.0, Squares())
    start, data = noise(1), noise(1, seed=1)
    loss.begin(phase("lpips-huber"))
    found = loss(start, data, ["a digit"], numbers([u]))
    found.backward()
    assert found.isfinite() and loss.unet.weight.grad.isfinite()
    if u > 0.5:  # at the data LPIPS falls with the square of t', and its weight rises with 1/t'
        assert found.item() == pytest.approx(float(huber(loss_errors(loss.unet, start, data))), rel=1e-3)


def loss_errors(unet, start, data):
    ((x, _),) = unet.calls
    return (-(0.3 * torch.sin(x) + 0.7) - (data - start)).detach()[0]


@pytest.mark.parametrize("kind", [ReflowLoss, RectifiedDiffusionLoss])
def test_a_flow_s_perceptual_loss_is_computed_in_float32(kind):
    class Dtypes(Squares):
        def __call__(self, latents, targets, draws):
            self.dtype = (latents @ targets.transpose(2, 3)).dtype  # what autocast would make bfloat16
            return super().__call__(latents, targets, draws)

    distance = Dtypes()
    view = VelocityView() if kind is ReflowLoss else EpsilonView(ddim().alphas_cumprod)
    loss = kind(Recorder(), view, Encoder(), 0.0, distance)
    loss.begin(phase("lpips"))
    with torch.autocast("cpu", torch.bfloat16):
        loss(noise(1), noise(1, seed=1), ["a digit"], numbers([0.5]))
    assert distance.dtype == torch.float32
    student = DistillLoss(Recorder(), VelocityView(), Encoder(), distance)
    student.begin(phase("lpips"))
    with torch.autocast("cpu", torch.bfloat16):
        student(noise(1), noise(1, seed=1), ["a digit"], numbers([0.5]))
    assert distance.dtype == torch.bfloat16


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_velocity_leads_to_the_data_that_the_network_predicts(prediction_type):
    view = EpsilonView(ddim().alphas_cumprod, prediction_type)
    x, output = noise(3), noise(3, seed=1)
    timestep = torch.tensor([999, 500, 3])
    scheduler = ddim(prediction_type=prediction_type)
    scheduler.set_timesteps(1000)
    found = view.data(x, timestep, view.velocity(x, timestep, output))
    for row in range(3):
        step = scheduler.step(output[row], int(timestep[row]), x[row])
        torch.testing.assert_close(found[row], step.pred_original_sample, rtol=1e-4, atol=1e-4)
    last = torch.full((3,), 999)
    ends = view.data(x, last, view.velocity(x, last, output)), view.one_step(x, output)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)
    flow = VelocityView()
    torch.testing.assert_close(flow.data(x, last.float(), flow.velocity(x, last, output)), flow.one_step(x, output))
