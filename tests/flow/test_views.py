import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from instaflow.flow.straightness import euler
from instaflow.flow.views import EpsilonView, VelocityView

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 1, "final_sigmas_type": "zero"}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def epsilon_view(prediction_type="epsilon"):
    return EpsilonView(DDIMScheduler(**SCHEDULE).alphas_cumprod, prediction_type)


def noise(count=3, seed=0):
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def network(x, timestep):
    """Smooth, bounded, not linear, and it looks at its timestep."""
    level = timestep.double().view(-1, 1, 1, 1).float() / 1000 if timestep.ndim else float(timestep) / 1000
    return 0.8 * torch.sin(1.3 * x + 2 * level) + 0.1 * x.flip(1) * level


def by_scheduler(scheduler, num_steps, start):
    scheduler.set_timesteps(num_steps)
    x = start * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep), timestep, x).prev_sample
    return x


# --- grids ------------------------------------------------------------------------------------------------------------


def test_the_velocity_grid_is_the_stock_schedulers():
    for num_steps in [*range(1, 130), 250, 999]:
        scheduler = DPMSolverMultistepScheduler(**FLOW)
        scheduler.set_timesteps(num_steps)
        timesteps, times = VelocityView().grid(num_steps)
        assert timesteps.tolist() == scheduler.timesteps.tolist(), num_steps
        np.testing.assert_allclose(1 - times.numpy(), scheduler.sigmas.numpy(), atol=1e-7)


def test_the_epsilon_grid_is_the_stock_schedulers():
    for num_steps in [*range(1, 130), 250, 999]:
        scheduler = DDIMScheduler(**SCHEDULE, timestep_spacing="trailing")
        scheduler.set_timesteps(num_steps)
        timesteps, times = epsilon_view().grid(num_steps)
        assert timesteps.tolist() == scheduler.timesteps.tolist()[:num_steps], num_steps  # it may add a timestep -1
        assert len(times) == num_steps + 1 and times[-1] == 1 and (times.diff() > 0).all()


@pytest.mark.parametrize("view", [VelocityView(), epsilon_view()], ids=["velocity", "epsilon"])
def test_a_grid_starts_where_the_noise_is(view):
    timesteps, times = view.grid(4)
    assert timesteps[0] == 999
    assert float(times[0]) == pytest.approx(0.001 if isinstance(view, VelocityView) else 0.0640, abs=1e-4)


# --- parity with stock samplers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 25, 100])
def test_euler_of_a_velocity_is_the_stock_sampler(num_steps):
    ours = euler(VelocityView(), network, noise(), num_steps).states[-1]
    stock = by_scheduler(DPMSolverMultistepScheduler(**FLOW), num_steps, noise())
    torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)


def test_one_step_of_a_velocity():
    expected = noise() - 0.999 * network(noise(), torch.tensor(999))
    torch.testing.assert_close(by_scheduler(DPMSolverMultistepScheduler(**FLOW), 1, noise()), expected)
    torch.testing.assert_close(VelocityView().one_step(noise(), network(noise(), torch.tensor(999))), expected)
    torch.testing.assert_close(euler(VelocityView(), network, noise(), 1).states[-1], expected)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 10, 25, 100])
def test_euler_of_a_diffusion_is_ddim(num_steps, prediction_type):
    ours = euler(epsilon_view(prediction_type), network, noise(), num_steps).states[-1]
    ddim = DDIMScheduler(
        **SCHEDULE,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        prediction_type=prediction_type,
    )
    stock = by_scheduler(ddim, num_steps, noise())
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_steps", [3, 7, 48])
def test_where_steps_do_not_divide_1000_euler_is_the_first_order_solver(num_steps):
    """DDIM then stands beside the timestep that it asks for; DPM-Solver of order 1, the same formula, does not."""
    ours = euler(epsilon_view(), network, noise(), num_steps).states[-1]
    settings = SCHEDULE | {"timestep_spacing": "trailing", "solver_order": 1, "final_sigmas_type": "zero"}
    stock = by_scheduler(DPMSolverMultistepScheduler(**settings), num_steps, noise())
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    ddim = DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    assert (by_scheduler(ddim, num_steps, noise()) - stock).abs().max() > 1e-3


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_one_step_of_a_diffusion_is_ddims(prediction_type):
    view = epsilon_view(prediction_type)
    ddim = DDIMScheduler(
        **SCHEDULE,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        prediction_type=prediction_type,
    )
    ours = view.one_step(noise(), network(noise(), torch.tensor(999)))
    torch.testing.assert_close(ours, by_scheduler(ddim, 1, noise()), rtol=1e-5, atol=1e-5)


def zero_terminal(prediction_type):
    return DDIMScheduler(
        **SCHEDULE,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        prediction_type=prediction_type,
    )


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [1, 4, 25])
def test_a_schedule_that_ends_without_signal_is_read_too(num_steps, prediction_type):
    stock = zero_terminal(prediction_type)
    view = EpsilonView(stock.alphas_cumprod, prediction_type)
    assert view.times()[-1] == 0
    path = euler(view, network, noise(), num_steps)
    torch.testing.assert_close(path.states[-1], by_scheduler(stock, num_steps, noise()), rtol=1e-5, atol=1e-5)
    if num_steps == 1:
        output = network(noise(), torch.tensor(999))
        torch.testing.assert_close(view.one_step(noise(), output), path.states[-1], rtol=1e-5, atol=1e-5)


# --- training points --------------------------------------------------------------------------------------------------


def test_a_velocitys_point_lies_on_the_straight_path():
    t = torch.tensor([0.0, 0.25, 0.9])
    x, timestep = VelocityView().point(noise(), noise(seed=1), t)
    torch.testing.assert_close(x[1], 0.75 * noise()[1] + 0.25 * noise(seed=1)[1])
    assert torch.equal(x[0], noise()[0])
    torch.testing.assert_close(timestep, torch.tensor([999.0, 750.0, 100.0]))  # 1000 is beyond what a teacher knows


def test_a_diffusions_point_is_its_noised_data_at_the_nearest_timestep():
    view, count = epsilon_view(), 997
    start, data = noise(count), noise(count, seed=1)
    t = view.time(torch.linspace(0, 1, count))
    x, timestep = view.point(start, data, t)
    assert timestep.dtype == torch.int64 and timestep.min() == 0 and timestep.max() == 999
    distance = (view.times()[:, None] - t).abs()  # [1000, B]
    torch.testing.assert_close(distance[timestep, torch.arange(count)], distance.min(0).values, rtol=0, atol=1e-7)
    stock = DDIMScheduler(**SCHEDULE).add_noise(data, start, timestep)
    inner = timestep < 999
    torch.testing.assert_close(x[inner], stock[inner], rtol=1e-6, atol=1e-6)


def test_at_the_last_timestep_the_input_is_the_noise_itself():
    view = epsilon_view()
    t = view.times()[-1].expand(3)
    x, timestep = view.point(noise(), noise(seed=1), t)
    assert timestep.tolist() == [999] * 3 and torch.equal(x, noise())
    x, timestep = view.point(noise(), noise(seed=1), view.times()[-2].expand(3))
    assert timestep.tolist() == [998] * 3 and not torch.equal(x, noise())
    # A velocity's last timestep spans a thousandth of the path.
    x, timestep = VelocityView().point(noise(), noise(seed=1), torch.tensor([0.0, 0.0005, 0.001]))
    torch.testing.assert_close(timestep, torch.full((3,), 999.0))
    assert (x - noise()).abs().max() < 0.001 * (noise() - noise(seed=1)).abs().max() * 1.01


def test_times_are_uniform_over_what_the_network_knows():
    uniform = torch.linspace(0, 1, 11)
    assert torch.equal(VelocityView().time(uniform), uniform)
    times = epsilon_view().time(uniform)
    assert float(times[0]) == pytest.approx(0.0640, abs=5e-5) and float(times[-1]) == pytest.approx(0.97166, abs=5e-6)
    torch.testing.assert_close(times.diff(), times.diff()[:1].expand(10))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_network_has_the_paths_velocity(prediction_type):
    view = epsilon_view(prediction_type)
    start, data = noise(), noise(seed=1)
    x, timestep = view.point(start, data, view.times()[[0, 500, 998]])
    alpha, sigma = view.alpha_sigma(timestep)
    output = {"epsilon": start, "v_prediction": alpha * start - sigma * data, "sample": data}[prediction_type]
    torch.testing.assert_close(view.velocity(x, timestep, output), data - start, rtol=1e-4, atol=1e-4)
    assert view.velocity(x, timestep, output.bfloat16()).dtype == torch.float32
    assert torch.equal(VelocityView().velocity(x, timestep, start - data), data - start)


@pytest.mark.parametrize("view", [VelocityView(), epsilon_view()], ids=["velocity", "epsilon"])
def test_state_and_model_input_are_inverse(view):
    timestep = torch.tensor([0, 400, 999])
    torch.testing.assert_close(view.model_input(view.state(noise(), timestep), timestep), noise())
