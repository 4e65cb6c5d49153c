"""Weights of the real formats for tests: random ones, and for CLIP of a tiny architecture."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip import pretrained
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from instaflow.evaluation import clip
from instaflow.evaluation.features import Extractor
from instaflow.evaluation.presets import PRESETS
from instaflow.weights import WEIGHTS

TINY = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
OWN = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear", "resize_mode": "shortest"}


class Blank(FeatureExtractorInceptionV3):
    def load_state_dict(self, state):
        pass


def write_inception(file: Path) -> Path:
    """A file in the format of torch-fidelity's, of weights that keep the size of activations through the layers."""
    torch.save({}, file)
    torch.manual_seed(0)
    with torch.device("meta"):
        network = Blank("inception", ["2048"], feature_extractor_weights_path=str(file))
    network.to_empty(device="cpu")
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.normal_(0, (2 / part.weight[0].numel()) ** 0.5)
        elif isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.weight.fill_(1)
            part.bias.fill_(0.1)
    network.fc.weight.zero_()
    network.fc.bias.zero_()
    torch.save(network.state_dict(), file)
    return file


@contextmanager
def tiny_clip(folder: Path, name: str = "tiny") -> Iterator[Path]:
    """The file of a tiny network, which instaflow knows as `name` for a while, and open_clip by its architecture."""
    (folder / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "weights.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pretrained._PRETRAINED, "tiny-clip", {"own": OWN})
        patch.setitem(clip.NETWORKS, name, ("tiny-clip", "own"))
        yield folder / "weights.bin"


@contextmanager
def small_coco(folder: Path) -> Iterator[Path]:
    """COCO's protocol is of 8×8 images for a while, and its networks' files may be any; that of a tiny CLIP."""
    with tiny_clip(folder, "clip-vit-g-14") as file, pytest.MonkeyPatch.context() as patch:
        for name in ("inception", "clip-vit-g-14"):
            patch.setitem(WEIGHTS, name, replace(WEIGHTS[name], sha256=""))
        patch.setitem(PRESETS, "coco2017-5k", replace(PRESETS["coco2017-5k"], side=8))
        yield file


def pixels(side: int) -> Extractor:
    """The colours of images over a grid of side × side cells, in bytes."""

    def extract(images: Tensor) -> Tensor:
        return adaptive_avg_pool2d(images.float(), side).flatten(1)

    return Extractor("pixels", "pixels", f"means over {side}×{side} cells", 3 * side**2, "", extract)
