import pytest
import torch

from instaflow.errors import InstaFlowError
from instaflow.flow.views import EpsilonView, VelocityView
from instaflow.training.start_checks import coupling_distance, parity
from tests.models.made import ddim, load, noise, teacher_scheduler, write_model

PROMPTS = ["the digit 7", "an odd digit"]


def teacher_of(folder, prediction_type="epsilon"):
    return load(write_model(folder / "model", teacher_scheduler(prediction_type=prediction_type)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_teacher_read_rightly_agrees_with_ddim(tmp_path, prediction_type, guidance_scale):
    check = parity(teacher_of(tmp_path, prediction_type), noise(), PROMPTS, guidance_scale)
    assert 0 <= check.value <= 1e-4


@pytest.mark.parametrize(
    ("prediction_type", "wrong"),
    [
        ("v_prediction", EpsilonView(ddim().alphas_cumprod, "epsilon")),
        ("epsilon", EpsilonView(ddim().alphas_cumprod, "v_prediction")),
        ("epsilon", EpsilonView(ddim({"beta_schedule": "linear"}).alphas_cumprod)),
        ("epsilon", EpsilonView(ddim({"beta_schedule": "scaled_linear", "beta_end": 0.0121}).alphas_cumprod)),
    ],
    ids=["v read as epsilon", "epsilon read as v", "linear schedule", "another end"],
)
def test_a_teacher_read_wrongly_is_refused(tmp_path, monkeypatch, prediction_type, wrong):
    model = teacher_of(tmp_path, prediction_type)
    monkeypatch.setattr(model, "view", lambda: wrong)
    with pytest.raises(InstaFlowError, match="disagrees with DDIM") as caught:
        parity(model, noise(), PROMPTS, 2.0)
    assert model.name in caught.value.message and "prediction_type" in caught.value.hint


def test_a_network_that_is_not_finite_is_refused(tmp_path):
    model = teacher_of(tmp_path)
    model.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(InstaFlowError):
        parity(model, noise(), PROMPTS, 1.0)


def test_a_velocity_has_no_parity(folders):
    model = load(folders["velocity"])
    assert isinstance(model.view(), VelocityView)
    with pytest.raises(ValueError, match="parity"):
        parity(model, noise(), PROMPTS, 1.0)


def test_the_distance_to_couplings(tmp_path):
    model = teacher_of(tmp_path)
    latents = model.trajectory(noise(), PROMPTS, num_steps=4, guidance_scale=2.0).states[-1]
    same = coupling_distance(model, noise(), latents, PROMPTS, num_steps=4, guidance_scale=2.0)
    shifted = coupling_distance(model, noise(), latents + 0.5, PROMPTS, num_steps=4, guidance_scale=2.0)
    assert same.value == pytest.approx(0, abs=1e-5) and shifted.value == pytest.approx(0.5, rel=1e-4)
