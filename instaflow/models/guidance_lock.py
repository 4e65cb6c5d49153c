"""A student that stock diffusers calls without guidance, whatever guidance_scale is passed.

diffusers skips guidance where a U-Net takes its scale as an input (`time_cond_proj_dim`, as latent consistency models
do). A U-Net whose weights for that input are zero is the same network, and is spared a guidance that would ruin it.
"""

from typing import Any

from torch import nn

from instaflow.models.stacked import StackedUNet

SIZE = 256
"""Of the input, as latent consistency models have it."""


def lock_guidance(unet: Any) -> None:
    """Give a U-Net, in place, an input for the guidance scale that it does not heed."""
    for one in networks(unet):
        embedding = one.time_embedding
        weight = embedding.linear_1.weight
        layer = nn.Linear(SIZE, embedding.linear_1.in_features, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(layer.weight)
        embedding.cond_proj = layer.requires_grad_(False)
        one.register_to_config(time_cond_proj_dim=SIZE)


def unlock_guidance(unet: Any) -> None:
    """Take that input away again, in place; nothing where the network heeds it, or has none."""
    if not is_locked(unet):
        return
    for one in networks(unet):
        one.time_embedding.cond_proj = None
        one.register_to_config(time_cond_proj_dim=None)


def is_locked(unet: Any) -> bool:
    layers = [one.time_embedding.cond_proj for one in networks(unet) if hasattr(one, "time_embedding")]
    return bool(layers) and all(layer is not None and not layer.weight.any() for layer in layers)


def networks(unet: Any) -> list[Any]:
    return [unet, unet.first] if isinstance(unet, StackedUNet) else [unet]
