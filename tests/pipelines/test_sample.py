"""What `instaflow sample` refuses, and that it does so before it samples."""

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from instaflow.errors import ConfigError, DataError, InstaFlowError
from pipelines import sample

SHAPE = (2, 1, 4, 4)  # of the noise of two prompts


class Model:
    """Instead of a network: latents are half the noise, images are grey."""

    latent_shape = SHAPE[1:]
    num_truncated = 0
    sampled = 0

    def sample(self, noise: torch.Tensor, prompts: list[str], **_: Any) -> torch.Tensor:
        self.sampled += len(prompts)
        return noise / 2

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.new_zeros(len(latents), 3, 8, 8)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model()
    monkeypatch.setattr(sample, "load_model", lambda place, device: model)
    return model


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)


def run(folder: Path, **changes: Any) -> str:
    options = {
        "prompts": ["a seven", "an odd digit"],
        "num_steps": 1,
        "guidance_scale": None,
        "seed": 0,
        "noise_file": None,
        "latents_file": None,
        "output": folder / "grid.png",
    }
    return sample.run("a model", **(options | changes))


def refusal(model: Model, folder: Path, kind: type[InstaFlowError], **changes: Any) -> InstaFlowError:
    """The error of a call that samples and writes nothing."""
    before = set(folder.iterdir())
    with pytest.raises(kind) as caught:
        run(folder, **changes)
    assert caught.value.hint
    assert model.sampled == 0
    assert set(folder.iterdir()) == before
    return caught.value


def test_images_and_latents_are_written(tmp_path: Path, model: Model, noise: np.ndarray) -> None:
    np.save(tmp_path / "noise.npy", noise)
    done = run(tmp_path, noise_file=tmp_path / "noise.npy", latents_file=tmp_path / "latents.npy")
    assert "2 images" in done
    assert np.array_equal(np.load(tmp_path / "latents.npy"), noise / 2)
    assert Image.open(tmp_path / "grid.png").size == (256, 128)  # two of 8×8, enlarged so that they can be seen
    assert {path.name for path in tmp_path.iterdir()} == {"noise.npy", "latents.npy", "grid.png"}


@pytest.mark.parametrize("ending", ["jpg", "webp", "gif", "PDF"])
def test_other_formats_are_written(tmp_path: Path, model: Model, ending: str) -> None:
    run(tmp_path, output=tmp_path / f"grid.{ending}")
    assert (tmp_path / f"grid.{ending}").stat().st_size > 30


@pytest.mark.parametrize("ending", ["psd", "mpg", "h5", "hdf", "wmf", "xbm", "txt", ""])
def test_a_format_that_is_not_written_is_refused(tmp_path: Path, model: Model, ending: str) -> None:
    error = refusal(model, tmp_path, ConfigError, output=tmp_path / f"grid.{ending}")
    assert f"'{tmp_path}/grid.{ending}'" in error.message
    assert "grid.png" in error.hint


def test_an_image_too_large_for_its_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="JPEG does not take an RGB image of 70000×1 pixels"):
        sample.encoded(Image.new("RGB", (70000, 1)), tmp_path / "grid.jpg")


@pytest.mark.parametrize("option", ["output", "latents_file"])
def test_what_is_no_regular_file_is_left_alone(tmp_path: Path, model: Model, option: str) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert "no regular file" in refusal(model, tmp_path, ConfigError, **{option: pipe}).message
    assert pipe.is_fifo()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_guidance_that_is_not_finite_is_refused(tmp_path: Path, model: Model, value: float) -> None:
    error = refusal(model, tmp_path, ConfigError, guidance_scale=value)
    assert f"'--guidance-scale' must be a finite number, not {value}" in error.message


def test_a_prompt_that_is_not_utf8_is_refused(tmp_path: Path, model: Model) -> None:
    typed = os.fsdecode(b"a caf\xe9")
    error = refusal(model, tmp_path, ConfigError, prompts=["a seven", typed])
    assert "character 5" in error.message
    error.message.encode()  # it can be printed


@pytest.mark.parametrize("kind", ["float64", "float16", ">f4", "int32"])
def test_noise_of_another_dtype_is_refused(tmp_path: Path, model: Model, noise: np.ndarray, kind: str) -> None:
    file = tmp_path / "noise.npy"
    np.save(file, noise.astype(kind))
    error = refusal(model, tmp_path, DataError, noise_file=file)
    assert f"holds noise of {kind}; float32 is needed" in error.message
    exec(error.hint.removeprefix("Convert it: "), {"numpy": np})
    run(tmp_path, noise_file=file)  # now it will do


def test_noise_of_another_shape_or_not_finite_is_refused(tmp_path: Path, model: Model, noise: np.ndarray) -> None:
    file = tmp_path / "noise.npy"
    np.save(file, noise[:1])
    with pytest.raises(DataError, match="one for each prompt"):
        run(tmp_path, noise_file=file)
    noise[1, 0, 2, 2] = np.nan
    np.save(file, noise)
    assert "not finite" in refusal(model, tmp_path, DataError, noise_file=file).message


def npz() -> bytes:
    content = io.BytesIO()
    np.savez(content, noise=np.zeros(SHAPE, np.float32))
    return content.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        npz(),
        b"",
        b"PK\x03\x04 cut short",
        b"no array",
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,1,4,4)}\n") + bytes(5),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (2\n"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000,1000000,1000)}\n"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n"),
    ],
    ids=["npz", "empty", "zip", "text", "cut", "unclosed", "huge", "objects"],
)
def test_noise_that_is_no_array_is_refused(tmp_path: Path, model: Model, content: bytes) -> None:
    file = tmp_path / "noise.npy"
    file.write_bytes(content)
    error = refusal(model, tmp_path, DataError, noise_file=file)
    assert f"The noise file '{file}' cannot be read" in error.message
    assert "numpy.save" in error.hint


@pytest.mark.parametrize("option", ["latents_file", "output"])
def test_a_full_disk_leaves_no_part_of_a_file(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run(tmp_path, **{option: tmp_path / "out.png"})
    assert caught.value.errno == errno.ENOSPC  # which the command line knows
    assert list(tmp_path.iterdir()) == []


def test_the_grid_enlarges_small_images_alone(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 40, 40) * 2 - 1
    sheet = sample.grid(images)
    assert sheet.size == (240, 240)
    expected = ((images[2, :, 0, 39] + 1) * 127.5).round().byte().tolist()
    assert {sheet.getpixel((x, y)) for x in (117, 118, 119) for y in (120, 121, 122)} == {tuple(expected)}
    assert sample.grid(torch.zeros(1, 3, 96, 200)).size == (200, 96)
