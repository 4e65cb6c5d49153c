"""Differences of weights: nearest of a rank, added again, refused where networks differ."""

import pytest
import torch

from instaflow.errors import ConfigError
from instaflow.models.difference import add, difference, factors, low_rank, weights_of
from instaflow.models.stacked import stack
from tests.models.made import load, write_model


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_of_all_matrices_of_a_rank_it_is_the_nearest(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(matrix.double())
    for rank in (1, 3, 8):
        down, up = factors(matrix, rank)
        assert down.shape == (rank, shape[1]) and up.shape == (shape[0], rank)
        lost = (matrix - up @ down).double().norm()
        torch.testing.assert_close(lost, values[rank:].norm(), rtol=1e-4, atol=1e-5)


def test_the_error_counts_what_no_lora_holds():
    torch.manual_seed(0)
    one = torch.randn(4, 1) @ torch.randn(1, 27)
    found = low_rank({"unet.a.weight": one.reshape(4, 3, 3, 3), "unet.b.bias": torch.zeros(4)}, 1)
    assert found.error < 1e-3 and found.left_out == 0
    assert found.weights["unet.a.lora_A.weight"].shape == (1, 3, 3, 3)
    assert found.weights["unet.a.lora_B.weight"].shape == (4, 1, 1, 1)
    bias = torch.full((4,), float(one.norm()) / 2)  # as large as the matrix
    found = low_rank({"unet.a.weight": one, "unet.b.bias": bias, "vae.a.weight": one}, 1)
    assert found.error == pytest.approx(0.5**0.5) == pytest.approx(found.left_out)
    with pytest.raises(ConfigError, match="weight by weight"):
        low_rank({}, 1)


def test_added_to_the_teacher_it_is_the_model(tmp_path):
    one, other = load(write_model(tmp_path / "one")), load(write_model(tmp_path / "other", seed=1))
    delta = difference(other, one)
    assert {name.partition(".")[0] for name in delta} == {"unet", "vae", "text_encoder"}
    add(one, delta, "delta")
    for name, value in weights_of(other).items():
        torch.testing.assert_close(weights_of(one)[name], value, rtol=0, atol=1e-6)
    assert not difference(other, other)


def test_other_networks_are_refused(tmp_path):
    one, other = load(write_model(tmp_path / "one")), load(write_model(tmp_path / "other"))
    other.unet = stack(other.unet)
    with pytest.raises(ConfigError, match="different networks: 'unet"):
        difference(one, other)
    with pytest.raises(ConfigError, match="different networks"):
        add(one, {"unet.conv_in.weight": torch.zeros(1)}, "a delta")
    with pytest.raises(ConfigError, match="different networks"):
        add(one, {"unet.conv_of_old.weight": torch.zeros(1)}, "a delta")
