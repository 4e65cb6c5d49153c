"""Models of pixels: their folder in stock diffusers, their prompts, and what is refused."""

import json
import re
import shutil

import pytest
import torch
from diffusers import ConsistencyModelPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from diffusers.schedulers import CMStochasticIterativeScheduler

from instaflow.errors import ConfigError, DataError
from instaflow.flow.views import EdmView
from instaflow.models.edm_heun import EdmHeunScheduler
from instaflow.models.export import save_model
from instaflow.models.loading import load_model
from instaflow.models.samplers import coupling_scheduler, recorded_scheduler
from instaflow.models.sampling import network_flops
from instaflow.models.vae import decoded, load_vae
from tests.models.made import load, write_edm

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_edm(tmp_path_factory.mktemp("edm") / "teacher", class_names=NAMES)


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    return load(write_edm(tmp_path_factory.mktemp("edm") / "unconditional", classes=None))


def noise(count=2):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheduler", [EDMDPMSolverMultistepScheduler(), EDMEulerScheduler()], ids=["dpm", "euler"])
@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("classes", [10, None])
def test_stock_diffusers_samples_the_folder_as_we_do(tmp_path, scheduler, num_steps, classes):
    folder = write_edm(tmp_path / "model", scheduler, classes)
    stock = ConsistencyModelPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    assert type(stock.scheduler) is type(scheduler)
    which = {"class_labels": [7, 1]} if classes else {}
    images = stock(batch_size=2, **which, num_inference_steps=num_steps, latents=noise(), output_type="pt").images
    ours = load(folder)
    pixels = ours.sample(noise(), ["7", "1"] if classes else ["", ""], num_steps=num_steps)
    torch.testing.assert_close((ours.decode(pixels) + 1) / 2, images, rtol=0, atol=1e-6)
    card = (folder / "README.md").read_text()
    line = re.search(r"image = (pipeline\(.*\)\.images\[0\])", card)[1]
    assert eval(line, {"pipeline": stock}).size == (8, 8)  # the card's own line


def test_a_class_by_number_and_by_name(model):
    assert model.encode(["7", "seven", "0"])["class_labels"].tolist() == [7, 7, 0]
    assert model.number_of("7") == 7  # a number is the class of that number, whatever another one's name is
    sample = model.sample(noise(3)[[0, 0, 0]], ["seven", "7", "1"], num_steps=2)
    assert torch.equal(sample[0], sample[1]) and not torch.allclose(sample[0], sample[2], atol=1e-3)


@pytest.mark.parametrize("prompt", ["10", "-1", "a handwritten seven", "", "Seven", "07"])
def test_what_is_no_class(model, prompt):
    with pytest.raises(DataError, match="is no class of") as caught:
        model.encode(["3", prompt])
    assert "0 to 9" in caught.value.hint and "'zero'" in caught.value.hint


def test_no_prompt(model, unconditional):
    with pytest.raises(DataError, match="of a class alone"):
        model.encode([None])
    assert unconditional.encode(["", None]) == {}
    with pytest.raises(DataError, match="without any prompt"):
        unconditional.encode(["7"])
    for one, prompt in ((model, "7"), (unconditional, "")):
        with pytest.raises(DataError):
            one.sample(noise(), [prompt, prompt], guidance_scale=2.0)


def test_pixels_are_the_latents(model, folder):
    assert model.latent_shape == (3, 8, 8) and model.image_size == (8, 8) and not model.unet.training
    images = noise().clamp(-1, 1)
    assert torch.equal(model.encode_images(images), images) and torch.equal(
        model.decode(2 * images), (2 * images).clamp(-1, 1)
    )
    assert torch.equal(model.round_trip(images), images)
    assert model.pictures(torch.tensor([[-1.0, 0.0, 3.0]]).view(1, 3, 1, 1)).flatten().tolist() == [0, 128, 255]
    assert torch.equal(decoded(load_vae(str(folder), device=torch.device("cpu")), images), images)


def test_it_is_loaded_as_it_was_saved(model, folder, tmp_path):
    save_model(tmp_path / "again", **model.parts, scheduler=model.scheduler, settings=model.settings)
    again = load(tmp_path / "again")
    assert again.settings == model.settings and again.view() == EdmView()
    assert torch.equal(again.sample(noise(), ["1", "2"]), model.sample(noise(), ["1", "2"]))
    assert network_flops(model) > 1e5
    half = load(folder, torch.bfloat16)
    sampled = half.sample(noise(), ["1", "2"])
    assert sampled.dtype == torch.float32 and (sampled - model.sample(noise(), ["1", "2"])).abs().max() < 0.2


def test_its_noise_levels_are_the_folders(tmp_path):
    scheduler = EDMEulerScheduler(sigma_max=20.0, sigma_data=0.8, sigma_min=0.01, rho=5.0)
    model = load(write_edm(tmp_path / "model", scheduler))
    assert model.view() == EdmView(0.8, 0.01, 20.0, 5.0)
    for sampler in ("heun", "dpm-solver++", "ddim"):
        coupling = coupling_scheduler(model, sampler)
        coupling.set_timesteps(3)
        assert float(coupling.sigmas[0]) == pytest.approx(20.0)


def test_samplers(model):
    assert isinstance(coupling_scheduler(model), EdmHeunScheduler)
    fine = [
        model.sample(noise(), ["1", "2"], num_steps=300, scheduler=coupling_scheduler(model, sampler))
        for sampler in ("heun", "dpm-solver++")
    ]
    torch.testing.assert_close(*fine, rtol=0, atol=2e-2)
    scheduler = coupling_scheduler(model, "heun")
    recorded = recorded_scheduler({"class": "EdmHeunScheduler", **scheduler.config})
    assert torch.equal(
        *(model.sample(noise(), ["1", "2"], num_steps=4, scheduler=one) for one in (scheduler, recorded))
    )
    for asked, words in [
        ({"sampler": "unipc"}, "knows no EDM"),
        ({"timestep_spacing": "leading"}, "does nothing for an EDM"),
        ({"sampler": "euler"}, "is a flow's"),
    ]:
        with pytest.raises(ConfigError, match=words):
            coupling_scheduler(model, **asked)


def test_other_models_of_pixels_are_refused(folder, tmp_path):
    stock = ConsistencyModelPipeline.from_pretrained(folder)
    ConsistencyModelPipeline(unet=stock.unet, scheduler=CMStochasticIterativeScheduler()).save_pretrained(
        tmp_path / "cm"
    )
    with pytest.raises(DataError, match="no EDM"):
        load(tmp_path / "cm")
    copied = shutil.copytree(folder, tmp_path / "plain")
    (copied / "instaflow.json").unlink()
    with pytest.raises(DataError, match="no EDM"):
        load(copied)
    copied = shutil.copytree(folder, tmp_path / "lacking")
    (copied / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(DataError, match=re.escape("scheduler/scheduler_config.json")):
        load_model(copied, device=torch.device("cpu"))
    settings = json.loads((folder / "instaflow.json").read_text())
    assert settings["parametrization"] == "edm" and settings["class_names"] == NAMES
