"""Text in, images out: as stock diffusers' own call, whatever the batch, and without a wait between the devices."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from instaflow.errors import ConfigError
from instaflow.models.drawing import Drawing
from instaflow.models.samplers import few_step_scheduler
from tests.models.made import ddim, load, noise, write_model, write_xl_flow
from tests.models.test_sampling import Crossings

PROMPTS = ["the digit 7", "an odd digit", "a seven"]


@pytest.fixture(scope="module")
def places(folders, tmp_path_factory):
    return {**folders, "xl": write_xl_flow(tmp_path_factory.mktemp("drawn") / "xl", "velocity")}


def stock_images(folder, start, prompts, **options):
    """What `StableDiffusionPipeline.__call__` gives, in levels of 255."""
    kind = StableDiffusionXLPipeline if folder.name == "xl" else StableDiffusionPipeline
    pipeline = kind.from_pretrained(str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return 255 * pipeline(prompts, latents=start, output_type="np", **options).images


@pytest.mark.parametrize("name", ["velocity", "epsilon", "teacher", "xl"])
@pytest.mark.parametrize(("num_steps", "guidance_scale"), [(1, 1.0), (3, 4.0)])
def test_it_draws_what_stock_diffusers_does(places, name, num_steps, guidance_scale):
    """And fewer images than it is set up for, from other noise and prompts than the call before."""
    drawing = Drawing(load(places[name]), 3, num_steps=num_steps, guidance_scale=guidance_scale, compiled=False)
    for count, seed in [(3, 0), (2, 1)]:
        prompts, start = PROMPTS[seed:][:count], noise(count, seed)
        options = {"num_inference_steps": num_steps, "guidance_scale": guidance_scale}
        expected = stock_images(places[name], start, prompts, **options)
        drawn = drawing(start, prompts)
        assert drawn.dtype == np.uint8 and drawn.shape == expected.shape == (count, 16, 16, 3)
        assert np.abs(drawn - expected).max() < 0.51  # rounded to a whole level
        assert expected.std() > 10


def test_steps_and_guidance_default_to_the_folders(folders):
    drawing = Drawing(load(folders["velocity"]), 1, compiled=False)
    assert (drawing.sampling.num_steps, drawing.sampling.guidance_scale) == (25, 1.5)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_it_draws_the_same_and_is_compiled_once(folders):
    options = {"num_steps": 2, "guidance_scale": 1.5}
    plain, compiled = (Drawing(load(folders["velocity"]), 2, **options, compiled=on) for on in (False, True))
    for count in (2, 1):
        with torch._dynamo.config.patch(error_on_recompile=True):
            drawn = compiled(noise(count), PROMPTS[:count])
        apart = np.abs(drawn.astype(int) - plain(noise(count), PROMPTS[:count]).astype(int))
        assert apart.max() <= 1 and apart.mean() < 0.01


@pytest.mark.parametrize("name", ["velocity", "epsilon", "xl"])
def test_what_a_graph_records_crosses_between_no_devices(places, name):
    """The meta device stands in for a GPU: a tensor there has no values that could be asked for."""
    model = load(places[name])
    for part in (model.unet, model.vae, *model.text_encoders):
        part.to("meta")
    drawing = Drawing(model, 2, num_steps=2, guidance_scale=1.5, compiled=False)
    tokens = model.tokens(PROMPTS[:2])
    with Crossings() as crossings:
        latents = drawing.sample(noise().to("meta"), *drawing.encode(*tokens))
        images = drawing.decode(latents)
    assert crossings.found == ["_to_copy cpu to meta"]
    assert images.device.type == "meta" and images.shape == (2, 16, 16, 3)


def test_a_long_prompt_is_counted_once_however_the_batch_is_filled_up(folders):
    model = load(folders["velocity"])
    Drawing(model, 3, num_steps=1, compiled=False)(noise(1), ["seven " * 200])
    assert model.num_truncated == 1


def test_noise_between_the_steps_is_refused(tmp_path):
    model = load(write_model(tmp_path / "student", few_step_scheduler(ddim(), 4), kind="student"))
    with pytest.raises(ConfigError, match="draws noise between its steps"):
        Drawing(model, 1, num_steps=4, guidance_scale=1.0, compiled=False)
    Drawing(model, 1, num_steps=1, guidance_scale=1.0, compiled=False)(noise(1), PROMPTS[:1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["velocity", "epsilon", "teacher", "xl"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_replayed_graph_draws_the_same(places, name, compiled):
    options = {"num_steps": 3, "guidance_scale": 4.0}
    expected = Drawing(load(places[name]), 2, **options, compiled=False)
    model = load(places[name])
    for part in (model.unet, model.vae, *model.text_encoders):
        part.to("cuda")
    drawing = Drawing(model, 2, **options, compiled=compiled)
    for count, seed in [(2, 0), (1, 1), (2, 2)]:
        prompts = PROMPTS[seed:][:count]
        apart = np.abs(drawing(noise(count, seed), prompts).astype(int) - expected(noise(count, seed), prompts))
        assert apart.max() <= 5 and apart.mean() < 0.5
