"""ADM, the network of EDM's ImageNet-64 (Dhariwal & Nichol 2021, arXiv 2105.05233), as diffusers has it.

EDM's code calls it DhariwalUNet. Its blocks are those of a UNet2DModel with scale and shift, whose resolution changes
inside of residual layers; only names differ, attention's three matrices lie interleaved, and the class is a matrix's
row in place of an embedding.
"""

import re
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor

from instaflow.errors import DataError, reason_of
from instaflow.plurals import counted

State = dict[str, Tensor]
GROUPS = 32  # of each normalization, where a layer has 128 channels or more
MOST_BLOCKS = 16  # of a level
HEAD = 64  # channels of an attention head
PARTS = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}
"""A residual layer's, there and in diffusers."""
LAYERS = {
    "map_layer0": "time_embedding.linear_1",
    "map_layer1": "time_embedding.linear_2",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}
"""Those outside of residual layers, but for the first convolution."""


def network_of(state: State) -> Any:
    """The network, float32, of a state dict of EDM's code, whose names may begin with "model.". Raises DataError.

    Everything about it is read from the names and shapes of the weights.
    """
    state = {name.removeprefix("model."): value.float() for name, value in state.items()}
    check_kind(state)
    try:
        unet: Any = UNet2DModel(**configuration(state))
        unet.load_state_dict(renamed_state(state))
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = reason_of(error)
        raise DataError(f"This is not the whole state of an EDM's ADM network: {reason}", "Extract it anew") from error
    return unet.eval()


def check_kind(state: State) -> None:
    """Raises DataError for another network than ADM."""
    if any("_aux_" in name for name in state):
        raise DataError(
            "These are weights of EDM's DDPM++ or NCSN++ (SongUNet), which are no UNet2DModel: each of their blocks "
            "scales its sum by √½, they have attention of one head, and NCSN++ filters as it changes resolution",
            "Of EDM's networks, ADM can be imported: edm-imagenet-64x64-cond-adm",
        )
    missing = [name for name in ("map_layer0.weight", "out_norm.weight", "out_conv.weight") if name not in state]
    if missing:
        raise DataError(
            f"This is no state dict of EDM's ADM network (DhariwalUNet): it lacks {', '.join(missing)}",
            "It is what net.state_dict() gives, for `net` as EDM's code loads it",
        )
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise DataError(
            f"'{broken[0]}' of this state dict holds numbers that are not finite",
            "Extract it anew; where its training diverged, from an earlier snapshot",
        )
    filters = [value for name, value in state.items() if name.endswith("resample_filter")]
    if any(tuple(value.shape) != (1, 1, 2, 2) or (value != 0.25).any() for value in filters):
        raise DataError(
            "This network filters as it changes resolution otherwise than by means of 2×2 pixels",
            "A UNet2DModel can't do that: take EDM's own edm-imagenet-64x64-cond-adm",
        )


def configuration(state: State) -> dict[str, Any]:
    """A UNet2DModel's, of the network that has these weights."""
    sides = resolutions(state)
    first = state[f"enc.{sides[0]}x{sides[0]}_conv.weight"]
    blocks = len([name for name in state if re.fullmatch(rf"enc\.{sides[0]}x{sides[0]}_block\d+\.conv0\.weight", name)])
    attention = [f"enc.{side}x{side}_block0.qkv.weight" in state for side in sides]
    channels = tuple(len(state[f"enc.{side}x{side}_block0.conv0.weight"]) for side in sides)
    if (first.shape[1], len(state["out_conv.weight"])) != (3, 3):
        taken, given = first.shape[1], len(state["out_conv.weight"])
        raise ValueError(f"it takes {counted(taken, 'channel')} and gives {given}, where 3 and 3 are an image's")
    if first.shape[0] < 4 * GROUPS or any(count % HEAD for count in channels):
        raise ValueError(f"channels of {channels}, where multiples of {HEAD} from {4 * GROUPS} on are known")
    return {
        "sample_size": sides[0],
        "in_channels": first.shape[1],
        "out_channels": len(state["out_conv.weight"]),
        "block_out_channels": channels,
        "layers_per_block": blocks,
        "down_block_types": tuple("AttnDownBlock2D" if on else "ResnetDownsampleBlock2D" for on in attention),
        "up_block_types": tuple("AttnUpBlock2D" if on else "ResnetUpsampleBlock2D" for on in reversed(attention)),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": HEAD,
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,
        "time_embedding_dim": len(state["map_layer0.weight"]),
        "num_class_embeds": state["map_label.weight"].shape[1] if "map_label.weight" in state else None,
    }


def resolutions(state: State) -> list[int]:
    """The sides in pixels that the network works at, the image's first."""
    found = {int(match[1]) for name in state if (match := re.match(r"enc\.(\d+)x\1_block0\.", name))}
    return sorted(found, reverse=True)


def renamed_state(state: State) -> State:
    """The same weights by diffusers' names."""
    sides, blocks, layers = resolutions(state), {}, dict(LAYERS)
    layers[f"enc.{sides[0]}x{sides[0]}_conv"] = "conv_in"
    for level, side in enumerate(sides):
        below = len(sides) - 1 - level  # the decoder begins at the smallest side
        blocks[f"enc.{side}x{side}_down"] = f"down_blocks.{level - 1}.downsamplers.0"
        blocks[f"dec.{side}x{side}_up"] = f"up_blocks.{below - 1}.upsamplers.0"
        for index in range(MOST_BLOCKS):
            blocks[f"enc.{side}x{side}_block{index}"] = f"down_blocks.{level}.resnets.{index}"
            blocks[f"dec.{side}x{side}_block{index}"] = f"up_blocks.{below}.resnets.{index}"
    blocks |= {f"dec.{sides[-1]}x{sides[-1]}_in{index}": f"mid_block.resnets.{index}" for index in (0, 1)}
    renamed = {}
    for name, value in state.items():
        owner, kind = name.rsplit(".", 1)
        if kind == "resample_filter" or owner == "map_augment":
            continue  # means of 2×2 pixels; and what has a say in training alone
        if owner == "map_label":
            renamed["class_embedding.weight"] = value.T.contiguous()
        elif owner in layers:
            renamed[f"{layers[owner]}.{kind}"] = value
        else:
            block, part = owner.rsplit(".", 1)
            renamed |= of_block(blocks[block], part, kind, value)
    return renamed


def of_block(block: str, part: str, kind: str, value: Tensor) -> State:
    """A weight or bias of a residual layer, or of the attention behind it."""
    if part in PARTS:
        return {f"{block}.{PARTS[part]}.{kind}": value}
    attention = block.replace("resnets", "attentions")
    if part == "norm2":
        return {f"{attention}.group_norm.{kind}": value}
    value = value.flatten(1) if kind == "weight" else value  # of a 1×1 convolution
    if part == "proj":
        return {f"{attention}.to_out.0.{kind}": value}
    if part != "qkv":
        raise KeyError(f"it has a part '{part}'")
    # The rows go by head, channel of the head, and which of the three: the first two are diffusers' order.
    thirds = value.unflatten(0, (-1, 3)).unbind(1)
    return {f"{attention}.to_{which}.{kind}": third.contiguous() for which, third in zip("qkv", thirds, strict=True)}
