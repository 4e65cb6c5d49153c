"""`instaflow import-pickle`: the same tensors, and no code of the file is run."""

import os
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.made import load, write_published


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("pickles") / "model", "sd1")


def pickled(model, folder):
    """The same model as older ones lie on the hub: .bin files by the names of diffusers and transformers."""
    shutil.copytree(model, folder)
    for file in [*folder.glob("*/*.safetensors")]:
        name = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    return folder


def test_a_folder_s_weights(typed, published, tmp_path):
    old = pickled(published, tmp_path / "old")
    code, _, err = typed("sample", old, "--prompt", "the digit 7", "--output", tmp_path / "out.png")
    assert code == 1 and f"instaflow import-pickle {old} OUTPUT" in err
    code, out, err = typed("import-pickle", old, tmp_path / "new")
    assert code == 0, err
    assert "of 3 pickles" in out
    files = {file.relative_to(tmp_path / "new"): file for file in (tmp_path / "new").rglob("*") if file.is_file()}
    assert set(files) == {file.relative_to(published) for file in published.rglob("*") if file.is_file()}
    for name, file in files.items():
        if name.suffix == ".safetensors":
            wanted, tensors = load_file(published / name), load_file(file)
            assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[key], wanted[key]) for key in wanted)
        else:
            assert file.read_bytes() == (published / name).read_bytes()
    load(tmp_path / "new")


def test_a_checkpoint_as_stable_diffusion_s_first_ones(typed, tmp_path, monkeypatch):
    """Lightning's: the tensors as state_dict, some of them shared, and beside them a class as a key."""
    weight = torch.randn(4, 4)
    tensors = {"model.weight": weight, "model.transposed": weight.T, "model_ema.weight": weight}
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as patch:  # it isn't there as the file is read
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        patch.setitem(sys.modules, name, module)
        callbacks = {module.ModelCheckpoint: {"best": 1}}
        torch.save({"state_dict": tensors, "global_step": 470000, "callbacks": callbacks}, tmp_path / "old.ckpt")
    code, out, err = typed("import-pickle", tmp_path / "old.ckpt", tmp_path / "new.safetensors")
    assert code == 0, err
    assert "3 tensors" in out and f"in '{tmp_path / 'new'}'" in out
    read = load_file(tmp_path / "new.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[key], tensors[key]) for key in tensors)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_no_code_is_run_and_nothing_is_left(typed, published, tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "trap": Trap(str(tmp_path / "sprung"))}, tmp_path / "trap.ckpt")
    code, _, err = typed("import-pickle", tmp_path / "trap.ckpt", tmp_path / "new.safetensors")
    assert code == 1 and "can't be read as plain tensors" in err and "it asks for posix.mkdir" in err
    assert "weights_only" not in err  # PyTorch's advice is to run it
    old = pickled(published, tmp_path / "old")
    shutil.copy(tmp_path / "trap.ckpt", old / "vae" / "diffusion_pytorch_model.bin")
    assert typed("import-pickle", old, tmp_path / "new")[0] == 1
    assert {file.name for file in tmp_path.iterdir()} == {"trap.ckpt", "old"}


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("missing.ckpt", "new.safetensors", "There is no file"),
        ("empty.ckpt", "new.safetensors", "holds no tensors by name"),
        ("cut.ckpt", "new.safetensors", "can't be read as plain tensors"),
        ("empty.ckpt", "new.bin", "does not end in .safetensors"),
        ("empty.ckpt", "there.safetensors", "is there already"),
        ("empty.ckpt", "missing/new.safetensors", "does not exist"),
        ("safe", "new", "holds no pickles of weights"),
        ("pieces", "new", "has weights in pieces ('diffusion_pytorch_model-00001-of-00002.bin')"),
    ],
)
def test_what_it_refuses(typed, tmp_path, source, output, words):
    torch.save({"state_dict": {}}, tmp_path / "empty.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "empty.ckpt").read_bytes()[:100])
    save_file({"a": torch.zeros(1)}, tmp_path / "there.safetensors")
    for folder, name in [("safe", "model.safetensors"), ("pieces", "diffusion_pytorch_model-00001-of-00002.bin")]:
        (tmp_path / folder / "unet").mkdir(parents=True)
        (tmp_path / folder / "unet" / name).write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = typed("import-pickle", tmp_path / source, tmp_path / output)
    assert code == 1 and words in err
    assert sorted(tmp_path.rglob("*")) == before
