"""A reader of digits that no training stage ever met: a support vector machine on real handwriting."""

import torch
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from .images import features, real_digits


class DigitReader:
    """Tells which digit an image shows; judges whether a prompt was followed.

    Fitted on the features of two thirds of the real digits, `accuracy` being the share of the rest that it reads
    right. The split is stratified and fixed: every construction gives the same reader.
    """

    accuracy: float

    def __init__(self) -> None:
        images, labels = real_digits()
        fitted, held_out, fitted_labels, held_out_labels = train_test_split(
            features(images), labels.numpy(), test_size=1 / 3, random_state=0, stratify=labels.numpy()
        )
        self._machine = SVC(C=10).fit(fitted, fitted_labels)
        self.accuracy = float(self._machine.score(held_out, held_out_labels))

    def read(self, images: torch.Tensor) -> torch.Tensor:
        """The digit on each image. images: [N, 3, H, W] in [-1, 1]; returns [N], int64."""
        return torch.from_numpy(self._machine.predict(features(images)))
