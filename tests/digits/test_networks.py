import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.nn import functional

from instaflow.digits.data import DATA
from instaflow.digits.grid_captions import cells_named
from instaflow.digits.images import real_digits
from instaflow.digits.losses import autoencoder_loss, denoiser_loss, encode_all, measure_scaling_factor
from instaflow.digits.networks import build_autoencoder, build_scheduler, build_text_encoder, build_unet
from instaflow.digits.stream import CaptionLoss
from instaflow.digits.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    return {
        "vae": build_autoencoder(),
        "text_encoder": build_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": build_unet(),
        "scheduler": build_scheduler(),
    }


def token_ids(tokenizer, captions):
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def test_the_parts_are_a_stable_diffusion_pipeline(parts, tmp_path):
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = ["a handwritten seven", "an odd digit"]
    ours, theirs = (
        p(prompts, latents=noise, num_inference_steps=3, guidance_scale=2.0, output_type="latent").images
        for p in (pipeline, loaded)
    )
    assert ours.shape == (2, 4, 8, 8)
    assert torch.equal(ours, theirs)
    assert loaded("three", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


def test_the_schedule_is_stable_diffusions_and_starts_at_its_last_timestep(parts):
    scheduler = parts["scheduler"]
    assert scheduler.alphas_cumprod[[0, -1]].tolist() == pytest.approx([0.99915, 0.004660], abs=1e-5)
    for steps in (25, 1):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps[0] == 999
    assert scheduler.init_noise_sigma == 1


def test_scaled_latents_have_unit_deviation_whatever_the_autoencoder_says(parts):
    vae, images = parts["vae"], real_digits()[0][:300]
    before = vae.config.scaling_factor
    vae.register_to_config(scaling_factor=measure_scaling_factor(vae, images))
    latents = encode_all(vae, images)
    assert latents.shape == (300, 4, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=1e-4)
    assert not latents.requires_grad
    assert vae.config.scaling_factor != before
    torch.testing.assert_close(encode_all(vae, images, batch_size=7), latents, atol=1e-4, rtol=1e-4)


def test_the_denoisers_loss_is_the_error_of_the_noise_that_was_added(parts):
    """A network that solves for the noise has no loss, and one that says nothing has the noise's variance."""
    alphas = parts["scheduler"].alphas_cumprod
    latents, noise = torch.randn(64, 4, 8, 8), torch.randn(64, 4, 8, 8)
    timesteps = torch.arange(64) * 15
    seen = {}

    def oracle(noisy, steps, hidden):
        seen["hidden"] = hidden
        abar = alphas[steps].view(-1, 1, 1, 1)
        return type("Output", (), {"sample": (noisy - abar.sqrt() * latents) / (1 - abar).sqrt()})

    def silent(noisy, steps, hidden):
        return type("Output", (), {"sample": torch.zeros_like(noisy)})

    batch = {
        "latents": latents,
        "noise": noise,
        "timesteps": timesteps,
        "input_ids": token_ids(parts["tokenizer"], ["an odd digit"] * 63 + [""]),
    }
    assert denoiser_loss(oracle, parts["text_encoder"], alphas, **batch) < 1e-8
    silence = denoiser_loss(silent, parts["text_encoder"], alphas, **batch)
    assert silence == pytest.approx(functional.mse_loss(noise, torch.zeros_like(noise)).item())
    assert not torch.allclose(seen["hidden"][0], seen["hidden"][63])


def test_both_losses_reach_every_weight_that_is_used_and_repeat_bit_for_bit(parts):
    images = real_digits()[0][:16]
    batch = {
        "latents": torch.randn(16, 4, 8, 8),
        "noise": torch.randn(16, 4, 8, 8),
        "timesteps": torch.arange(16) * 60,
        "input_ids": token_ids(parts["tokenizer"], ["the digit 3"] * 16),
    }

    def losses_and_gradients():
        networks = [parts["vae"], parts["text_encoder"], parts["unet"]]
        for network in networks:
            network.zero_grad()
        first = autoencoder_loss(parts["vae"], images, torch.Generator().manual_seed(3))
        second = denoiser_loss(parts["unet"], parts["text_encoder"], parts["scheduler"].alphas_cumprod, **batch)
        (first + second).backward()
        weights = [(name, p.grad) for network in networks for name, p in network.named_parameters()]
        return first, second, weights

    once, again = losses_and_gradients(), losses_and_gradients()
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])
    assert [name for name, gradient in once[2] if gradient is None] == []
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(once[2], again[2], strict=True))


def test_the_autoencoders_loss_depends_on_the_generator_alone(parts):
    images = real_digits()[0][:4]
    seeds = (1, 1, 2)
    one, same, other = (autoencoder_loss(parts["vae"], images, torch.Generator().manual_seed(s)) for s in seeds)
    assert one == same
    assert one != other


def test_a_text_encoder_learns_which_digit_a_caption_names_in_which_cell():
    """Half of the named cells after 200 steps; chance is a tenth, and the right digits in any cells a quarter."""
    torch.manual_seed(0)
    data, tokenizer = DATA["digits-grid"](0, torch.device("cpu")), build_tokenizer("digits-grid")
    encoder = build_text_encoder(tokenizer, "digits-grid")
    loss = CaptionLoss(encoder, tokenizer=tokenizer, allowed_by=data.allowed_by, cells=4)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=2e-3, betas=(0.9, 0.99))
    for position in range(0, 200 * 64, 64):
        optimizer.zero_grad()
        loss(data.captions_at("text", position, 64), np.empty((64, 0))).backward()
        optimizer.step()
    captions = data.captions_at("text", 200 * 64, 200)
    read = loss.logits(captions).argmax(-1).tolist()
    cells = [zip(row, cells_named(caption), strict=True) for row, caption in zip(read, captions, strict=True)]
    assert np.mean([said == named for row in cells for said, named in row if named is not None]) > 0.5
