"""Weights under the original code's names: what stock diffusers reads of them."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from instaflow.digits.tokenizer import build_tokenizer
from instaflow.errors import ConfigError
from instaflow.models.families import SD1, SD2, XL
from instaflow.models.single_file import original_weights, write_single_file
from instaflow.models.stacked import stack
from instaflow.models.tiny import WIDTH, text_config, tiny_unet, tiny_vae
from tests.models.made import load, write_edm, write_flow


class Parts:
    """A model's networks, as far as a file holds them."""

    def __init__(self, unet, vae, text_encoder, text_encoder_2=None):
        self.unet, self.vae, self.text_encoder, self.text_encoder_2 = unet, vae, text_encoder, text_encoder_2


@pytest.mark.parametrize("family", [SD1, SD2, XL], ids=["sd1", "sd2", "xl"])
def test_stock_diffusers_finds_every_weight_of_the_full_size(family):
    """By name and shape; of its converter, which is another's table."""
    with torch.device("meta"):
        unet, vae = family.build_unet(), family.build_vae()
        parts = Parts(unet, vae, *family.build_text_encoders())
    weights = original_weights(parts)
    for network, back in (
        (unet, convert_ldm_unet_checkpoint(dict(weights), dict(unet.config))),
        (vae, convert_ldm_vae_checkpoint(dict(weights), dict(vae.config))),
    ):
        assert {name: value.shape for name, value in back.items()} == {
            name: value.shape for name, value in network.state_dict().items()
        }
    sizes = {name.split(".")[0] for name in weights}
    assert sizes == {"model", "first_stage_model", "conditioner" if family.is_xl else "cond_stage_model"}


def test_names_and_shapes_are_the_original_codes():
    with torch.device("meta"):
        found = original_weights(Parts(SD1.build_unet(), SD1.build_vae(), *SD1.build_text_encoders()))
    for name, shape in {
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
    }.items():
        assert found[name].shape == shape, name


def test_open_clip_is_joined():
    torch.manual_seed(0)
    config = text_config(build_tokenizer(), layers=2)
    config.hidden_act = "gelu"
    encoder = CLIPTextModel(config)
    found = original_weights(Parts(tiny_unet(), tiny_vae(), encoder))
    assert found["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"].shape == (3 * WIDTH, WIDTH)
    second = CLIPTextModelWithProjection(config)
    found = original_weights(Parts(tiny_unet(), tiny_vae(), encoder, second))
    turned = found["conditioner.embedders.1.model.text_projection"]
    assert torch.equal(turned, second.text_projection.weight.T)
    assert not any("text_model.text_model" in name or "q_proj" in name for name in found if "embedders.1" in name)


def test_what_the_original_code_has_no_names_for_is_refused(tmp_path):
    model = load(write_flow(tmp_path / "flow", "velocity"))
    assert isinstance(model.unet, UNet2DConditionModel)
    model.unet = stack(model.unet)
    for one in (model, load(write_edm(tmp_path / "edm"))):
        with pytest.raises(ConfigError, match="cannot be one file"):
            write_single_file(one, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
