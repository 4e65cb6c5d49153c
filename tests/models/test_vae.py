import pytest
import torch

from instaflow.errors import DataError
from instaflow.models.loading import load_model
from instaflow.models.vae import decoded, encoded, load_autoencoder, load_vae
from tests.models.made import write_model

CPU = torch.device("cpu")


def test_the_vae_alone_decodes_as_the_whole_model_does(tmp_path):
    place = str(write_model(tmp_path / "model"))
    whole = load_model(place, device=CPU)
    latents = torch.randn(2, *whole.latent_shape)
    images = decoded(load_vae(place, device=CPU), latents)
    assert images.shape[1] == 3 and images.abs().max() <= 1
    assert torch.equal(images, whole.decode(latents))


def test_a_vae_that_cannot_be_loaded_is_an_error(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match=r"The VAE of '.*' cannot be loaded"):
        load_vae(str(folder), device=CPU)


def test_an_autoencoder_in_a_folder_of_its_own_encodes_as_the_pipeline_s_does(tmp_path):
    folder = write_model(tmp_path / "model")
    alone = load_autoencoder(folder / "vae", device=CPU)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(encoded(alone, images), encoded(load_vae(str(folder), device=CPU), images))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match=r"The autoencoder '.*' cannot be loaded"):
        load_autoencoder(folder / "vae", device=CPU)
