"""The digits' protocols: which prompts, which reference, and how an image is judged."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from instaflow.digits import captions, grid_captions
from instaflow.digits.images import cells_of, features, real_images
from instaflow.digits.reader import DigitReader

Reading = tuple[int, ...]
"""The digit that the reader sees in each cell of an image."""
Named = tuple[frozenset[int] | None, ...]
"""The digits that a prompt allows in each cell; None where it says nothing."""


@dataclass(frozen=True)
class Accuracy:
    """The share of what prompts name that is drawn so: of all, and of prompts that no training stage saw."""

    all: float
    unseen: float | None


class DigitsProtocol:
    """What a model's images are asked for and compared with: one digit an image, which is its one cell."""

    side = 1  # of an image, in cells
    judged = "prompts"
    features_in_words = "the image's grey pixels at 8×8, 64 dimensions, in [-1, 1]"
    reader_in_words = (
        "a support vector machine trained on two thirds of the real digits; for an open prompt any digit that it names "
        "counts"
    )

    image_encoding = "none: values as the decoder gives them"
    size_in_words = ""
    kernel_subsets = 10  # the features have few dimensions

    def __init__(self, num_samples: int) -> None:
        self.prompts, self.named, self.unseen = self.asked(num_samples)
        self.reader = DigitReader()
        self.reader_accuracy: float | None = self.reader.accuracy
        self.real_images = real_images(self.side)
        self.num_real = digits = len(self.real_images) * self.side**2
        digest = hashlib.sha256(self.real_images.numpy().tobytes()).hexdigest()[:16]
        self.reference_in_words = f"{digits:,} digits of scikit-learn's copy of the UCI set, SHA-256 {digest}"

    @staticmethod
    def asked(count: int) -> tuple[list[str], list[Named], np.ndarray]:
        """The prompts, what they name, and which of them no training stage saw: [count] each."""
        prompts = captions.evaluation_prompts(count)
        named: list[Named] = [(captions.digits_named(prompt),) for prompt in prompts]
        return prompts, named, np.array([prompt not in captions.TRAINED for prompt in prompts])

    def features(self, images: Tensor) -> np.ndarray:
        """Each cell as a point of the evaluation's space: [N, 3, H, W] in [-1, 1] to [N·cells, 64]."""
        return features(cells_of(images, self.side).flatten(0, 1))

    def observe(self, images: Tensor, batch: slice) -> dict[str, np.ndarray]:
        """What the figures need of the images of a batch of the prompts. images: [N, 3, H, W] in [-1, 1].

        features: each image's cells [N, cells, 64]; readings: what the reader sees there [N, cells].
        """
        shape = (len(images), self.side**2, -1)
        return {
            "features": self.features(images).reshape(shape),
            "readings": np.array(self.readings(images), np.int64),
        }

    def readings(self, images: Tensor) -> list[Reading]:
        """What the reader sees in each image. images: [N, 3, H, W] in [-1, 1]."""
        read = self.reader.read(cells_of(images, self.side).flatten(0, 1))
        return [tuple(cells) for cells in read.view(len(images), -1).tolist()]

    def figures(self, observed: dict[str, np.ndarray]) -> dict[str, float | None]:
        """A row's figures beside those of its features."""
        found = self.accuracy(observed["readings"])
        return {"prompt_accuracy": found.all, "prompt_accuracy_unseen": found.unseen}

    def parts(self, observed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What each image adds to these figures, which are their means [N]; an image of more named cells adds more."""
        right = self.right(observed["readings"])
        named, drawn = (np.array([count(cells) for cells in right], float) for count in (len, sum))
        found = {"prompt_accuracy": drawn / named.mean()}
        if self.unseen.any():
            found["prompt_accuracy_unseen"] = drawn[self.unseen] / named[self.unseen].mean()
        return found

    def reference_features(self, *_: object) -> np.ndarray:
        """Of the real digits [N, 64]: so few that each process has them, and nothing is kept."""
        return self.features(self.real_images)

    def round_trip_features(self, model: Any) -> np.ndarray | None:
        """Of the real digits through a model's autoencoder."""
        return self.features(model.round_trip(self.real_images))

    def real_image(self, index: int) -> Tensor:
        """[3, H, W] in [-1, 1]"""
        return self.real_images[index]

    def told(self, observed: dict[str, np.ndarray], place: int) -> str:
        """What the reader sees in an image, row by row: "7", or "7 2 / 4 9"."""
        reading = observed["readings"][place].tolist()
        rows = [reading[start : start + self.side] for start in range(0, len(reading), self.side)]
        return " / ".join(" ".join(map(str, row)) for row in rows)

    def accuracy(self, readings: Iterable[Sequence[int]]) -> Accuracy:
        """How many cells show a digit that the prompt allows there, of the cells of which it says something."""
        right = self.right(readings)
        unseen = [cells for cells, is_unseen in zip(right, self.unseen, strict=True) if is_unseen]
        return Accuracy(float(np.concatenate(right).mean()), float(np.concatenate(unseen).mean()) if unseen else None)

    def right(self, readings: Iterable[Sequence[int]]) -> list[list[bool]]:
        """Of each image, whether the cells of which its prompt says something show a digit that it allows there."""
        return [
            [digit in allowed for digit, allowed in zip(reading, named, strict=True) if allowed is not None]
            for reading, named in zip(readings, self.named, strict=True)
        ]

    def gallery(self, count: int) -> list[int]:
        """The places of `count` prompts to show, no two alike in what they name: a quarter are unseen ones.

        The others go in turn from those that fix the most cells to those that leave all open.
        """
        first: dict[tuple[bool, Named], int] = {}
        for place, named in enumerate(self.named):
            first.setdefault((bool(self.unseen[place]), named), place)
        unseen = [place for (is_unseen, _), place in first.items() if is_unseen][: count // 4]
        by_fixed: dict[int, list[int]] = {}
        for (is_unseen, named), place in first.items():
            if not is_unseen:
                fixed = sum(allowed is not None and len(allowed) == 1 for allowed in named)
                by_fixed.setdefault(fixed, []).append(place)
        kinds = [by_fixed[fixed] for fixed in sorted(by_fixed, reverse=True)]
        turns = [(turn, kind) for turn in range(count) for kind in range(len(kinds)) if turn < len(kinds[kind])]
        taken = sorted(turns[: count - len(unseen)], key=lambda pick: pick[1])
        return [*(kinds[kind][turn] for turn, kind in taken), *unseen]


class GridProtocol(DigitsProtocol):
    """Four digits in a square, each cell judged as an image of one digit is.

    The Fréchet distance is that of all cells of all images to all real digits, in 64 dimensions, so that it can be read
    beside that of single digits (of four times as many images). Nothing is lost by it: the digits of a real grid are
    independent of one another, and whether each stands where the prompt wants it is what accuracy tells. Whole grids
    have 256 dimensions, whose covariance a few thousand images would mostly get wrong.
    """

    side = 2
    judged = "named cells"
    features_in_words = "each cell's grey pixels at 8×8, 64 dimensions, in [-1, 1]; four cells an image, all in one set"
    reader_in_words = (
        "a support vector machine trained on two thirds of the real digits reads each cell; of the cells that the "
        "prompt names, the share that shows what it says there; a cell that it leaves open does not count"
    )

    @staticmethod
    def asked(count: int) -> tuple[list[str], list[Named], np.ndarray]:
        prompts = grid_captions.evaluation_prompts(count)
        named: list[Named] = [
            tuple(None if digit is None else frozenset({digit}) for digit in grid_captions.cells_named(prompt))
            for prompt in prompts
        ]
        return prompts, named, np.array([grid_captions.is_unseen(prompt) for prompt in prompts])


class ClassProtocol(DigitsProtocol):
    """One digit an image, asked for by its number: for models that know classes and no captions."""

    reader_in_words = "a support vector machine trained on two thirds of the real digits"

    @staticmethod
    def asked(count: int) -> tuple[list[str], list[Named], np.ndarray]:
        digits = [place % 10 for place in range(count)]
        return [str(digit) for digit in digits], [(frozenset({digit}),) for digit in digits], np.zeros(count, bool)


class UnpromptedProtocol(DigitsProtocol):
    """One digit an image, whichever the model likes: for models that take no prompt."""

    reader_in_words = (
        "a support vector machine trained on two thirds of the real digits; without a prompt any digit counts"
    )

    @staticmethod
    def asked(count: int) -> tuple[list[str], list[Named], np.ndarray]:
        return [""] * count, [(captions.DIGITS,)] * count, np.zeros(count, bool)

    def gallery(self, count: int) -> list[int]:
        return list(range(min(count, len(self.prompts))))


PROTOCOLS: dict[str, type[DigitsProtocol]] = {"digits": DigitsProtocol, "digits-grid": GridProtocol}


def unrelated_distance(
    images: Callable[[Sequence[int]], np.ndarray], prompts: Sequence[str], at_a_time: int
) -> float | None:
    """The median distance of two images of one prompt from different noises; None where no prompt stands twice.

    images: gives those at some places, uint8 [places, ...]. prompts: of all of them. at_a_time: so many pairs are read.
    """
    last: dict[str, int] = {}
    pairs = []
    for place, prompt in enumerate(prompts):
        if prompt in last:
            pairs.append((last[prompt], place))
        last[prompt] = place
    if not pairs:
        return None
    far = []
    for start in range(0, len(pairs), at_a_time):
        first, second = zip(*pairs[start : start + at_a_time], strict=True)
        far.append(distances(images(first), images(second)))
    return float(np.median(np.concatenate(far)))


def distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The root mean squared pixel difference, pixels in [-1, 1], of each pair [N]. images, others: uint8 [N, ...]."""
    pairs = zip(images, others, strict=True)  # one after the other: large ones would not fit as floats
    return np.sqrt([np.square(one.astype(np.float32) - other).mean() for one, other in pairs]) / 127.5
