"""InstaFlow's released models: read as its own pipeline samples them, and written so."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from instaflow.errors import ConfigError, DataError
from instaflow.models.architecture import read_architecture
from instaflow.models.families import architecture_of
from instaflow.models.released import shift_time, write_released
from instaflow.models.settings import FLOW, ONE_STEP
from instaflow.models.tiny import tiny_unet
from tests.models.made import load, noise, write_flow, write_model, write_published, write_xl_flow

PROMPTS = ["the digit 7", "an odd digit"]


def write_theirs(folder):
    """A folder as they lie on the hub: a Stable Diffusion 1's files, and the name of InstaFlow's pipeline."""
    write_published(folder, "sd1")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "RectifiedFlowPipeline"}))
    return folder


def theirs(folder, num_steps, guidance_scale):
    """Latents by the formula of InstaFlow's pipeline, with stock parts: x + v(x, 1000 (1 - i/N)) / N."""
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    text, empty = stock.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=True)
    x = noise()
    for step in range(num_steps):
        timestep = torch.full((len(x),), (1 - step / num_steps) * 1000)
        with torch.no_grad():
            v = stock.unet(x, timestep, text).sample
            if guidance_scale > 1:
                without = stock.unet(x, timestep, empty).sample
                v = without + guidance_scale * (v - without)
        x = x + v / num_steps
    return x


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_theirs(tmp_path_factory.mktemp("released") / ONE_STEP)


def test_one_step_is_their_pipelines(released):
    model = load(released)
    assert (model.settings.kind, model.settings.num_steps, model.settings.guidance_scale) == ("student", 1, 1.0)
    ours, formula = model.sample(noise(), PROMPTS), theirs(released, 1, 0.0)
    torch.testing.assert_close(ours, formula, rtol=0, atol=2e-5)
    assert (formula - noise()).std() > 0.1  # the network does something


def test_several_steps_are_theirs_but_for_a_thousandth_of_the_time(released, tmp_path):
    folder = shutil.copytree(released, tmp_path / f"models--XCLiu--{FLOW}" / "snapshots" / "0123")
    model = load(folder)
    assert (model.settings.kind, model.settings.num_steps, model.settings.guidance_scale) == ("flow", 25, 1.5)
    for steps in (2, 4, 25):
        ours, formula = model.sample(noise(), PROMPTS, num_steps=steps), theirs(folder, steps, 1.5)
        assert (ours - formula).norm() < 0.002 * (formula - noise()).norm()


def test_a_name_that_does_not_tell_which_of_them_it_is_is_refused(released, tmp_path):
    folder = shutil.copytree(released, tmp_path / "my-instaflow")
    with pytest.raises(DataError, match="do not tell which") as caught:
        load(folder)
    assert ONE_STEP in caught.value.hint and FLOW in caught.value.hint


def test_its_architecture_is_a_velocity_flows(released):
    architecture = read_architecture(released)
    known = architecture_of(f"XCLiu/{ONE_STEP}")
    assert (known.scheduler, known.settings) == (architecture.scheduler, architecture.settings)
    assert known.parameters()["unet"] == 859_520_964
    assert architecture.settings.parametrization == "velocity"
    assert architecture.scheduler["_class_name"] == "DPMSolverMultistepScheduler"
    assert architecture.scheduler["prediction_type"] == "flow_prediction"


@pytest.mark.parametrize("flip", [True, False])
def test_time_is_shifted(flip):
    torch.manual_seed(0)
    unet = tiny_unet(flip_sin_to_cos=flip).eval()
    text = torch.randn(2, 5, unet.config.cross_attention_dim)
    with torch.no_grad():
        before = [unet(noise(), t, text).sample for t in (500.0, 500.25)]
        shift_time(unet, 0.25)
        torch.testing.assert_close(unet(noise(), 500.0, text).sample, before[1], rtol=0, atol=1e-5)
    assert (before[0] - before[1]).abs().max() > 1e-4


def test_written_and_read_again_it_is_the_same(tmp_path):
    flow = write_flow(tmp_path / "flow", "velocity")
    model = load(flow)
    ours = model.sample(noise(), PROMPTS, num_steps=1, guidance_scale=1.5)
    write_released(model, tmp_path / "theirs")
    torch.testing.assert_close(theirs(tmp_path / "theirs", 1, 1.5), ours, rtol=0, atol=2e-5)
    again = load(tmp_path / "theirs")
    assert again.settings == load(flow).settings
    for steps in (1, 4):
        wanted = load(flow).sample(noise(), PROMPTS, num_steps=steps)
        torch.testing.assert_close(again.sample(noise(), PROMPTS, num_steps=steps), wanted, rtol=0, atol=1e-5)


def test_half_precision(released):
    model = load(released, torch.bfloat16)
    exact = theirs(released, 1, 0.0)
    assert (model.sample(noise(), PROMPTS) - exact).abs().max() < 0.05 * exact.abs().max()


def test_what_their_pipeline_cannot_sample_is_refused(tmp_path):
    for name, folder in {
        "teacher": write_model(tmp_path / "teacher"),
        "epsilon": write_flow(tmp_path / "epsilon", "epsilon"),
        "xl": write_xl_flow(tmp_path / "xl", "velocity"),
    }.items():
        with pytest.raises(ConfigError, match="InstaFlow's convention"):
            write_released(load(folder), tmp_path / f"{name}-out")
        assert not (tmp_path / f"{name}-out").exists()


def test_pickles_are_refused(released, tmp_path):
    folder = shutil.copytree(released, tmp_path / ONE_STEP)
    (file,) = (folder / "unet").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(DataError, match="lacks unet") as caught:
        load(folder)
    assert "pickles" in caught.value.hint
