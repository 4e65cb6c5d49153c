import numpy as np
import torch
from sklearn.datasets import load_digits

from instaflow.digits.images import features, real_digits


def test_all_digits_are_there_once_in_range_and_in_the_data_sets_order():
    images, labels = real_digits()
    assert images.shape == (1797, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1
    assert labels.dtype == torch.int64
    assert np.array_equal(labels.numpy(), load_digits().target)


def test_enlarged_digits_still_look_like_the_scans():
    scans = load_digits().images.reshape(1797, 64) / 8 - 1
    read = features(real_digits()[0])
    assert read.shape == (1797, 64)
    assert read.dtype == np.float64
    correlation = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(scans, read, strict=True)])
    assert correlation.min() > 0.9


def test_features_are_the_grey_means_of_squares():
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    expected = images.double().mean(1).reshape(5, 8, 4, 8, 4).mean((2, 4)).reshape(5, 64)
    np.testing.assert_allclose(features(images), expected, atol=1e-12)


def test_features_of_one_bright_corner_are_in_row_order():
    images = -torch.ones(1, 3, 32, 32)
    images[:, :, :4, 4:8] = 1
    assert features(images)[0].argmax() == 1
    assert features(images).max() == 1
