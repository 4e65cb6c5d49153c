"""A student and a flow in stock pipelines that start from an image or a latent, against their formulas."""

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

import instaflow
from instaflow.models.guidance_lock import lock_guidance
from instaflow.models.samplers import flow_scheduler
from tests.models.made import teacher_scheduler, write_flow, write_model, write_xl_flow
from tests.using.made import write_refiner

PROMPT = "the digit 7"
STUDENT = {"kind": "student", "parametrization": "velocity", "num_steps": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("elsewhere")
    return {
        "velocity": write_flow(place / "velocity", "velocity"),
        "epsilon": write_flow(place / "epsilon", "epsilon"),
        "student": write_model(place / "student", flow_scheduler("velocity", teacher_scheduler()), **STUDENT),
        "teacher": write_model(place / "teacher", seed=1),
    }


def photo(size=(16, 16), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def stock(kind, place, **options):
    pipeline = kind.from_pretrained(place, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded():
    return torch.Generator().manual_seed(7)


CASES = [
    ("velocity", 0.5, 4, 1.5),
    ("velocity", 0.3, 4, 1.0),
    ("epsilon", 0.5, 4, 1.5),
    ("student", 0.5, 2, 1.0),
    ("student", 1.0, 1, 1.0),
    ("locked", 0.5, 2, 7.5),
]


@pytest.mark.parametrize(("name", "strength", "steps", "scale"), CASES)
def test_image_to_image_follows_the_flow_from_the_mixture(folders, name, strength, steps, scale):
    """z = (1 - t) noise + t data, then Euler steps of the guided flow over the rest of the sampler's grid."""
    place = folders["student" if name == "locked" else name]
    model = instaflow.load(place, device="cpu")
    pipeline = stock(StableDiffusionImg2ImgPipeline, place)
    if name == "locked":
        lock_guidance(pipeline.unet)
    latents = model.latents(PROMPT, seeds=1)
    made = pipeline(
        PROMPT,
        image=latents,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=seeded(),
        output_type="latent",
    ).images
    scale = 1.0 if name == "locked" else scale
    noise, view = torch.randn(latents.shape, generator=seeded()), model.model.view()
    timesteps, times = view.grid(steps)
    start = steps - int(steps * strength)
    t = float(times[start])
    z, text = (1 - t) * noise + t * latents, model.model.conditioning([PROMPT], scale)
    for i in range(start, steps):
        x = view.model_input(z, timesteps[i : i + 1])
        v = view.velocity(x, timesteps[i : i + 1], model.model.predict(x, timesteps[i : i + 1], text, scale))
        z = z + float(times[i + 1] - times[i]) * v
    torch.testing.assert_close(made, z, rtol=0, atol=1e-3)
    assert (made - latents).abs().max() > 0.05


def test_image_to_image_takes_images_and_one_step_wants_full_strength(folders):
    pipeline = stock(StableDiffusionImg2ImgPipeline, folders["velocity"])
    how = {"num_inference_steps": 4, "guidance_scale": 1.0, "strength": 0.5}
    made = [
        np.asarray(pipeline(PROMPT, image=photo(seed=seed), generator=seeded(), **how).images[0]).astype(int)
        for seed in (0, 1)
    ]
    assert made[0].shape == (16, 16, 3) and np.abs(made[0] - made[1]).max() > 2  # of the image
    with pytest.raises((ValueError, RuntimeError)):  # no step at all
        pipeline(PROMPT, image=photo(), **(how | {"num_inference_steps": 1}))


@pytest.mark.parametrize("name", ["velocity", "epsilon"])
def test_a_real_image_goes_to_noise_and_comes_back(folders, name):
    model = instaflow.load(folders[name], device="cpu", batch_size=1)
    latents = model.encode([photo((40, 30)), photo(seed=1)])

    def there_and_back(steps):
        found = model.invert(latents, PROMPT, num_steps=steps)
        assert found.shape == latents.shape and found.dtype == torch.float32
        return found, model.latents(PROMPT, noise=found, num_steps=steps, guidance_scale=1.0)

    (_, coarse), (found, back) = there_and_back(10), there_and_back(40)
    error = (back - latents).pow(2).mean().sqrt() / latents.pow(2).mean().sqrt()
    assert error < 0.7 * (coarse - latents).pow(2).mean().sqrt() / latents.pow(2).mean().sqrt()
    assert error < 0.05 or name == "epsilon"  # a random network's noise has a path with sharp bends near the data
    other = model.latents("an odd digit", noise=found, num_steps=40, guidance_scale=1.0)
    assert (other - back).abs().max() > 1e-3
    student = instaflow.load(folders["student"], device="cpu")
    assert len(student("an odd digit", noise=found)) == 2


def test_a_previewed_latent_goes_to_a_larger_model_as_it_is(folders):
    """At strength s the teacher starts from α latent + σ noise: the latent in its own scale, nothing decoded."""
    latents = instaflow.load(folders["student"], device="cpu").latents(PROMPT, seeds=[3])
    refiner = stock(StableDiffusionImg2ImgPipeline, folders["teacher"])
    refiner.scheduler = EulerDiscreteScheduler.from_config(refiner.scheduler.config)
    seen = []
    refiner.unet.register_forward_pre_hook(lambda unet, inputs: seen.append(inputs[0]))
    how = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 1.0}
    refiner(PROMPT, image=latents, generator=seeded(), **how)
    noise, sigma = torch.randn(latents.shape, generator=seeded()), refiner.scheduler.sigmas[2]
    torch.testing.assert_close(seen[0], (latents + sigma * noise) / (sigma**2 + 1).sqrt(), rtol=0, atol=1e-4)


def test_an_xl_student_goes_to_the_refiner(tmp_path):
    model = instaflow.load(write_xl_flow(tmp_path / "xl", "velocity"), device="cpu")
    latents = model.latents(PROMPT, seeds=[3], num_steps=1, guidance_scale=1.0)
    refiner = stock(StableDiffusionXLImg2ImgPipeline, write_refiner(tmp_path / "refiner"))
    seen = []
    refiner.unet.register_forward_pre_hook(lambda unet, inputs: seen.append(inputs[0]))
    how = {"strength": 0.3, "num_inference_steps": 10, "guidance_scale": 1.0}
    made = refiner(PROMPT, image=latents, generator=seeded(), **how).images[0]
    assert made.size == (16, 16) and len(seen) == 3
    noise, sigma = torch.randn(latents.shape, generator=seeded()), refiner.scheduler.sigmas[7]
    torch.testing.assert_close(seen[0], (latents + sigma * noise) / (sigma**2 + 1).sqrt(), rtol=0, atol=1e-4)
