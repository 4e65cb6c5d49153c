"""A Stable Diffusion's weights in one file, under the names of the original code: what most user interfaces read."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from instaflow.errors import ConfigError
from instaflow.models.stacked import StackedUNet

Rule = tuple[str, str | Callable[[re.Match[str]], str]]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE: list[Rule] = [
    (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", r"up.\1.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", r"up.\1.upsample"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]
CLIP: list[Rule] = [(r"^(text_model\.)?", "transformer.text_model.")]
OPEN_CLIP: list[Rule] = [
    (r"^(text_model\.)?", "model."),
    (r"encoder\.layers", "transformer.resblocks"),
    (r"self_attn\.", "attn."),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"final_layer_norm", "ln_final"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
]


def write_single_file(model: Any, file: Path) -> None:
    """Write a TextToImage's weights. Raises ConfigError for one that has no such names."""
    if model.vae is None or isinstance(model.unet, StackedUNet):
        raise ConfigError(
            f"'{model.name}' cannot be one file: the original code has no {'two U-Nets' if model.vae else 'pixels'}",
            "Export it as a folder for diffusers",
        )
    weights = {name: value.cpu().contiguous() for name, value in original_weights(model).items()}
    save_file(weights, file, metadata={"format": "pt"})


def original_weights(model: Any) -> dict[str, Tensor]:
    """The weights of U-Net, VAE and text encoders, as the original code names and shapes them."""
    found = {"model.diffusion_model." + name: value for name, value in renamed(model.unet, unet_rules(model.unet))}
    last = len(model.vae.config.block_out_channels) - 1
    rules = [*VAE, (r"decoder\.up\.(\d)", lambda found: f"decoder.up.{last - int(found[1])}")]
    for name, value in renamed(model.vae, rules):  # its attention is by convolutions there
        is_matrix = "attn_1" in name and value.ndim == 2
        found["first_stage_model." + name] = value[:, :, None, None] if is_matrix else value
    if model.text_encoder_2 is not None:
        encoders = [
            ("conditioner.embedders.0.", model.text_encoder),
            ("conditioner.embedders.1.", model.text_encoder_2),
        ]
    else:
        encoders = [("cond_stage_model.", model.text_encoder)]
    for prefix, encoder in encoders:
        is_open = encoder is model.text_encoder_2 or encoder.config.hidden_act != "quick_gelu"  # OpenCLIP's, not CLIP's
        text = dict(renamed(encoder, OPEN_CLIP if is_open else CLIP))
        found |= {prefix + name: value for name, value in (joined(text) if is_open else text).items()}
    return found


def renamed(network: Any, rules: list[Rule]) -> list[tuple[str, Tensor]]:
    """Names and values of a network's weights, each name by every rule in turn."""
    found = []
    for name, value in network.state_dict().items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        found.append((name, value))
    return found


def unet_rules(unet: Any) -> list[Rule]:
    """The original code numbers a U-Net's layers through, where diffusers has blocks of layers."""
    layers = unet.config.layers_per_block
    each = layers + 1  # in a block on the way down with what halves the size; on the way up

    def down(found: re.Match[str]) -> str:
        return f"input_blocks.{1 + each * int(found[1]) + int(found[3])}.{int(found[2] == 'attentions')}"

    def up(found: re.Match[str]) -> str:
        return f"output_blocks.{each * int(found[1]) + int(found[3])}.{int(found[2] == 'attentions')}"

    def enlarged(found: re.Match[str]) -> str:
        block = int(found[1])
        attends = int(hasattr(unet.up_blocks[block], "attentions"))
        return f"output_blocks.{each * block + layers}.{1 + attends}"

    return [
        *((rf"(resnets\.\d+)\.{new}\.", rf"\1.{old}.") for new, old in RESNET.items()),
        (r"time_embedding\.linear_1", "time_embed.0"),
        (r"time_embedding\.linear_2", "time_embed.2"),
        (r"add_embedding\.linear_1", "label_emb.0.0"),
        (r"add_embedding\.linear_2", "label_emb.0.2"),
        (r"^conv_in", "input_blocks.0.0"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
        (r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)", down),
        (r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda found: f"input_blocks.{each * (int(found[1]) + 1)}.0.op"),
        (r"mid_block\.resnets\.(\d)", lambda found: f"middle_block.{2 * int(found[1])}"),
        (r"mid_block\.attentions\.0", "middle_block.1"),
        (r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)", up),
        (r"up_blocks\.(\d)\.upsamplers\.0", enlarged),
    ]


def joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's text encoder: one matrix makes queries, keys and values, and the last projection is turned."""
    found = {}
    for name, value in weights.items():
        if name.endswith("text_projection.weight"):
            found[name.removesuffix(".weight")] = value.T
        elif match := re.fullmatch(r"(.*attn\.)q_proj\.(\w+)", name):
            parts = [weights[f"{match[1]}{which}_proj.{match[2]}"] for which in "qkv"]
            found[f"{match[1]}in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"attn\.[kv]_proj\.", name):
            found[name] = value
    return found
