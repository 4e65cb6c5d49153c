import torch

from instaflow.digits.images import real_digits
from instaflow.digits.reader import DigitReader


def test_the_reader_reads_digits_that_it_was_not_fitted_on():
    reader = DigitReader()
    assert 0.98 < reader.accuracy < 1
    assert DigitReader().accuracy == reader.accuracy


def test_reading_gives_one_label_an_image_and_needs_an_image():
    reader = DigitReader()
    images, labels = real_digits()
    read = reader.read(images)
    assert read.dtype == torch.int64
    assert read.shape == labels.shape
    assert (read == labels).float().mean() > 0.99
    shuffled = images.flatten(2)[:, :, torch.randperm(1024, generator=torch.Generator().manual_seed(0))]
    assert (reader.read(shuffled.reshape(images.shape)) == labels).float().mean() < 0.5
