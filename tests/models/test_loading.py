"""Loading: folders, single files, and what is refused."""

import json
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from instaflow.errors import DataError
from instaflow.models.loading import load_model
from instaflow.models.tiny import WIDTH, tiny_unet
from instaflow.models.vae import decoded, load_vae
from tests.models.made import load, noise, write_published


@pytest.fixture(scope="module")
def teacher(folders):
    return load(folders["teacher"])


def refused(place, *words):
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        load_model(place, device=torch.device("cpu"))
    assert time.monotonic() - began < 60  # it did not wait for a network
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_no_such_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "nothing", "nothing", "runs/digits/nothing", "/"):
        assert refused(place, str(place)).hint
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "file")


def test_a_hub_name_without_network_or_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "--local-dir" in refused("no-such-owner/no-such-model", "no-such-owner/no-such-model").hint


def test_a_stages_folder_instead_of_its_model(folders, tmp_path):
    refused(tmp_path, "model_index.json")
    shutil.copytree(folders["teacher"], tmp_path / "model")
    assert str(tmp_path / "model") in refused(tmp_path, "model_index.json").hint


def test_another_pipeline(folders, tmp_path):
    folder = shutil.copytree(folders["teacher"], tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    refused(folder, "FluxPipeline", "StableDiffusionPipeline")


FILES = [
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_missing_or_damaged_file(folders, tmp_path, name, damage):
    folder = shutil.copytree(folders["teacher"], tmp_path / "model")
    file = folder / name
    if damage == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    assert refused(folder, str(folder)).hint


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part(folders, tmp_path, part):
    folder = shutil.copytree(folders["teacher"], tmp_path / "model")
    shutil.rmtree(folder / part)
    refused(folder, part)


def test_a_loaded_model_is_frozen(teacher):
    for part in (teacher.unet, teacher.vae, teacher.text_encoder):
        assert not part.training and not any(parameter.requires_grad for parameter in part.parameters())
    assert teacher.latent_shape == (4, 8, 8)


def test_a_network_that_takes_more_than_noise_and_text(folders, tmp_path):
    for changes, words in [({"in_channels": 9}, "9 channels"), ({"time_cond_proj_dim": WIDTH}, "time_cond_proj_dim")]:
        folder = shutil.copytree(folders["teacher"], tmp_path / words)
        tiny_unet(**changes).save_pretrained(folder / "unet")
        assert refused(folder, words).hint


def test_weights_in_half_precision_alone(folders, tmp_path):
    folder = shutil.copytree(folders["teacher"], tmp_path / "model")
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert torch.equal(load(folder).unet.conv_in.weight, load(folders["teacher"]).unet.conv_in.weight)


def test_parts_that_look_at_images_are_not_needed(folders, tmp_path):
    """The safety checker and what feeds it: a hub's model names them, and they are not fetched."""
    folder = shutil.copytree(folders["teacher"], tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text()) | {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    load(folder)


# --- single files -----------------------------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = [
    (r"time_embedding\.linear_1", "time_embed.0"),
    (r"time_embedding\.linear_2", "time_embed.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
    (r"down_blocks\.0\.attentions\.0", "input_blocks.1.1"),
    (r"mid_block\.resnets\.0", "middle_block.0"),
    (r"mid_block\.attentions\.0", "middle_block.1"),
    (r"mid_block\.resnets\.1", "middle_block.2"),
    (r"up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
    (r"up_blocks\.0\.attentions\.(\d)", r"output_blocks.\1.1"),
    *((rf"\.{new}\.(weight|bias)", rf".{old}.\1") for new, old in RESNET.items()),
]
VAE = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.0\.", "up.1."),
    (r"up_blocks\.1\.", "up.0."),
    (r"up\.(\d)\.resnets", r"up.\1.block"),
    (r"up\.(\d)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    ("group_norm", "norm"),
    (r"to_([qkv])", r"\1"),
    (r"to_out\.0", "proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
]


UNET_XL = [(r"add_embedding\.linear_1", "label_emb.0.0"), (r"add_embedding\.linear_2", "label_emb.0.2"), *UNET]
OPEN_CLIP = [
    (r"^text_model\.", ""),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"self_attn\.", "attn."),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    ("final_layer_norm", "ln_final"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
]
CLIP = [(r"^text_model\.", "")]
NETWORKS = {"model.diffusion_model.": ("unet", UNET), "first_stage_model.": ("vae", VAE)}
PARTS = {
    "sd1": NETWORKS | {"cond_stage_model.transformer.text_model.": ("text_encoder", CLIP)},
    "sd2-v": NETWORKS | {"cond_stage_model.model.": ("text_encoder", OPEN_CLIP)},
    "xl": {
        "model.diffusion_model.": ("unet", UNET_XL),
        "first_stage_model.": ("vae", VAE),
        "conditioner.embedders.0.transformer.text_model.": ("text_encoder", CLIP),
        "conditioner.embedders.1.model.": ("text_encoder_2", OPEN_CLIP),
    },
}


def in_one_file(folder, file, family):
    """A folder's weights under the names of the original code, their configuration beside the file."""
    weights = {}
    for prefix, (part, names) in PARTS[family].items():
        (source,) = (folder / part).glob("*.safetensors")
        for name, value in load_file(source).items():
            for new, old in names:
                name = re.sub(new, old, name)
            weights[prefix + name] = value
    save_file(in_open_clip_s_form(weights), file)
    shutil.copytree(folder, file.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors", "instaflow.json"))
    return file


def in_open_clip_s_form(weights):
    """There one matrix holds what attention's queries, keys and values are made with, and the projection is turned."""
    for name in [name for name in weights if re.search(r"resblocks.*q_proj", name)]:
        parts = [weights.pop(name.replace("q_proj", f"{which}_proj")) for which in "qkv"]
        weights[re.sub(r"q_proj\.(\w+)", r"in_proj_\1", name)] = torch.cat(parts)
    for name in [name for name in weights if name.endswith("model.text_projection.weight")]:
        weights[name.removesuffix(".weight")] = weights.pop(name).T.contiguous()
    return weights


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    place = tmp_path_factory.mktemp("single")
    folder = write_published(place / "published", "sd2-v")
    return folder, in_one_file(folder, place / "model.safetensors", "sd2-v")


@pytest.mark.parametrize("family", ["sd1", "sd2-v", "xl"])
def test_a_single_file_is_its_folder(tmp_path, family):
    folder = write_published(tmp_path / "published", family)
    file = in_one_file(folder, tmp_path / "model.safetensors", family)
    one, other = load(file), load(folder)
    assert one.scheduler.config == other.scheduler.config
    sample = [
        model.sample(noise(), ["the digit 7", "a digit"], num_steps=3, guidance_scale=2.0) for model in (one, other)
    ]
    assert torch.equal(*sample)
    images = other.decode(sample[1])
    assert torch.equal(one.decode(sample[0]), images)
    assert torch.equal(decoded(load_vae(str(file), device=torch.device("cpu")), sample[0]), images)


def test_a_single_file_without_its_configuration(single, tmp_path):
    file = shutil.copy(single[1], tmp_path / "other.safetensors")
    assert f"--local-dir {tmp_path / 'other'}" in refused(file, str(tmp_path / "other")).hint
    shutil.copytree(single[1].with_suffix(""), tmp_path / "other")
    load(file)
    (tmp_path / "other" / "vae" / "config.json").unlink()
    refused(file, "vae/config.json")


@pytest.mark.parametrize("part", ["model.diffusion_model.mid", "first_stage_model.decoder.up", "cond_stage_model"])
def test_a_single_file_that_lacks_weights(single, tmp_path, part):
    weights = {name: value for name, value in load_file(single[1]).items() if not name.startswith(part)}
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copytree(single[1].with_suffix(""), tmp_path / "model")
    assert refused(tmp_path / "model.safetensors", "model.safetensors").hint


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_a_pickle_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert ".safetensors" in refused(tmp_path / name, name, "pickle").hint
