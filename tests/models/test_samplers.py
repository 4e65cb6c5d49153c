"""Each sampler against stock diffusers' own pipeline, with the same noise, on models of every published family."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)

from instaflow.errors import ConfigError, DataError
from instaflow.models.samplers import SAMPLERS, coupling_scheduler, flow_scheduler, recorded_scheduler
from tests.models.made import (
    SCHEDULE,
    ddim,
    load,
    noise,
    teacher_scheduler,
    write_model,
    write_published,
    write_xl_flow,
)

PROMPTS = ["the digit 7", "an odd digit"]
STOCK = {
    "dpm-solver++": lambda config: DPMSolverMultistepScheduler.from_config(config, timestep_spacing="trailing"),
    "ddim": lambda config: DDIMScheduler.from_config(
        config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    ),
    "pndm": lambda config: PNDMScheduler.from_config(
        config, timestep_spacing="trailing", set_alpha_to_one=True, skip_prk_steps=True
    ),
    "heun": lambda config: HeunDiscreteScheduler.from_config(config, timestep_spacing="trailing"),
    "unipc": lambda config: UniPCMultistepScheduler.from_config(config, timestep_spacing="trailing"),
}
"""What a reader of diffusers' documentation would write."""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    place = tmp_path_factory.mktemp("published")
    return {family: write_published(place / family, family) for family in ("sd1", "sd2-v", "xl")}


@pytest.fixture(scope="module")
def teacher(folders):
    return load(folders["teacher"])


@pytest.fixture(scope="module")
def models(published):
    return {family: load(folder) for family, folder in published.items()}


def stock(folder, **options):
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline_class = {"StableDiffusionPipeline": StableDiffusionPipeline}.get(kind, StableDiffusionXLPipeline)
    pipeline = pipeline_class.from_pretrained(str(folder), local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_latents(pipeline, *, num_steps, guidance_scale, prompts=PROMPTS):
    return pipeline(
        prompts, num_inference_steps=num_steps, guidance_scale=guidance_scale, latents=noise(), output_type="latent"
    ).images


@pytest.mark.parametrize("family", ["sd1", "sd2-v", "xl"])
def test_each_sampler_is_stock_diffusers(published, models, family):
    pipeline, model = stock(published[family]), models[family]
    config = pipeline.scheduler.config
    assert set(STOCK) == set(SAMPLERS)
    for name, make in STOCK.items():
        pipeline.scheduler = make(config)
        scheduler = coupling_scheduler(model, name)
        for num_steps, guidance_scale in [(5, 3.0), (10, 1.0)]:
            ours = model.sample(
                noise(), PROMPTS, num_steps=num_steps, guidance_scale=guidance_scale, scheduler=scheduler
            )
            theirs = stock_latents(pipeline, num_steps=num_steps, guidance_scale=guidance_scale)
            assert torch.isfinite(theirs).all()
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("family", ["sd1", "sd2-v", "xl"])
def test_the_folders_own_sampler_is_stock_diffusers(published, models, family):
    theirs = stock_latents(stock(published[family]), num_steps=5, guidance_scale=3.0, prompts=["", "naïve 七"])
    ours = models[family].sample(noise(), ["", "naïve 七"], num_steps=5, guidance_scale=3.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_samplers_agree_in_the_limit(models):
    """They integrate one and the same flow, so many steps of each end at the same place; a noise of another scale
    would not."""
    ends = {
        name: models["sd1"].sample(
            noise(), PROMPTS, num_steps=50, guidance_scale=1.0, scheduler=coupling_scheduler(models["sd1"], name)
        )
        for name in SAMPLERS
    }
    reference = ends.pop("dpm-solver++")
    for name, end in ends.items():
        assert (end - reference).norm() / reference.norm() < 0.1, name


def test_heuns_noise_is_scaled_by_the_sampler_alone(models):
    scheduler = coupling_scheduler(models["sd1"], "heun")
    scheduler.set_timesteps(5)
    assert scheduler.init_noise_sigma > 10


def test_a_manifest_brings_its_sampler_back(models):
    for name in SAMPLERS:
        scheduler = coupling_scheduler(models["sd1"], name, "leading")
        record = {"class": type(scheduler).__name__, **scheduler.config}
        again = recorded_scheduler({key: value for key, value in record.items() if not key.startswith("_")})
        first, second = (
            models["sd1"].sample(noise(), PROMPTS, num_steps=5, guidance_scale=2.0, scheduler=each)
            for each in (scheduler, again)
        )
        assert torch.equal(first, second)
    with pytest.raises(DataError, match="LCMScheduler"):
        recorded_scheduler({"class": "LCMScheduler"})


def test_a_schedule_without_terminal_signal_is_followed_or_refused(tmp_path):
    ends = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    model = load(write_model(tmp_path / "model", DDIMScheduler(**SCHEDULE, **ends, clip_sample=False)))
    for name in ("dpm-solver++", "ddim", "unipc"):
        latents = model.sample(
            noise(), PROMPTS, num_steps=5, guidance_scale=1.0, scheduler=coupling_scheduler(model, name)
        )
        assert torch.isfinite(latents).all()
    for name in ("pndm", "heun"):
        with pytest.raises(ConfigError, match=name) as caught:
            coupling_scheduler(model, name)
        assert "unipc" in caught.value.hint


def test_samplers_of_the_other_kind_are_refused(folders, models):
    with pytest.raises(ConfigError, match="euler") as caught:
        coupling_scheduler(models["sd1"], "euler")
    assert "ddim" in caught.value.hint
    for name in ("velocity", "epsilon"):
        with pytest.raises(ConfigError, match="heun"):
            coupling_scheduler(load(folders[name]), "heun")
    with pytest.raises(ConfigError, match="timestep_spacing"):
        coupling_scheduler(load(folders["velocity"]), None, "trailing")


# --- Stable Diffusion XL ----------------------------------------------------------------------------------------------


def test_xl_embeddings_are_stock_diffusers(published, models):
    pipeline, model = stock(published["xl"]), models["xl"]
    for prompt in ("the digit 7", "", "seven " * 30):
        hidden, no_hidden, pooled, no_pooled = pipeline.encode_prompt(prompt)
        torch.testing.assert_close(model.embed([prompt]), (hidden, pooled))
        torch.testing.assert_close(model.embed([None]), (no_hidden, no_pooled))
        assert not no_hidden.any() and not no_pooled.any()
    both, _ = model.embed([None, "", None, "a digit"])
    assert not both[[0, 2]].any() and both[1].any()


def test_xl_time_ids_are_pixels(models):
    added = models["xl"].encode(PROMPTS)["added_cond_kwargs"]
    assert added["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_an_xl_whose_empty_prompt_is_encoded(published, tmp_path):
    folder = tmp_path / "model"
    stock(published["xl"]).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    model = load(folder)
    theirs = stock_latents(stock(folder), num_steps=3, guidance_scale=3.0)
    torch.testing.assert_close(
        model.sample(noise(), PROMPTS, num_steps=3, guidance_scale=3.0), theirs, rtol=1e-5, atol=1e-5
    )
    assert model.embed([None])[0].any()


@pytest.mark.parametrize("parametrization", ["velocity", "epsilon"])
def test_stock_diffusers_samples_an_xl_flow(tmp_path, parametrization):
    folder = write_xl_flow(tmp_path / "flow", parametrization)
    assert "StableDiffusionXLPipeline.from_pretrained" in (folder / "README.md").read_text()
    model = load(folder)
    for num_steps, guidance_scale in [(1, 1.0), (4, 1.5)]:
        ours = model.sample(noise(), PROMPTS, num_steps=num_steps, guidance_scale=guidance_scale)
        theirs = stock_latents(stock(folder), num_steps=num_steps, guidance_scale=guidance_scale)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    path = model.trajectory(noise(), PROMPTS, num_steps=4, guidance_scale=2.0)
    sampled = model.sample(noise(), PROMPTS, num_steps=4, guidance_scale=2.0)
    torch.testing.assert_close(path.states[-1], sampled, rtol=1e-5, atol=1e-5)


def test_an_xl_autoencoder_stays_in_float32_beside_float16(published):
    model = load(published["xl"], torch.float16)
    assert (model.dtype, model.vae.dtype) == (torch.float16, torch.float32)
    assert load(published["xl"], torch.bfloat16).vae.dtype == torch.bfloat16
    exact = load(published["xl"])
    np.testing.assert_allclose(model.decode(noise()).numpy(), exact.decode(noise()).numpy(), atol=0.01)


# --- what is pinned ------------------------------------------------------------------------------------------


def test_couplings_of_a_teacher_begin_at_the_last_timestep(teacher):
    scheduler = coupling_scheduler(teacher)
    assert scheduler.config.timestep_spacing == "trailing"
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999 and len(scheduler.timesteps) == 25
    assert coupling_scheduler(teacher, "ddim", "leading").config.timestep_spacing == "leading"


@pytest.mark.parametrize(
    "own",
    [
        PNDMScheduler(**SCHEDULE, skip_prk_steps=True),  # Stable Diffusion's; spacing "leading"
        EulerDiscreteScheduler(**SCHEDULE, use_karras_sigmas=True),
        teacher_scheduler(algorithm_type="sde-dpmsolver++", use_exponential_sigmas=True, solver_order=3),
        teacher_scheduler(use_beta_sigmas=False, use_lu_lambdas=True, thresholding=True, final_sigmas_type="sigma_min"),
        ddim(timestep_spacing="leading"),
    ],
    ids=lambda own: type(own).__name__,
)
def test_couplings_are_pinned_whatever_the_folders_sampler(tmp_path, own):
    model = load(write_model(tmp_path / "model", own))
    plain = load(write_model(tmp_path / "plain"))
    pinned, reference = coupling_scheduler(model), coupling_scheduler(plain)
    first = model.sample(noise(), PROMPTS, num_steps=5, guidance_scale=2.0, scheduler=pinned)
    assert torch.equal(first, model.sample(noise(), PROMPTS, num_steps=5, guidance_scale=2.0, scheduler=pinned))
    expected = plain.sample(noise(), PROMPTS, num_steps=5, guidance_scale=2.0, scheduler=reference)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)


def test_a_flow_brings_its_own_sampler(folders):
    for name in ("velocity", "epsilon"):
        model = load(folders[name])
        assert coupling_scheduler(model) is coupling_scheduler(model, "euler") is model.scheduler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_epsilon_flow_keeps_the_teachers_schedule(prediction_type):
    teacher = PNDMScheduler(**SCHEDULE, prediction_type=prediction_type, set_alpha_to_one=False)
    scheduler = flow_scheduler("epsilon", teacher)
    assert torch.equal(scheduler.alphas_cumprod, teacher.alphas_cumprod)
    config = scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == (prediction_type, "trailing")
    assert config.set_alpha_to_one and not config.clip_sample and float(scheduler.final_alpha_cumprod) == 1
