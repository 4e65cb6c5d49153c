import numpy as np
import pytest

from instaflow.couplings.soundness import MAX_DEVIATION, MIN_DEVIATION, fault_of, is_sound, spatial_deviation

SOUND = np.random.default_rng(0).standard_normal((4, 8, 8))
PLAIN = np.broadcast_to(np.array([-1.0, 0.5, 2.0, 3.0])[:, None, None], (4, 8, 8))


def one_value(value):
    latent = SOUND.copy()
    latent[2, 3, 4] = value
    return latent


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("latent", "fault"),
    [
        (SOUND, None),
        (SOUND + PLAIN, None),
        (15 * SOUND, None),  # what a network makes that predicts no noise
        (one_value(np.nan), "is not finite"),
        (one_value(np.inf), "is not finite"),
        (one_value(-np.inf), "is not finite"),
        (0 * SOUND, "is constant"),
        (PLAIN, "is constant"),
        (PLAIN + 0.01 * SOUND, "has standard deviation 0.0"),
        (0.01 * SOUND, "has standard deviation 0.0"),
        (100 * SOUND, "has standard deviation 1"),
        (one_value(60000), "has standard deviation 3.72e+03, not 0.0312 to 32"),
    ],
)
def test_a_latent_is_sound_or_its_fault_is_told(latent, fault, dtype):
    latent = latent.astype(dtype)
    told = fault_of(latent)
    assert told is None if fault is None else told.startswith(fault)
    assert is_sound(np.stack([SOUND.astype(dtype), latent])).tolist() == [True, fault is None]


def test_the_deviation_is_that_within_channels():
    latents = np.stack([SOUND, SOUND + PLAIN, 3 * SOUND])
    deviation = np.sqrt(SOUND.var(axis=(1, 2)).mean())
    np.testing.assert_allclose(spatial_deviation(latents), [deviation, deviation, 3 * deviation], rtol=1e-12)


@pytest.mark.parametrize("bound", [MIN_DEVIATION, MAX_DEVIATION])
def test_word_and_verdict_agree_at_the_bounds(bound):
    unit = SOUND / spatial_deviation(SOUND[None])[0]
    latents = np.stack([unit * bound * factor for factor in np.linspace(1 - 1e-15, 1 + 1e-15, 31)])
    assert is_sound(latents).tolist() == [fault_of(latent) is None for latent in latents]
    assert 0 < is_sound(latents).sum() < 31


def test_no_latents_are_no_verdicts():
    assert is_sound(np.empty((0, 4, 8, 8), np.float16)).tolist() == []
