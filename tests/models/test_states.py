"""The states that a sampler visits, against paths that are known in closed form."""

import pytest
import torch

from instaflow.errors import ConfigError
from instaflow.models.samplers import SAMPLERS, coupling_scheduler
from instaflow.models.sampling import Sampling
from instaflow.models.states import nearest_states, noise_levels, visited_states
from tests.models.made import load, noise, write_flow, write_model

PROMPTS = ["the digit 7", "an odd digit"]
DEVIATION = 0.5  # of the data that the network believes in


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    folders = [write_model(place / "teacher"), *(write_flow(place / name, name) for name in ("velocity", "epsilon"))]
    return {folder.name: load(folder) for folder in folders}


def samplers(models):
    """Every way to make couplings: name, model, scheduler."""
    for name in SAMPLERS:
        spacings = ["trailing", "leading"] + ["linspace"] * (name not in ("ddim", "pndm"))
        for spacing in spacings:
            yield f"{name} {spacing}", models["teacher"], coupling_scheduler(models["teacher"], name, spacing)
    for name in ("velocity", "epsilon"):
        yield name, models[name], models[name].scheduler


def believing(model, scheduler, num_steps, answer):
    """A sampling whose network knows data and noise: `answer`, of the flow's point and t, gives the two."""
    sampling = Sampling(model, num_steps=num_steps, guidance_scale=1.0, scheduler=scheduler)
    levels = iter(zip(*noise_levels(sampling.scheduler), strict=True))

    def predict(x, timestep, text, guidance_scale):
        alpha, sigma = next(levels)
        if float(alpha) == 1:  # the sampler's units of sigma: the network is fed those of its diffusion
            alpha, sigma = alpha / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        data, epsilon = answer(x.double() / (alpha + sigma), alpha / (alpha + sigma))
        velocity = sampling.scheduler.config.prediction_type == "flow_prediction"
        return (epsilon - data if velocity else epsilon).float()

    sampling.model = Knowing(model, predict)
    return sampling


class Knowing:
    """A model with another network."""

    def __init__(self, model, predict):
        self.model, self.predict = model, predict

    def __getattr__(self, name):
        return getattr(self.model, name)


def states_of(sampling, visited, start):
    return [state.float() for state in sampling.sampled(start, PROMPTS, visited).states]


def test_states_of_a_straight_flow_lie_on_the_line_from_noise_to_latent(models):
    torch.manual_seed(0)
    data, epsilon = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    for name, model, scheduler in samplers(models):
        for num_steps in (1, 4, 10):
            visited = visited_states(scheduler, num_steps)
            sampling = believing(model, scheduler, num_steps, lambda z, t: (data, epsilon))
            first = visited[0]
            start = (1 - first.time) * epsilon + first.time * data
            found = states_of(sampling, visited, start * first.scale / sampling.scheduler.init_noise_sigma)
            assert len(found) == num_steps
            for state, z in zip(visited, found, strict=True):
                line = ((1 - state.time) * epsilon + state.time * data).float()
                assert (z - line).abs().max() < 3e-3, f"{name} at {state.time}"  # float16


def test_states_of_a_gaussian_lie_on_its_path(models):
    """Data of mean 0 and deviation s: every path is z_t = z_0 √(t² s² + (1-t)²), to the order of the sampler.

    Heun's trial points would miss it by 0.012.
    """

    def variance(t):
        return (t * DEVIATION) ** 2 + (1 - t) ** 2

    for name, model, scheduler in samplers(models):
        if "leading" in name or "linspace" in name:  # their last stride is too long for so tight a tolerance
            continue
        visited = visited_states(scheduler, 20)
        sampling = believing(
            model, scheduler, 20, lambda z, t: (t * DEVIATION**2 * z / variance(t), (1 - t) * z / variance(t))
        )
        found = states_of(sampling, visited, noise())
        tolerance = 0.009 if name.partition(" ")[0] in ("dpm-solver++", "pndm", "heun", "unipc") else 0.12
        for state, z in zip(visited, found, strict=True):
            exact = found[0] * (variance(state.time) / variance(visited[0].time)) ** 0.5
            assert (z - exact).norm() < tolerance * exact.norm(), f"{name} at {state.time}"


def test_a_trial_point_is_no_state(models):
    steps = {
        name: [state.step for state in visited_states(coupling_scheduler(models["teacher"], name), 4)]
        for name in SAMPLERS
    }
    assert steps == {
        "dpm-solver++": [0, 1, 2, 3],
        "ddim": [0, 1, 2, 3],
        "pndm": [0, 2, 3, 4],
        "heun": [0, 2, 4, 6],
        "unipc": [0, 1, 2, 3],
    }


def test_an_epsilon_flow_lands_where_ddim_steps_in_any_number_of_steps(models):
    """Where 1000 is no multiple of the steps, DDIM asks for a timestep beside the one that it landed on."""
    scheduler = models["epsilon"].scheduler
    alpha_bar = scheduler.alphas_cumprod.double()
    landed = alpha_bar[[999, 999 - 142]]
    expected = (landed.sqrt() / (landed.sqrt() + (1 - landed).sqrt())).tolist()
    assert [state.time for state in visited_states(scheduler, 7)][:2] == pytest.approx(expected, abs=1e-12)


def test_each_time_is_taken_at_the_nearest_state(models):
    scheduler = models["velocity"].scheduler
    found = nearest_states(scheduler, 4, [0.2, 0.9])
    assert [(state.step, round(state.time, 3)) for state in found] == [(1, 0.251), (3, 0.75)]
    assert nearest_states(scheduler, 4, [state.time for state in found]) == found
    assert nearest_states(scheduler, 4, []) == []


def test_two_times_at_one_state_are_refused_with_those_that_are_visited(models):
    with pytest.raises(ConfigError, match=r"0\.7 and 0\.8 both come to the state at 0\.750") as caught:
        nearest_states(models["velocity"].scheduler, 4, [0.2, 0.7, 0.8])
    assert "In 4 steps this sampler visits 0.001, 0.251, 0.500, 0.750: choose times near" in caught.value.hint
