"""Inception's features against torch-fidelity's own and clean-fid's own, by the real architecture at random weights."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from instaflow.errors import DataError
from instaflow.evaluation.features import in_floats
from instaflow.evaluation.inception import inception, load_layers
from tests.evaluation.stand_ins import write_inception

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture(scope="module")
def images():
    """[3, 3, 40, 56], uint8: smooth, with fine stripes that a resize without a filter aliases."""
    rng = np.random.default_rng(0)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(rng.uniform(0, 255, (3, 3, 5, 7))), (40, 56))
    smooth[..., ::2] *= 0.5
    return smooth.to(torch.uint8)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_features_are_torch_fidelity_s(weights, images, no_network):
    ours = inception(weights, device=CPU)
    theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
    (expected,) = theirs(images)
    found = ours(images)
    assert found.dtype == np.float32 and found.shape == (3, ours.dimension) and found.std() > 0.01
    close(found, expected.numpy())
    assert ours.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert "299×299" in ours.resize and ours.sha256[:8] in str(ours) and "2,048" in str(ours)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_features_with_the_clean_resize_are_clean_fid_s(weights, images, tmp_path, no_network):
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    class Scripted(nn.Module):  # the form of the file that clean-fid reads
        def __init__(self):
            super().__init__()
            self.layers = torch.jit.trace(load_layers(weights), torch.zeros(1, 3, 299, 299), check_trace=False)

    torch.jit.script(Scripted()).save(str(tmp_path / "inception-2015-12-05.pt"))
    (tmp_path / "png").mkdir()
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / "png" / f"{number}.png")
    network = InceptionV3W(str(tmp_path), download=False)
    expected = get_folder_features(
        str(tmp_path / "png"), network, num_workers=0, device=CPU, mode="clean", verbose=False
    )
    clean = inception(weights, resize="clean-fid", device=CPU)
    close(clean(images), expected)
    other = inception(weights, device=CPU)
    assert np.abs(other(images) - expected).max() > 1e-2 * np.abs(expected).max()
    assert clean.name != other.name and clean.resize != other.resize and clean.sha256 == other.sha256


def test_neither_batches_nor_the_type_of_images_change_features(weights, images):
    ours = inception(weights, device=CPU)
    whole = ours(images)
    close(ours(images, batch_size=2), whole)
    close(ours(in_floats(images)), whole)


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(DataError, match="holds no weights of torch-fidelity's InceptionV3"):
        inception(tmp_path / "other.pth", device=CPU)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_s_code_does_not_run(tmp_path):
    trap = tmp_path / "trap.pth"
    torch.save({"a": Trap(str(tmp_path / "sprung"))}, trap)
    with pytest.raises(DataError):
        inception(trap, device=CPU)
    trap.write_bytes(pickle.dumps(Trap(str(tmp_path / "sprung"))))
    with pytest.raises(DataError):
        inception(trap, device=CPU)
    assert not (tmp_path / "sprung").exists()
