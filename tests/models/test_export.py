"""A model folder is stock diffusers' own, free of this machine, complete or absent."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from instaflow.models import export
from instaflow.models.settings import ModelSettings, read_settings
from tests.couplings.made import contents
from tests.models.made import build_parts, load, noise, teacher_scheduler, write_model

STOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("instaflow", "pipelines", "cli"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
try:
    import instaflow
    sys.exit("instaflow can be imported")
except ImportError:
    pass
import json
import numpy as np
import torch
from diffusers import StableDiffusionPipeline

noise, out, prompts, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
latents = {}
for name, (folder, steps, scale) in cases.items():
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    start = torch.from_numpy(np.load(noise))
    out_of = pipeline(prompts, num_inference_steps=steps, guidance_scale=scale, latents=start, output_type="latent")
    latents[name] = out_of.images.numpy()
np.savez(out, **latents)
"""
PROMPTS = ["the digit 7", "an odd digit"]


def test_stock_diffusers_alone_gives_the_same_latents(folders, tmp_path):
    cases = {"teacher": (25, 3.0), "velocity": (1, 1.0), "epsilon": (4, 1.5)}
    np.save(tmp_path / "noise.npy", noise().numpy())
    arguments = {name: [str(folders[name]), *case] for name, case in cases.items()}
    command = [sys.executable, "-c", STOCK, "noise.npy", "out.npz", json.dumps(PROMPTS), json.dumps(arguments)]
    subprocess.run(command, cwd=tmp_path, check=True)
    stock = np.load(tmp_path / "out.npz")
    for name, (steps, scale) in cases.items():
        ours = load(folders[name]).sample(noise(), PROMPTS, num_steps=steps, guidance_scale=scale)
        np.testing.assert_allclose(ours.numpy(), stock[name], rtol=1e-5, atol=1e-5)


def save_again(folder, model, **changes):
    export.save_model(
        folder,
        unet=model.unet,
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        scheduler=model.scheduler,
        settings=ModelSettings(**changes),
    )
    return folder


def test_nothing_in_a_folder_tells_where_it_was_made(folders, tmp_path):
    """Made from a model that was loaded from a folder, whose path the libraries note in several places."""
    again = save_again(tmp_path / "again", load(folders["teacher"]))
    for name, content in contents(again).items():
        assert str(folders["teacher"]).encode() not in content, name
        assert str(tmp_path).encode() not in content, name
        assert b"name_or_path" not in content, name
    assert contents(again) == contents(folders["teacher"])


def test_the_same_model_gives_the_same_bytes(tmp_path):
    assert contents(write_model(tmp_path / "one")) == contents(write_model(tmp_path / "deep" / "other"))
    assert contents(write_model(tmp_path / "third", seed=1)) != contents(tmp_path / "one")


def test_settings_and_card_lie_beside(tmp_path):
    lineage = [{"stage": "teacher", "kind": "teacher", "summary": "digits"}]
    folder = write_model(tmp_path / "model", kind="student", num_steps=1, guidance_scale=0.0, lineage=lineage)
    assert read_settings(folder).kind == "student"
    card = (folder / "README.md").read_text()
    assert "num_inference_steps=1, guidance_scale=1.0" in card and "- teacher (teacher): digits" in card


def test_saving_over_a_folder_leaves_nothing_of_it(folders, tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "old.txt").write_text("")
    save_again(folder, load(folders["teacher"]))
    assert contents(folder) == contents(folders["teacher"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Killed(BaseException):
    """As `kill -9` does, it leaves things as they are."""


@pytest.mark.parametrize("when", ["write_settings", "write_file", "replace_folder"])
def test_a_save_that_is_cut_short_leaves_the_old_folder(tmp_path, monkeypatch, when):
    folder = write_model(tmp_path / "model")
    before = contents(folder)

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(export, when, killed)
        with pytest.raises(Killed):
            write_model(folder, seed=1)
    assert contents(folder) == before
    write_model(folder, seed=1)  # the leftovers are in nobody's way
    assert contents(folder) == contents(write_model(tmp_path / "other", seed=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_weights_are_the_networks(tmp_path):
    parts = build_parts()
    export.save_model(tmp_path / "model", **parts, scheduler=teacher_scheduler(), settings=ModelSettings())
    loaded = load(tmp_path / "model")
    for name, value in parts["unet"].state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], value)
