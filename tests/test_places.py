"""Where models lie: what is found, fetched and refused, and when a model counts as another one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from instaflow.errors import DataError
from instaflow.places import (
    CONFIGURATION,
    WEIGHTS,
    backbone_file,
    cached_model,
    check_network,
    check_perceptual,
    find_model,
    is_hub_name,
    is_to_import,
    kind_of_extractor,
    model_fingerprint,
    pipeline_class,
)
from instaflow.sections import Perceptual
from instaflow.weights import WEIGHTS as FILES

COMMITS = ["0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98"]


def write_pipeline(folder: Path, class_name: str = "StableDiffusionPipeline", weights: bool = True) -> Path:
    """The files of a Stable Diffusion, with nothing sensible in them."""
    for name, *_ in CONFIGURATION + (WEIGHTS if weights else ()):
        file = folder / name.replace("*", "diffusion_pytorch_model")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with no way out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def publish(cache: Path, name: str, commit: str) -> Path:
    """What a download leaves in the cache."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    return write_pipeline(place / "snapshots" / commit)


def refused(place: str | Path, *words: str) -> DataError:
    with pytest.raises(DataError) as caught:
        find_model(str(place))
    for word in words:
        assert word in caught.value.message, caught.value.message
    assert caught.value.hint
    return caught.value


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pipeline(tmp_path / "mine" / "model")
    assert is_hub_name("stabilityai/stable-diffusion-xl-base-1.0")
    for place in ("mine/model", "models/sd15.safetensors", "models/sd15.ckpt", "one", "a/b/c", "/abs", "../up/there"):
        assert not is_hub_name(place), place


def test_a_folder_to_be_imported_is_known_by_its_name_and_looked_for_on_no_hub(tmp_path: Path) -> None:
    for place in ("teachers/edm-imagenet-64x64-cond-adm", str(tmp_path / "edm-cifar10-32x32-cond-adm")):
        assert is_to_import(place) and not is_hub_name(place)
        with pytest.raises(DataError, match="There is no model") as caught:
            find_model(place)
        assert caught.value.hint.endswith(f"instaflow import-edm STATE.safetensors {place}")
    (tmp_path / "edm-cifar10-32x32-cond-adm").mkdir()
    assert not is_to_import(place)


def test_a_cached_model_is_its_commit(cache: Path) -> None:
    folder = publish(cache, "owner/name", COMMITS[0])
    assert find_model("owner/name") == folder
    assert model_fingerprint("owner/name") == f"owner/name@{COMMITS[0]}"
    publish(cache, "owner/name", COMMITS[1])  # the model was changed, and downloaded anew
    assert model_fingerprint("owner/name") == f"owner/name@{COMMITS[1]}"


@pytest.mark.parametrize("lost", ["unet/diffusion_pytorch_model.safetensors", "model_index.json", "scheduler"])
def test_a_download_that_was_cut_short_is_not_here(cache: Path, lost: str) -> None:
    folder = publish(cache, "owner/name", COMMITS[0])
    assert cached_model("owner/name") == folder
    path = folder / lost
    path.rename(cache / "elsewhere")
    assert cached_model("owner/name") is None
    refused("owner/name", "owner/name")


ASK = """
import sys, time
from instaflow.errors import DataError
from instaflow.places import find_model

began = time.monotonic()
try:
    find_model("owner/name")
except DataError as error:
    print(error.message, error.hint, f"{time.monotonic() - began:.1f}", sep="\\n")
"""


@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=str)
def test_without_network_it_says_what_to_bring(tmp_path: Path, setting: dict[str, str]) -> None:
    environment = os.environ | {"HF_HOME": str(tmp_path)} | setting
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    message, hint, seconds = done.stdout.splitlines()
    assert "'owner/name' is not on this machine, and it cannot be fetched" in message
    assert "hf download owner/name --local-dir name" in hint and "model_index.json" in hint and "unet, vae" in hint
    assert float(seconds) < 30  # no hang


# --- folders and files ------------------------------------------------------------------------------------------------


def test_a_folder_of_pickles(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path, weights=False)
    assert "Restore" in refused(folder, "unet/*.safetensors").hint
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert "pickles" in refused(folder, "unet/*.safetensors").hint


def test_an_xl_needs_its_second_encoder(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path, "StableDiffusionXLPipeline")
    assert pipeline_class(folder) == "StableDiffusionXLPipeline"
    refused(folder, "text_encoder_2/config.json", "tokenizer_2/tokenizer.json", "text_encoder_2/*.safetensors")


@pytest.mark.parametrize("name", ["StableDiffusionInpaintPipeline", "StableDiffusionXLImg2ImgPipeline", None])
def test_other_pipelines(tmp_path: Path, name: str) -> None:
    refused(write_pipeline(tmp_path, name), str(name), "StableDiffusionXLPipeline is needed")


def test_a_single_file_is_its_content_and_its_configuration(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    refused(file, str(tmp_path / "model"))
    folder = write_pipeline(tmp_path / "model", weights=False)
    assert find_model(str(file)) == file
    before = model_fingerprint(str(file))
    (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    changed = model_fingerprint(str(file))
    file.write_bytes(b"others")
    assert len({before, changed, model_fingerprint(str(file))}) == 3


@pytest.mark.parametrize("name", ["model.ckpt", "model.pth", "model.bin", "model.pt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert ".safetensors" in refused(tmp_path / name, name, "pickle").hint
    (tmp_path / "model.gguf").write_bytes(b"")
    refused(tmp_path / "model.gguf", "no model")


# --- what a perceptual loss needs -------------------------------------------------------------------------------------


def unfit(**settings) -> DataError:
    with pytest.raises(DataError) as caught:
        check_perceptual(Perceptual(**settings))
    return caught.value


def test_missing_weights_are_told_by_the_name_to_bring(tmp_path):
    error = unfit(network="alex", weights=str(tmp_path / "here" / "a.pth"))
    assert f"'{tmp_path / 'here' / 'a.pth'}'" in error.message and "never fetched" in error.message
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in error.hint
    assert "vgg16-397923af.pth" in unfit(network="vgg", weights=str(tmp_path)).hint


def test_weights_without_a_path_are_those_of_the_folder_of_weights(tmp_path, monkeypatch):
    for cache in ("INSTAFLOW_WEIGHTS", "TORCH_HOME"):
        monkeypatch.setenv(cache, str(tmp_path))
    error = unfit(network="vgg")
    assert "The weights 'vgg16-397923af.pth' are not on this machine" in error.message
    assert "instaflow weights lpips-vgg --fetch" in error.hint
    file = tmp_path / "vgg16-397923af.pth"
    file.write_bytes(b"abc")
    assert "is damaged or another file: it is a text, " in unfit(network="vgg").message
    monkeypatch.setitem(FILES, "lpips-vgg", replace(FILES["lpips-vgg"], sha256="ba7816bf"))
    check_perceptual(Perceptual(network="vgg"))
    assert backbone_file(Perceptual(network="vgg")) == file
    assert backbone_file(Perceptual(network="vgg", weights="mine.pth")) == Path("mine.pth")


def test_a_cut_download_is_known_by_its_name(tmp_path):
    for name in ("alexnet-owt-7be5be79.pth", "alexnet-owt-ba7816bf.pth", "alexnet.pth"):
        (tmp_path / name).write_bytes(b"abc")  # whose SHA-256 begins with ba7816bf
    error = unfit(weights=str(tmp_path / "alexnet-owt-7be5be79.pth"))
    assert "is damaged: its SHA-256 begins with ba7816bf" in error.message
    for name in ("alexnet-owt-ba7816bf.pth", "alexnet.pth"):
        check_perceptual(Perceptual(weights=str(tmp_path / name)))


def test_a_decoder_is_a_tiny_autoencoder_s_folder(tmp_path):
    given = {"network": "teacher", "decoder": str(tmp_path)}
    assert "lacks config.json and diffusion_pytorch_model.safetensors" in unfit(**given).message
    save_file({"a": np.zeros(9)}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert "is no AutoencoderTiny" in unfit(**given).message
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    check_perceptual(Perceptual(**given))
    cut(tmp_path / "diffusion_pytorch_model.safetensors")
    assert "is damaged: it is cut off" in unfit(**given).message


def cut(file: Path) -> None:
    """Leave out its last byte."""
    file.write_bytes(file.read_bytes()[:-1])


def test_a_perceptual_network_s_file_is_whole(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.zeros(9)}, tmp_path / "model.safetensors")
    check_network(tmp_path)
    cut(tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.safetensors' is damaged: it is cut off: it has \d+ of \d+ bytes"):
        check_network(tmp_path)


@pytest.mark.parametrize(
    ("config", "file", "kind"),
    [
        ('{"format": 1, "channels": [3, 8], "strides": [1]}', "model.safetensors", "classifier"),
        ('{"_class_name": "AutoencoderKL"}', "diffusion_pytorch_model.safetensors", "autoencoder"),
    ],
)
def test_an_evaluation_s_own_network_is_known_by_its_configuration(tmp_path, config, file, kind):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(DataError, match=f"The {kind} '.*' lacks {file}"):
        kind_of_extractor(tmp_path)
    save_file({"a": np.zeros(9)}, tmp_path / file)
    assert kind_of_extractor(tmp_path) == kind
    cut(tmp_path / file)
    with pytest.raises(DataError, match="is damaged: it is cut off"):
        kind_of_extractor(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "it has no config.json"),
        ("[", "it has no config.json"),
        ('{"_class_name": "UNet2DConditionModel"}', "its config.json is a UNet2DConditionModel"),
        ("{}", "its config.json is of another network"),
    ],
)
def test_another_folder_is_no_network_to_measure_in(tmp_path, config, said):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(DataError) as caught:
        kind_of_extractor(tmp_path)
    assert said in caught.value.message and "folder 'perceptual'" in caught.value.hint
