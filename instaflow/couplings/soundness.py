"""Whether a latent can be an image's, and a found noise noise: one rule for who makes couplings and who verifies."""

import numpy as np

MIN_DEVIATION, MAX_DEVIATION = 1 / 32, 32.0
"""Bounds of a latent's spatial standard deviation. Scaled latents have one near 1, which is what a VAE's scaling factor
is for; digits' lie from 0.7 to 1.1. The bounds are wide on purpose: a network that is not trained yet, and predicts no
noise, ends at about 15 (1 / √ᾱ at Stable Diffusion's last timestep), a sampler that diverges at thousands."""

LEAST_NOISE, MOST_NOISE = 1 / 512, 8.0
"""Bounds of a noise that was found by inversion, which is N(0, 1) only as far as its image is one of the model's;
digits' have 0.8 to 1. Wide for the same reason: a network that is not trained yet, and predicts no noise, leaves of a
latent √ᾱ at the last timestep, 0.07 of it for Stable Diffusion."""


def is_sound(latents: np.ndarray) -> np.ndarray:
    """Which latents can be images: finite, and neither constant nor beyond the bounds of their deviation: bool [B].

    latents: [B, C, H, W], scaled, any float dtype. Ask it of what is stored: rounding counts.
    """
    deviation = spatial_deviation(latents)  # NaN where a latent is not finite, which no bound admits
    return (deviation >= MIN_DEVIATION) & (deviation <= MAX_DEVIATION)


def is_noise(noise: np.ndarray) -> np.ndarray:
    """Which noises can be noise, found by inversion as they are: finite, and not far off in deviation: bool [B].

    noise: [B, C, H, W], any float dtype. Their deviation and root mean square count, which sees an offset too.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.array([np.sqrt(np.square(one.astype(np.float64)).mean()) for one in noise])
    return (spatial_deviation(noise) >= LEAST_NOISE) & (size <= MOST_NOISE)


def fault_of(latent: np.ndarray) -> str | None:
    """What is wrong with one latent [C, H, W], in words that follow "is" or "has"; None where it is sound."""
    if not np.isfinite(latent).all():
        return "is not finite"
    if (latent == latent[:, :1, :1]).all():
        return "is constant"
    deviation = float(spatial_deviation(latent[None])[0])
    if not MIN_DEVIATION <= deviation <= MAX_DEVIATION:
        return f"has standard deviation {deviation:.3g}, not {MIN_DEVIATION:.3g} to {MAX_DEVIATION:.3g}"
    return None


def spatial_deviation(latents: np.ndarray) -> np.ndarray:
    """The root mean square distance of a latent's values from their channel's mean: float64 [B].

    A plain colour has none, however its channels differ.
    """
    deviations = np.empty(len(latents))
    with np.errstate(invalid="ignore"):  # a difference of infinities is NaN
        for row, latent in enumerate(latents):  # one by one: a shard in float64 would be four times its size
            values = latent.reshape(len(latent), -1).astype(np.float64)
            values -= values.mean(axis=1, keepdims=True)
            deviations[row] = np.sqrt(np.square(values).mean())
    return deviations
