"""How images are judged by the papers' protocols: beside real ones from a folder, by an extractor, and by a CLIP."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from instaflow.evaluation.clip import Clip
from instaflow.evaluation.features import Extractor, in_bytes, lanczos
from instaflow.evaluation.presets import Preset
from instaflow.evaluation.references import CENTRE, RealImages, reference_features


class ImageProtocol:
    """Images are compared with a folder of real ones by an extractor, and with their prompts by a CLIP."""

    side = 1
    judged = "prompts"
    kernel_subsets = 100
    reader_accuracy: float | None = None

    def __init__(
        self,
        preset: Preset,
        prompts: Sequence[str],
        real: RealImages,
        extractor: Extractor,
        clip: Clip | None,
        prefix: str = "",
        batch_size: int = 32,
    ) -> None:
        self.preset, self.real, self.extractor, self.clip, self.prefix = preset, real, extractor, clip, prefix
        self.prompts, self.batch_size = list(prompts), batch_size
        self.unseen, self.num_real = np.zeros(len(prompts), bool), len(real)
        self.features_in_words = str(extractor)
        before = f", each caption after {prefix!r}" if prefix else ""
        score = "CLIP score, the mean cosine of image and caption"
        self.reader_in_words = f"{score}: {clip}, {clip.resize}{before}" if clip else ""
        told = preset.told_of(len(real))
        self.reference_in_words = f"{real}; {CENTRE}, to {preset.side}×{preset.side}" + (f"; {told}" if told else "")
        self.size_in_words = f"to {preset.side}×{preset.side} by Pillow's Lanczos filter"
        self.image_encoding = "8 bits, as PNG keeps them"

    def observe(self, images: Tensor, batch: slice) -> dict[str, np.ndarray]:
        """features [N, 1, D], with a CLIP scores [N], of a batch's images [N, 3, H, W] in [-1, 1]."""
        small = in_bytes(images)
        if small.shape[-1] != self.preset.side:
            small = lanczos(small, self.preset.side)
        found = {"features": self.extractor(small, self.batch_size)[:, None]}
        if self.clip:
            prompts = self.prompts[batch]
            found["scores"] = self.clip.scores(images, prompts, prefix=self.prefix, batch_size=self.batch_size)
        return found

    def figures(self, observed: dict[str, np.ndarray]) -> dict[str, float | None]:
        """A row's figures beside those of its features."""
        return {"clip_score": float(observed["scores"].mean()) if self.clip else None}

    def parts(self, observed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What each image adds to these figures, which are their means [N]."""
        return {"clip_score": observed["scores"]} if self.clip else {}

    def reference_features(self, folder: Path, leave: Callable[[], None]) -> np.ndarray:
        """Of the real images [N, D]: see `references.reference_features`."""
        return reference_features(self.real, self.extractor, self.preset.side, self.batch_size, folder, leave)

    def real_image(self, index: int) -> Tensor:
        """[3, H, W], uint8."""
        return self.real.image(index, self.preset.side)

    def told(self, observed: dict[str, np.ndarray], place: int) -> str:
        """What a reader sees in an image: here there is none."""
        return ""

    def round_trip_features(self, model: object) -> np.ndarray | None:
        """Of the real images through a model's autoencoder: not measured here."""
        return None

    def gallery(self, count: int) -> list[int]:
        return list(range(min(count, len(self.prompts))))
