"""`instaflow.load`: one way from prompts and seeds to images, for Python and the command line."""

import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

import instaflow
from instaflow.couplings.noise import coupled_noise
from instaflow.errors import ConfigError, DataError, InstaFlowError
from instaflow.models.samplers import flow_scheduler
from instaflow.using import generator
from tests.models.made import teacher_scheduler, write_checked, write_edm, write_flow, write_model, write_xl_flow

SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("using") / "student"
    scheduler = flow_scheduler("velocity", teacher_scheduler())
    return write_model(place, scheduler, kind="student", parametrization="velocity", num_steps=1, guidance_scale=1.0)


@pytest.fixture(scope="module")
def model(folder):
    return instaflow.load(folder, device="cpu", batch_size=2)


def pixels(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_images_are_what_the_model_samples_and_decodes(model):
    prompts = ["a seven", "an odd digit", "a four"]
    noise = torch.from_numpy(np.concatenate([coupled_noise(seed, "sample", [0], SHAPE) for seed in (3, 4, 9)]))
    expected = model.model.pictures(model.model.sample(noise, prompts)).numpy()
    images = model(prompts, seeds=[3, 4, 9])
    assert [(image.size, image.mode) for image in images] == [((16, 16), "RGB")] * 3
    assert np.abs(pixels(images) - expected).max() <= 1
    assert np.abs(pixels(model(prompts, noise=noise.numpy())) - pixels(images)).max() == 0


def test_a_notebook_tells_what_it_is(model, folder):
    assert repr(model) == f"<'{folder}': 16×16 pixels in 1 step, guidance 1>"


def test_a_seed_and_a_prompt_give_one_image_whatever_stands_beside(model):
    many = model.latents(["a seven", "a two", "a seven"], seeds=[5, 6, (0, 2)])
    alone = model.latents("a seven", seeds=5)
    turned = model.latents(["a two", "a seven"], seeds=(6, 5))
    torch.testing.assert_close(alone[0], many[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(turned.flip(0), many[:2], rtol=0, atol=1e-5)
    assert (many[0] - many[2]).abs().max() > 0.01
    unnamed = model.latents(["a one", "a one", "a seven"])  # image i: the noise i of seed 0
    torch.testing.assert_close(unnamed[2], many[2], rtol=0, atol=1e-5)


def test_one_prompt_goes_with_many_seeds_and_one_seed_with_many_prompts(model):
    seeds = model.latents("a seven", seeds=range(3))
    torch.testing.assert_close(seeds, model.latents(["a seven"] * 3, seeds=[0, 1, 2]), rtol=0, atol=1e-5)
    prompts = model.latents(["a seven", "a two"], seeds=np.int64(1))
    torch.testing.assert_close(prompts[0], seeds[1], rtol=0, atol=1e-5)
    assert (prompts[0] - prompts[1]).abs().max() > 1e-3


def test_steps_and_guidance_are_those_asked_for(model):
    noise = model.noise([1])
    for steps, scale in ((1, 1.0), (3, 1.0), (3, 2.0), (1, 1.0)):
        made = model.latents("a seven", seeds=1, num_steps=steps, guidance_scale=scale)
        expected = model.model.sample(noise, ["a seven"], num_steps=steps, guidance_scale=scale)
        assert torch.equal(made, expected)


REFUSED = {
    "no prompt": {"prompts": []},
    "no text": {"prompts": ["a seven", 7]},
    "half a character": {"prompts": "a \udce9"},
    "2 prompts and 3 seeds": {"prompts": ["a", "b"], "seeds": [1, 2, 3]},
    "no seed": {"seeds": []},
    "-1": {"seeds": [-1]},
    "0.5 is no seed": {"seeds": [0.5]},
    "1.5 is no seed": {"seeds": 1.5},
    "prompt 0 must be a text, not 3": {"prompts": 3},
    "prompt 0 must be a text, not None": {"prompts": None},
    "True is no seed": {"seeds": [True]},
    "Both seeds and noise": {"seeds": 1, "noise": np.zeros((1, *SHAPE), np.float32)},
    "float64": {"noise": np.zeros((1, *SHAPE))},
    "shape (1, 4, 8, 9)": {"noise": np.zeros((1, 4, 8, 9), np.float32)},
    "not finite": {"noise": np.full((1, *SHAPE), np.nan, np.float32)},
    "not 0": {"num_steps": 0},
    "not 1001": {"num_steps": 1001},
    "not nan": {"guidance_scale": float("nan")},
    "not -1": {"guidance_scale": -1},
}


@pytest.mark.parametrize("told", REFUSED)
def test_wrong_input_is_named_with_the_way_out(model, told):
    with pytest.raises(ConfigError) as caught:
        model(**({"prompts": "a seven"} | REFUSED[told]))
    assert told.removeprefix("no ") in caught.value.message
    assert caught.value.hint


def test_what_cannot_be_loaded_is_told(folder, tmp_path):
    with pytest.raises(DataError, match="There is no model"):
        instaflow.load(tmp_path / "gone")
    for wrong in ({"device": "abacus"}, {"dtype": "float8"}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
            instaflow.load(folder, **wrong)


def test_latents_that_are_not_finite_are_an_error(folder):
    broken = instaflow.load(folder, device="cpu")
    broken.model.unet.conv_out.bias.fill_(torch.inf)
    for draw in (broken, broken.latents):
        with pytest.raises(InstaFlowError, match="not finite"):
            draw("a seven", seeds=1)


def test_the_precision_is_the_one_asked_for(folder):
    half = instaflow.load(folder, device="cpu", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half.latents("a seven", seeds=1).dtype == torch.float32
    assert half("a seven", seeds=1)[0].size == (16, 16)


def test_a_blend_leads_from_one_prompt_to_the_other(tmp_path):
    for write in (lambda: write_flow(tmp_path / "sd", "velocity"), lambda: write_xl_flow(tmp_path / "xl", "epsilon")):
        model = instaflow.load(write(), device="cpu", batch_size=2)
        noise, how = model.noise(4), {"num_steps": 2, "guidance_scale": 1.5}
        ends = model.latents(["a seven", "a two"], noise=noise, **how)
        way = model.blended(("a seven", "a two"), [0, 0.5, 1], noise=noise, **how)
        torch.testing.assert_close(way[[0, 2]], ends, rtol=0, atol=1e-4)
        assert all((way[1] - end).abs().max() > 1e-4 for end in ends)
    classes = instaflow.load(write_edm(tmp_path / "edm"), device="cpu")
    with pytest.raises(ConfigError, match="nothing between"):
        classes.blended(("1", "2"), [0.5], noise=classes.noise(0))


def test_real_images_are_encoded_whatever_their_size(model):
    noise = np.random.default_rng(0).normal(128, 40, (30, 40)).clip(0, 255)
    photo = Image.fromarray(noise.astype(np.uint8)).convert("RGBA")
    latents = model.encode([photo, photo.convert("L")])
    assert latents.shape == (2, *SHAPE)
    small = photo.convert("RGB").crop((5, 0, 35, 30)).resize((16, 16), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(latents[:1], model.model.encode_images(values), rtol=0, atol=0.05)


def test_importing_the_package_is_light():
    heavy = "import sys, instaflow; sys.exit(bool({'torch', 'numpy', 'diffusers', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy]).returncode == 0


def test_the_package_is_typed():
    assert get_type_hints(instaflow.load, vars(generator) | {"Path": Path})["return"] is generator.Generator
    assert get_type_hints(generator.Generator.__call__)["return"] == list[Image.Image]
    assert (Path(instaflow.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("unsafe", [True, False])
def test_a_folder_s_safety_checker_blackens_what_it_takes_for_unsafe(tmp_path, unsafe):
    place = write_checked(tmp_path / "checked", unsafe)
    model = instaflow.load(place, device="cpu", batch_size=2)
    unchecked = instaflow.load(place, device="cpu", batch_size=2, safety_checker=False)
    images, plain = (pixels(one("a seven", seeds=range(3), num_steps=2)) for one in (model, unchecked))
    assert plain.any(axis=(1, 2, 3)).all() and unchecked.checker is None
    assert np.array_equal(images, 0 * plain if unsafe else plain)
    assert model.num_blackened == (3 if unsafe else 0)


def test_a_safety_checker_that_cannot_be_read_is_told(tmp_path):
    place = write_checked(tmp_path / "checked")
    (place / "safety_checker" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"The safety checker in '.*checked' cannot be read") as caught:
        instaflow.load(place, device="cpu")
    assert "safety_checker and feature_extractor" in caught.value.hint
    instaflow.load(place, device="cpu", safety_checker=False)
