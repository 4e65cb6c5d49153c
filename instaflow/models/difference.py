"""What training made of a teacher: the difference of weights, by itself, of low rank, and added to other models."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from instaflow.errors import ConfigError

DELTA = "delta.safetensors"
LORA = "pytorch_lora_weights.safetensors"
"""Where stock diffusers' load_lora_weights looks in a folder."""
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def weights_of(model: Any) -> dict[str, Tensor]:
    """The weights of a model's networks, named PART.NAME."""
    networks = {part: model.parts.get(part) for part in PARTS}
    return {
        f"{part}.{name}": value
        for part, network in networks.items()
        if network is not None
        for name, value in network.state_dict().items()
    }


def difference(model: Any, teacher: Any) -> dict[str, Tensor]:
    """W - W_teacher of every weight in which the two differ, float32. Raises ConfigError for different networks."""
    ours, theirs = weights_of(model), weights_of(teacher)
    check_alike(model.name, ours, teacher.name, theirs)
    return {name: (value.float() - theirs[name].float()) for name, value in ours.items() if differ(value, theirs[name])}


def differ(one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one, other.to(one.device))


@torch.no_grad()
def add(model: Any, delta: Mapping[str, Tensor], name: str, strength: float = 1.0) -> None:
    """W + strength · delta, in place. Raises ConfigError for a delta of other networks; `name` is where it is from."""
    weights = weights_of(model)
    check_alike(name, delta, model.name, {key: weights[key] for key in delta if key in weights})
    for key, change in delta.items():
        weights[key].add_(strength * change.to(weights[key]))


def check_alike(name: str, ours: Mapping[str, Tensor], other: str, theirs: Mapping[str, Tensor]) -> None:
    """Raises ConfigError unless both have the same names and shapes."""
    odd = sorted(ours.keys() ^ theirs.keys()) or sorted(key for key in ours if ours[key].shape != theirs[key].shape)
    if odd:
        raise ConfigError(
            f"'{name}' and '{other}' are different networks: '{odd[0]}' is not the same in both",
            "Name the very teacher that training began with, or a fine-tuned model of it",
        )


# --- low rank ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRank:
    weights: dict[str, Tensor]  # as stock diffusers reads a LoRA
    error: float  # ‖delta - LoRA‖ / ‖delta‖ over the whole U-Net
    left_out: float  # the same of what no LoRA holds: biases, normalizations


def low_rank(delta: Mapping[str, Tensor], rank: int) -> LowRank:
    """The LoRA of a U-Net's delta: of each matrix the nearest one of that rank (Eckart & Young 1936).

    A convolution [D, C, h, w] is a matrix [D, C h w]. Where a matrix has less than `rank` rows or columns, zeros fill
    up: a LoRA of one rank has one scale.
    """
    found, total, lost, left_out = {}, 0.0, 0.0, 0.0
    for name, change in delta.items():
        if not name.startswith("unet."):
            continue
        squared = float(change.double().square().sum())
        total += squared
        if change.ndim not in (2, 4) or not name.endswith(".weight"):
            left_out += squared
            continue
        down, up = factors(change.flatten(1), rank)
        lost += float((change.flatten(1).double() - up.double() @ down.double()).square().sum())
        module = name.removesuffix(".weight")
        found[f"{module}.lora_A.weight"] = down.reshape(rank, *change.shape[1:]).contiguous()
        found[f"{module}.lora_B.weight"] = (up if change.ndim == 2 else up[:, :, None, None]).contiguous()
    if not total:
        raise ConfigError("The model's U-Net is its teacher's, weight by weight", "Name a model that was trained")
    return LowRank(found, math.sqrt((lost + left_out) / total), math.sqrt(left_out / total))


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, C] and B [D, rank], float32, of which B A is nearest to a matrix [D, C]."""
    exact = matrix.double()
    rows, columns = exact.shape
    if rows <= columns:
        best = torch.linalg.eigh(exact @ exact.T).eigenvectors[:, -rank:]  # [D, r], the largest last
        up, down = best, best.T @ exact
    else:
        best = torch.linalg.eigh(exact.T @ exact).eigenvectors[:, -rank:]
        up, down = exact @ best, best.T
    missing = rank - up.shape[1]
    return (
        torch.nn.functional.pad(down, (0, 0, 0, missing)).float().cpu(),
        torch.nn.functional.pad(up, (0, missing)).float().cpu(),
    )
