"""Loading: folders, single files, and what is refused."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from instaflow.errors import DataError
from instaflow.models.loading import load_model
from instaflow.models.single_file import write_single_file
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


def in_one_file(folder, file):
    """A folder's weights under the names of the original code, their configuration beside the file."""
    write_single_file(load(folder), file)
    shutil.copytree(folder, file.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors", "instaflow.json"))
    return file


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    place = tmp_path_factory.mktemp("single")
    folder = write_published(place / "published", "sd2-v")
    return folder, in_one_file(folder, place / "model.safetensors")


@pytest.mark.parametrize("family", ["sd1", "sd2-v", "xl"])
def test_a_single_file_is_its_folder(tmp_path, family):
    folder = write_published(tmp_path / "published", family)
    file = in_one_file(folder, tmp_path / "model.safetensors")
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
