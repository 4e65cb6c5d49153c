import numpy as np
import pytest
import torch
from PIL import Image

from instaflow.evaluation.features import autoencoder, classifier, exactly, in_bytes, in_floats, lanczos, pixels
from instaflow.models.tiny import tiny_vae
from instaflow.training.perceptual import PerceptualNetwork, small_layers


def images(count=4, side=32):
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_type_of_number_becomes_the_byte_next_to_it(dtype):
    values = torch.tensor([-3.0, -1, -0.25, 0, 0.5, 1, 1.5], dtype=dtype).view(1, 1, 1, -1)
    assert in_bytes(values).flatten().tolist() == [0, 0, 96, 128, 191, 255, 255]


def test_bytes_come_through_floats_unchanged():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(in_bytes(in_floats(every)), every)


def test_lanczos_is_pillow_s():
    big = images(2, 64)
    expected = Image.fromarray(big[1].permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.LANCZOS)
    small = lanczos(big, 16)
    assert small.shape == (2, 3, 16, 16)
    np.testing.assert_array_equal(small[1].permute(1, 2, 0), np.asarray(expected))


def test_pixels_are_the_cells_means():
    found = pixels(4)(images())
    by_hand = (images().numpy().reshape(4, 3, 4, 8, 4, 8) / 127.5 - 1).mean((3, 5)).reshape(4, -1)
    assert found.shape == (4, pixels(4).dimension) and found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand, atol=1e-5)
    assert str(pixels()) == "pixels in [-1, 1], 192 dimensions; means over 8×8 cells"


def test_an_autoencoder_s_are_the_cells_means_of_its_mean_latents():
    torch.manual_seed(0)
    vae = tiny_vae(scaling_factor=0.7).requires_grad_(False).eval()
    extractor = autoencoder(vae, "abc")
    found = extractor(images(), batch_size=3)
    means = vae.encode(in_floats(images())).latent_dist.mean * 0.7
    side = means.shape[-1] // 4
    by_hand = means.view(4, -1, 4, side, 4, side).mean((3, 5)).reshape(4, -1)
    assert found.shape == (4, extractor.dimension) and extractor.sha256 == "abc"
    np.testing.assert_allclose(found, by_hand, atol=1e-5)


def test_a_classifier_s_are_its_last_layer_averaged_over_places():
    torch.manual_seed(0)
    network = PerceptualNetwork(small_layers([3, 4, 6], [1, 2]), [2, 4], of_imagenet=False)
    extractor = classifier(network, "abc", device=torch.device("cpu"))
    found = extractor(in_floats(images()), batch_size=3)
    assert found.shape == (4, 6) and extractor.dimension == 6
    np.testing.assert_allclose(found, network(in_floats(images()))[-1].flatten(2).mean(2), atol=1e-6)


def test_the_precision_of_others_is_put_back():
    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), exactly():
        assert not torch.backends.cudnn.allow_tf32 and torch.is_inference_mode_enabled()
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32 == before and not torch.is_inference_mode_enabled()
