"""Text and guidance, sampling, decoding: against stock diffusers."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline

from instaflow.errors import DataError
from instaflow.models.text_to_image import negate_output
from tests.models.made import SCHEDULE, ddim, load, noise, teacher_scheduler, write_model

PROMPTS = ["the digit 7", "an odd digit"]


@pytest.fixture(scope="module")
def teacher(folders):
    return load(folders["teacher"])


def stock(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_latents(pipeline, start, prompts, num_steps, guidance_scale):
    return pipeline(
        prompts, num_inference_steps=num_steps, guidance_scale=guidance_scale, latents=start, output_type="latent"
    ).images


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "velocity", "epsilon"])
def test_samples_are_stock_diffusers(folders, name):
    model, pipeline = load(folders[name]), stock(folders[name])
    for num_steps, guidance_scale in [(1, 1.0), (1, 7.5), (2, 0.0), (4, 1.5), (7, 1.0), (25, 7.5)]:
        ours = model.sample(noise(), PROMPTS, num_steps=num_steps, guidance_scale=guidance_scale)
        theirs = stock_latents(pipeline, noise(), PROMPTS, num_steps, guidance_scale)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler", [EulerDiscreteScheduler(**SCHEDULE), PNDMScheduler(**SCHEDULE, skip_prk_steps=True)]
)
def test_other_schedulers(tmp_path, scheduler):
    """Euler's noise has a standard deviation of 14.6 and its input is scaled; PNDM visits a timestep twice."""
    folder = write_model(tmp_path / "model", scheduler)
    assert isinstance(scheduler, PNDMScheduler) or scheduler.init_noise_sigma > 10
    model, pipeline = load(folder), stock(folder)
    for num_steps, guidance_scale in [(3, 1.0), (5, 3.0)]:
        ours = model.sample(noise(), PROMPTS, num_steps=num_steps, guidance_scale=guidance_scale)
        theirs = stock_latents(pipeline, noise(), PROMPTS, num_steps, guidance_scale)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_steps_and_guidance_default_to_the_folders(folders):
    model = load(folders["velocity"])  # 25 steps, guidance 1.5
    torch.testing.assert_close(
        model.sample(noise(), PROMPTS), model.sample(noise(), PROMPTS, num_steps=25, guidance_scale=1.5), rtol=0, atol=0
    )


def test_a_sample_changes_no_scheduler(teacher):
    """Solvers of several steps keep a memory: the second call must not see the first."""
    first = teacher.sample(noise(), PROMPTS, num_steps=5, guidance_scale=1.0)
    assert torch.equal(first, teacher.sample(noise(), PROMPTS, num_steps=5, guidance_scale=1.0))
    assert teacher.scheduler.num_inference_steps is None


def test_guidance_of_one_or_less_calls_the_network_once(teacher):
    sizes = []
    handle = teacher.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for scale in (0.0, 0.5, 1.0, 1.01):
        teacher.sample(noise(), PROMPTS, num_steps=1, guidance_scale=scale)
    handle.remove()
    assert sizes == [2, 2, 2, 4]


@pytest.mark.parametrize("timestep", [torch.tensor(500), torch.tensor([500, 20])], ids=["scalar", "vector"])
def test_guidance_is_affine_between_the_two_predictions(teacher, timestep):
    prompted, empty = teacher.encode(PROMPTS), teacher.encode([None, None])
    plain = teacher.guided(noise(), timestep, prompted, 1.0)
    unprompted = teacher.guided(noise(), timestep, empty, 0.0)
    guided = teacher.guided(noise(), timestep, teacher.conditioning(PROMPTS, 3.0), 3.0)
    torch.testing.assert_close(guided, unprompted + 3 * (plain - unprompted), rtol=1e-5, atol=1e-5)
    assert (guided - plain).abs().max() > 1e-3


def test_a_trajectory_ends_where_sampling_does(folders):
    for name in ("velocity", "epsilon"):
        model = load(folders[name])
        path = model.trajectory(noise(), PROMPTS, num_steps=4, guidance_scale=2.0)
        sampled = model.sample(noise(), PROMPTS, num_steps=4, guidance_scale=2.0)
        torch.testing.assert_close(path.states[-1], sampled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["velocity", "epsilon"])
def test_a_model_in_bfloat16(folders, name):
    model = load(folders[name], torch.bfloat16)
    latents = model.sample(noise(), PROMPTS, num_steps=2, guidance_scale=1.0)
    assert latents.dtype == torch.float32  # the network alone is in half precision: stored noise is not rounded again
    assert not torch.equal(latents, latents.bfloat16().float())
    path = model.trajectory(noise(), PROMPTS, num_steps=2, guidance_scale=2.0)
    exact = load(folders[name]).trajectory(noise(), PROMPTS, num_steps=2, guidance_scale=2.0)
    assert path.states.dtype == torch.float32
    relative = (path.velocities - exact.velocities).norm() / exact.velocities.norm()
    assert 0 < relative < 0.1


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (ddim(rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
        (teacher_scheduler(prediction_type="flow_prediction"), "'flow_prediction'"),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler"),
    ],
    ids=["no signal", "a flow's prediction", "no noise schedule"],
)
def test_a_diffusion_that_no_flow_can_be_read_from(folders, scheduler, words):
    model = load(folders["teacher"])
    model.scheduler = scheduler
    with pytest.raises(DataError, match=words) as caught:
        model.view()
    assert model.name in caught.value.message and "scheduler_config.json" in caught.value.hint


# --- text -------------------------------------------------------------------------------------------------------------


def test_repeated_prompts_are_encoded_once(teacher):
    sizes = []
    handle = teacher.text_encoder.register_forward_pre_hook(
        lambda module, inputs, keywords: sizes.append(len((inputs or (keywords["input_ids"],))[0])), with_kwargs=True
    )
    several, _ = teacher.embed(["the digit 7", "", "the digit 7", "a digit"])
    handle.remove()
    assert sizes == [3]
    assert torch.equal(several[0], several[2]) and not torch.equal(several[0], several[1])
    for index, prompt in enumerate(["the digit 7", "", "the digit 7", "a digit"]):
        torch.testing.assert_close(several[index], teacher.embed([prompt])[0][0], rtol=1e-5, atol=1e-5)


def test_embeddings_are_stock_diffusers(teacher, folders):
    pipeline = stock(folders["teacher"])
    for prompt in ("the digit 7", "", "naïve 七", "seven " * 30):
        theirs, empty = pipeline.encode_prompt(prompt, "cpu", 1, True)
        torch.testing.assert_close(teacher.embed([prompt])[0], theirs)
        torch.testing.assert_close(teacher.embed([None])[0], empty)


def test_prompts_that_are_too_long_are_cut_and_counted(folders):
    model = load(folders["teacher"])
    length = model.tokenizer.model_max_length
    fits = "digit " * (length - 2)  # start and end take two
    model.encode([fits.strip(), ""])
    assert model.num_truncated == 0
    long = fits + "digit"
    cut, _ = model.embed([long, "a digit", long])
    assert model.num_truncated == 2
    torch.testing.assert_close(cut[0], model.embed([fits.strip()])[0][0], rtol=1e-5, atol=1e-5)


# --- images -----------------------------------------------------------------------------------------------------------


def test_decoded_images_are_stock_diffusers(teacher, folders):
    latents = teacher.sample(noise(), PROMPTS, num_steps=2, guidance_scale=1.0)
    images = teacher.decode(latents)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32 and images.abs().max() <= 1
    theirs = stock(folders["teacher"])(
        PROMPTS, num_inference_steps=2, guidance_scale=1.0, latents=noise(), output_type="np"
    ).images
    np.testing.assert_allclose((images.permute(0, 2, 3, 1).numpy() + 1) / 2, theirs, atol=1e-5)


def test_decoding_clips(teacher):
    assert teacher.decode(1000 * noise()).abs().max() == 1


def test_a_round_trip_is_encode_and_decode(teacher):
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = teacher.vae(images, sample_posterior=False).sample.clamp(-1, 1)
    torch.testing.assert_close(teacher.round_trip(images, batch_size=2), expected, rtol=1e-5, atol=1e-5)


def test_negating_the_output(folders):
    model = load(folders["teacher"])
    embeddings = model.encode(PROMPTS)
    before = model.guided(noise(), torch.tensor(500), embeddings, 1.0)
    negate_output(model.unet)
    assert torch.equal(model.guided(noise(), torch.tensor(500), embeddings, 1.0), -before)
    assert before.abs().max() > 0.1
