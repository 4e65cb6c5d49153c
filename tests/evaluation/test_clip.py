"""CLIP's features and scores against open_clip's own calls, by a tiny architecture at random weights."""

import numpy as np
import open_clip
import pytest
import torch
from open_clip import pretrained
from PIL import Image
from safetensors.torch import save_file

from instaflow.errors import DataError
from instaflow.evaluation import clip
from instaflow.evaluation.clip import hash_of_tensors, load_clip
from instaflow.evaluation.features import exactly, in_floats
from instaflow.weights import WEIGHTS
from tests.evaluation.stand_ins import OWN, TINY, tiny_clip

CPU = torch.device("cpu")
PROMPTS = ["a cat", "two dogs on a sofa", "words " * 100 + "cut off"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    with tiny_clip(tmp_path_factory.mktemp("clip")) as file:
        yield file


@pytest.fixture
def ours(weights, no_network):
    return load_clip("tiny", weights, device=CPU)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 40, 52), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def of_open_clip(weights, images):
    """Image and text features by the calls of open_clip's own documentation."""
    model, _, prepare = open_clip.create_model_and_transforms(
        "tiny-clip",
        pretrained=str(weights),
        image_mean=OWN["mean"],
        image_std=OWN["std"],
        image_interpolation="bilinear",
    )
    model.eval()
    tokens = open_clip.get_tokenizer("tiny-clip")(PROMPTS)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    with torch.no_grad():
        return model.encode_image(torch.stack([prepare(picture) for picture in pictures])), model.encode_text(tokens)


def test_every_network_is_one_that_open_clip_and_the_weights_know():
    assert set(clip.NETWORKS) <= set(WEIGHTS)
    for name, (architecture, pretraining) in clip.NETWORKS.items():
        assert open_clip.get_model_config(architecture)
        published = pretrained.get_pretrained_cfg(architecture, pretraining)
        assert published["hf_hub"] == WEIGHTS[name].hub[0] + "/"
        assert published.get("quick_gelu", False) == open_clip.get_model_config(architecture).get("quick_gelu", False)


def test_features_and_scores_are_open_clip_s(ours, images, of_open_clip):
    expected, texts = of_open_clip
    with exactly():
        found = ours.images(images)
    assert found.shape == (3, TINY["embed_dim"]) and found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    cosines = torch.nn.functional.cosine_similarity(expected, texts)
    np.testing.assert_allclose(ours.scores(images, PROMPTS), cosines, atol=1e-5)
    assert ours.resize == "Pillow's bilinear, the shorter side to 32, then the middle, 32×32"


def test_neither_batches_nor_the_type_of_images_change_scores(ours, images):
    whole = ours.scores(images, PROMPTS)
    assert np.ptp(whole) > 0.01
    np.testing.assert_allclose(ours.scores(images, PROMPTS, batch_size=2), whole, atol=1e-5)
    np.testing.assert_allclose(ours.scores(in_floats(images), PROMPTS), whole, atol=1e-5)


def test_the_score_is_that_of_the_text_with_its_prefix(ours, images):
    prefixed = ours.scores(images, ["cat", "dog", "bird"], prefix="A photo depicts ")
    whole = ours.scores(images, ["A photo depicts cat", "A photo depicts dog", "A photo depicts bird"])
    np.testing.assert_array_equal(prefixed, whole)
    assert np.abs(prefixed - ours.scores(images, ["cat", "dog", "bird"])).max() > 1e-3


def test_a_long_text_is_cut_to_77_tokens_and_still_ends(ours):
    tokens = ours.tokenize([PROMPTS[2]])
    assert tokens.shape == (1, 77) and tokens[0, -1] == 49407


def test_a_file_of_something_else_is_refused(weights, tmp_path, no_network):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.bin")
    with pytest.raises(DataError, match="holds no weights of OpenCLIP's tiny-clip") as caught:
        load_clip("tiny", tmp_path / "other.bin", device=CPU)
    assert "instaflow weights" in caught.value.hint


def test_the_same_tensors_have_one_hash_in_each_format(weights, ours, tmp_path):
    state = torch.load(weights, weights_only=True)
    backwards = dict(reversed([(name, value.contiguous()) for name, value in state.items()]))
    save_file(backwards, tmp_path / "weights.safetensors")
    assert str(load_clip("tiny", tmp_path / "weights.safetensors", device=CPU)) == str(ours)
    changed = state | {"logit_scale": state["logit_scale"] + 1e-6}
    torch.save(changed, tmp_path / "changed.bin")
    assert str(load_clip("tiny", tmp_path / "changed.bin", device=CPU)) != str(ours)


def test_a_hash_of_tensors_is_of_names_types_shapes_and_values():
    zeros = torch.zeros(2, 3)
    states = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.int()},
        {"a": zeros.T},
        {"a": zeros + 1},
        {"a": zeros, "b": zeros},
    ]
    assert len({hash_of_tensors(state) for state in states}) == len(states)
    turned = torch.arange(6.0).view(3, 2).T
    assert hash_of_tensors({"a": turned}) == hash_of_tensors({"a": turned.contiguous()})
    assert hash_of_tensors({"a": torch.tensor(1.0), "b": zeros}) == hash_of_tensors(
        {"b": zeros, "a": torch.tensor(1.0)}
    )
