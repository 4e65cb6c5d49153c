"""Two U-Nets in series, InstaFlow-1.7B's network, for which diffusers has no class.

This file stands alone: each folder of such a model holds a copy, by which stock diffusers loads it.
"""

from functools import wraps
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401  (by ModelMixin, here, diffusers knows a model)
from torch import Tensor, nn

UNet: Any = UNet2DConditionModel


class StackedUNet(UNet):
    """A U-Net that takes the features of another one, `first`: the same with weights of its own.

    Between the two, what made a latent of features and features of a latent is left out: the first ends before its
    output's normalization and convolution, the second begins behind its input's convolution. Both take the same
    timestep and text. The configuration is that of either. With Stable Diffusion 1.5's: 320 features, and 1,719,017,924
    parameters where one U-Net has 859,520,964.
    """

    @wraps(UNet.__init__)  # type: ignore[misc]  # by whose signature diffusers knows the keys of a configuration
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.first = UNet(**config)
        self.first.conv_norm_out, self.first.conv_out, self.conv_in = None, nn.Identity(), nn.Identity()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """What a UNet2DConditionModel returns, from what a text-to-image pipeline gives it; sample: [B, C, H, W].

        A ControlNet's or an adapter's residuals are refused: they were made for one U-Net.
        """
        conditions = {
            "timestep_cond": timestep_cond,
            "cross_attention_kwargs": cross_attention_kwargs,
            "added_cond_kwargs": added_cond_kwargs,
        }
        features = self.first(sample, timestep, encoder_hidden_states, **conditions, return_dict=False)[0]
        return super().forward(features, timestep, encoder_hidden_states, **conditions, return_dict=return_dict)


def stack(unet: Any) -> StackedUNet:
    """Two copies of a U-Net in series, which at the start return exactly what the one does.

    The second copy expects what the convolution at a U-Net's beginning makes. The first makes that too, and its last
    residual layer still sees it, by the outermost skip connection. So this layer is set to let it through and nothing
    else: zero are its branch, the attention behind it, and its shortcut but for an identity on the skip connection. All
    other weights of the first copy are the U-Net's, and training opens the way for what they make.

    Plain copies would begin far off, and with the normalization kept between them too: what the first one's last block
    makes is not what the second one's first block knows.
    """
    network: StackedUNet = StackedUNet.from_config(unet.config)
    weights, names = unet.state_dict(), network.state_dict().keys()
    network.load_state_dict({name: weights[name.removeprefix("first.")] for name in names})
    let_through(network.first)
    return network.to(unet.device).requires_grad_(False).eval()


@torch.no_grad()
def let_through(first: Any) -> None:
    """Make a first U-Net, in place, return what its first convolution makes: [B, D, H, W]."""
    block, size = first.up_blocks[-1], first.conv_in.out_channels
    layer = block.resnets[-1]
    closed = [layer.conv2, layer.conv_shortcut]
    if hasattr(block, "attentions"):
        closed.append(block.attentions[-1].proj_out)
    for module in closed:
        for parameter in module.parameters():
            parameter.zero_()
    layer.conv_shortcut.weight[:, -size:, 0, 0] = torch.eye(size)
