"""What `instaflow sample` refuses, and that it does so before it samples."""

import errno
import io
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import instaflow
from instaflow.errors import ConfigError, DataError, InstaFlowError
from instaflow.models.samplers import flow_scheduler
from instaflow.using.generator import Generator
from instaflow.using.metadata import About, Drawn, encoded, read_about
from instaflow.using.metadata import told as told_in_words
from instaflow.using.sheet import sheet
from pipelines import sample
from pipelines.sample import load
from pipelines.sample_request import Request, wanted_by
from tests.models.made import teacher_scheduler, write_model

SHAPE = (2, 4, 8, 8)  # of the noise of two prompts
STUDENT = {"kind": "student", "parametrization": "velocity", "num_steps": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Generator]:
    """Two students, loaded once, by their folders."""
    place = tmp_path_factory.mktemp("sample")
    scheduler = flow_scheduler("velocity", teacher_scheduler())
    folders = [write_model(place / name / "model", scheduler, seed, **STUDENT) for seed, name in enumerate("ab")]
    return {str(folder): instaflow.load(folder, device="cpu", batch_size=4) for folder in folders}


@pytest.fixture(autouse=True)
def model(models: dict[str, Generator], monkeypatch: pytest.MonkeyPatch) -> Generator:
    monkeypatch.setattr(sample, "load", lambda request, place: models[place])
    return next(iter(models.values()))


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)


def run(folder: Path, model: Generator, **changes: Any) -> str:
    options = {"models": (model.model.name,), "prompts": ("a seven", "an odd digit"), "output": f"{folder}/grid.png"}
    request = Request(**(options | changes))
    return sample.run(request, wanted_by(request))


def refusal(model: Generator, folder: Path, kind: type[InstaFlowError], **changes: Any) -> InstaFlowError:
    """The error of a call that writes nothing."""
    before = set(folder.iterdir())
    with pytest.raises(kind) as caught:
        run(folder, model, **changes)
    assert caught.value.hint
    assert set(folder.iterdir()) == before
    return caught.value


def seen(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    """A tile of a sheet at its own size, 16×16."""
    return np.asarray(image.crop(box).resize((16, 16), Image.Resampling.NEAREST)).astype(int)


def test_images_and_latents_are_written(tmp_path: Path, model: Generator, noise: np.ndarray) -> None:
    np.save(tmp_path / "noise.npy", noise)
    done = run(tmp_path, model, noise_file=tmp_path / "noise.npy", latents_file=tmp_path / "latents.npy")
    assert done == f"{tmp_path}/grid.png: 2 images, 1 step"
    latents = model.latents(["a seven", "an odd digit"], noise=noise)
    assert np.abs(np.load(tmp_path / "latents.npy") - latents.numpy()).max() < 1e-5
    sheet = Image.open(tmp_path / "grid.png")
    assert sheet.size == (256, 128)  # two of 16×16, enlarged so that they can be seen
    for place, image in enumerate(model.decode(latents)):
        assert np.abs(seen(sheet, (128 * place, 0, 128 * place + 128, 128)) - np.asarray(image).astype(int)).max() <= 1
    assert {path.name for path in tmp_path.iterdir()} == {"noise.npy", "latents.npy", "grid.png"}
    assert read_about(tmp_path / "grid.png").images == [Drawn("a seven", None), Drawn("an odd digit", None)]


def test_a_seed_gives_each_prompt_its_own_noise_and_seeds_are_for_all(tmp_path: Path, model: Generator) -> None:
    run(tmp_path, model, seed=3, latents_file=tmp_path / "own.npy")
    expected = model.latents(["a seven", "an odd digit"], seeds=[3, (3, 1)]).numpy()
    assert np.abs(np.load(tmp_path / "own.npy") - expected).max() < 1e-5
    run(tmp_path, model, seeds="3,5-6", latents_file=tmp_path / "all.npy")
    expected = model.latents(["a seven"] * 3 + ["an odd digit"] * 3, seeds=[3, 5, 6] * 2).numpy()
    assert np.abs(np.load(tmp_path / "all.npy") - expected).max() < 1e-5
    assert Image.open(tmp_path / "grid.png").size == (3 * 128, 2 * 128)  # a row a prompt
    about = read_about(tmp_path / "grid.png")
    assert about.images[4] == Drawn("an odd digit", "5")
    assert (about.models, about.num_steps, about.guidance_scale) == ([model.model.name], [1], [1.0])


def test_a_picture_tells_how_it_is_made_again(tmp_path: Path, model: Generator, typed: Any) -> None:
    prompt = "--prompt it's “7”\n"
    run(tmp_path, model, prompts=(prompt,), seeds="3:2", num_steps=2, guidance_scale=1.23456789)
    code, out, err = typed("show", tmp_path / "grid.png")
    assert (code, err) == (0, "") and "seed 3:2" in out
    before = (tmp_path / "grid.png").read_bytes()
    (tmp_path / "grid.png").unlink()
    words = shlex.split(out.partition("Again:")[2])
    code, _, err = typed(*words[1:], "--output", tmp_path / "grid.png")
    assert (code, err) == (0, "")
    assert (tmp_path / "grid.png").read_bytes() == before


def test_what_tells_nothing_of_itself_is_refused(tmp_path: Path, typed: Any) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "plain.png").read_bytes()[:40])
    for name, told in {"plain.png": "does not tell how it was made", "torn.png": "cannot be read as a PNG"}.items():
        code, _, err = typed("show", tmp_path / name)
        assert code == 1 and told in err and "Hint:" in err


@pytest.mark.parametrize("fault", ["models", "position"])
def test_what_a_picture_tells_is_not_trusted(tmp_path: Path, typed: Any, fault: str) -> None:
    """Lists that do not match, and words that a terminal would obey."""
    drawn = Drawn("a seven", None, ("1", "2"), None if fault == "position" else 0.5)
    about = About(["a", "b"] if fault == "models" else ["a"], [1], [1.0], "float32", [drawn])
    (tmp_path / "odd.png").write_bytes(encoded(Image.new("RGB", (4, 4)), tmp_path / "odd.png", about))
    code, _, err = typed("show", tmp_path / "odd.png")
    assert code == 1 and "is damaged: parts of it are missing" in err
    about = About(["\x1b]0;title\x07\x9b2J"], [1], [1.0], "float32", [Drawn("a\u202eb", "1")])
    (tmp_path / "odd.png").write_bytes(encoded(Image.new("RGB", (4, 4)), tmp_path / "odd.png", about))
    code, out, _ = typed("show", tmp_path / "odd.png")
    assert code == 0 and "�]0;title��2J" in out and out.replace("\n", "").isprintable()


OTHERS = {
    "prompts": {"prompts": ("a seven", "an even digit")},
    "seeds": {"seeds": "1"},
    "dtype": {"dtype": "bfloat16"},
    "num_steps": {"num_steps": 2},
    "guidance_scale": {"guidance_scale": 2.0},
}


@pytest.mark.parametrize("changed", ["model", *OTHERS])
def test_a_folder_takes_no_images_of_another_command(
    tmp_path: Path, model: Generator, models: dict[str, Generator], changed: str
) -> None:
    folder = f"{tmp_path / 'out'}/"
    assert "2 images" in run(tmp_path, model, output=folder)
    (tmp_path / "out" / "000000001.png").unlink()
    other = {"models": (list(models)[1],)} if changed == "model" else OTHERS[changed]
    with pytest.raises(ConfigError, match=rf"was begun with {changed} .*, and now it is"):
        run(tmp_path, model, output=folder, **other)
    assert not (tmp_path / "out" / "000000001.png").exists()


@pytest.mark.parametrize(
    "changes", [{"between": 1, "prompts": ("a seven", "an odd digit")}, {"animate": True, "output": "way.png"}]
)
def test_what_is_not_finite_is_no_picture(
    tmp_path: Path, model: Generator, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    unet = model.model.unet
    monkeypatch.setattr(unet, "forward", lambda x, *words, **more: (x * float("nan"),))
    error = refusal(model, tmp_path, InstaFlowError, **changes)
    assert "gave latents that are not finite" in error.message


def test_a_film_in_png_tells_how_it_was_made(tmp_path: Path, model: Generator) -> None:
    run(tmp_path, model, animate=True, num_steps=2, output=f"{tmp_path}/way.png")
    about = read_about(tmp_path / "way.png")
    assert about.num_steps == [2] and about.images == [Drawn("a seven", "0"), Drawn("an odd digit", "0:1")]


def test_noise_is_not_written_over_by_another_of_its_names(
    tmp_path: Path, model: Generator, noise: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "noise.npy", noise)
    monkeypatch.chdir(tmp_path)
    other = Path("..") / tmp_path.name / "noise.npy"
    error = refusal(model, tmp_path, ConfigError, noise_file=Path("noise.npy"), latents_file=other)
    assert "are one" in error.message
    assert np.array_equal(np.load(tmp_path / "noise.npy"), noise)


def test_several_models_stand_in_rows_of_one_noise(tmp_path: Path, models: dict[str, Generator]) -> None:
    run(tmp_path, next(iter(models.values())), models=tuple(models), captions=True)
    sheet = Image.open(tmp_path / "grid.png")
    tile, gap, words = 256, 8, 48
    assert sheet.size == (2 * (tile + gap) + gap, 2 * (tile + gap + words + gap) + gap)
    prompts = ["a seven", "an odd digit"]
    for row, model in enumerate(models.values()):
        for column, image in enumerate(model(prompts)):
            x, y = gap + column * (tile + gap), gap + row * (tile + gap + words + gap)
            assert np.abs(seen(sheet, (x, y, x + tile, y + tile)) - np.asarray(image).astype(int)).max() <= 1
            below = np.asarray(sheet.crop((x, y + tile + gap, x + tile, y + tile + words)))
            assert below.min() < 100  # words


@pytest.mark.parametrize("several", ["seeds", "prompts"])
def test_a_strip_leads_from_end_to_end(tmp_path: Path, model: Generator, several: str) -> None:
    changes = {"seeds": "1,2,3"} if several == "seeds" else {"seeds": "1", "prompts": ("a seven", "a two", "a nine")}
    run(tmp_path, model, between=2, latents_file=tmp_path / "way.npy", **changes)
    way = np.load(tmp_path / "way.npy")
    if several == "seeds":
        assert len(way) == 2 * 7
        ends = model.latents(["a seven"] * 3 + ["an odd digit"] * 3, seeds=[1, 2, 3] * 2).numpy()
        found = way[[0, 3, 6, 7, 10, 13]]
    else:
        assert len(way) == 7
        ends, found = model.latents(["a seven", "a two", "a nine"], seeds=1).numpy(), way[[0, 3, 6]]
    assert np.abs(found - ends).max() < 1e-4
    told = read_about(tmp_path / "grid.png").images[:4]
    if several == "seeds":
        way_of = [Drawn("a seven", None, ("1", "2"), position) for position in (0.333333, 0.666667)]
        assert told == [Drawn("a seven", "1"), *way_of, Drawn("a seven", "2")]
    else:
        way_of = [Drawn("a seven → a two", "1", None, position) for position in (0.333333, 0.666667)]
        assert told == [Drawn("a seven", "1"), *way_of, Drawn("a two", "1")]
    assert "0.333333 of the way" in told_in_words(read_about(tmp_path / "grid.png"))
    steps = np.abs(np.diff(way[:7], axis=0)).max(axis=(1, 2, 3))
    assert steps.min() > 0.1 * steps.max()  # every image is a step on
    assert Image.open(tmp_path / "grid.png").size == (7 * 128, 128 * len(way) // 7)


def test_a_caption_tells_seed_and_place() -> None:
    captions = {
        "3  a cat": Drawn("a cat", "3"),
        "a cat": Drawn("a cat", None),
        "3 → 8 at 0.25  a cat": Drawn("a cat", None, ("3", "8"), 0.25),
        "3  a cat → a dog at 0.25": Drawn("a cat → a dog", "3", None, 0.25),
    }
    assert [sample.caption(drawn) for drawn in captions.values()] == list(captions)


@pytest.mark.parametrize("scale", [None, 1.0, 7.5])
def test_guidance_of_a_model_that_has_it_trained_in_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scale: float | None
) -> None:
    place = str(write_model(tmp_path / "student", flow_scheduler("velocity", teacher_scheduler()), **STUDENT))
    load(Request(models=(place,), guidance_scale=scale), place)
    words = "is meant without guidance, which is trained in: 7.5 spoils its images"
    assert (words in capsys.readouterr().out) is (scale == 7.5)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_a_film_has_a_frame_a_step(tmp_path: Path, models: dict[str, Generator], ending: str) -> None:
    first = next(iter(models.values()))
    done = run(tmp_path, first, models=tuple(models), animate=True, num_steps=3, output=f"{tmp_path}/way.{ending}")
    assert done == f"{tmp_path}/way.{ending}: 4 frames of 2 models, 2 images of each"
    film = Image.open(tmp_path / f"way.{ending}")
    assert film.n_frames == 4
    film.seek(3)
    last, tile = film.convert("RGB"), 256 + 8
    for row, prompt in enumerate(("a seven", "an odd digit")):
        for column, model in enumerate(models.values()):
            (image,) = model(prompt, seeds=[(0, row)], num_steps=3)
            for goal in (0, 1):  # it has come to where it led
                x, y = 8 + (2 * column + goal) * tile, 8 + row * (tile + 56)
                difference = np.abs(seen(last, (x, y, x + 256, y + 256)) - np.asarray(image).astype(int))
                assert difference.mean() < 12  # few colours, or lossy; the network's step falls short by a thousandth


def test_a_film_of_a_straight_path_foretells_its_end(model: Generator) -> None:
    """Where the network's output does not depend on the state, the path is straight."""
    from instaflow.using.film import way_of

    class Straight:
        settings, scheduler, name = model.settings, model.model.scheduler, "straight"

        def trajectory(self, noise: Any, prompts: list[str], **how: Any) -> Any:
            from instaflow.flow.straightness import euler
            from instaflow.flow.views import VelocityView

            return euler(VelocityView(), lambda x, timestep: noise, noise, how["num_steps"])

    straight = Generator.__new__(Generator)
    straight.model, straight.decode = Straight(), lambda latents: latents
    noise = model.noise([1])
    way = way_of(straight, ["a seven"], noise, label="", num_steps=4, scale=1.0)
    assert len(way.states) == len(way.goals) == 5
    assert all((goal - way.states[-1]).abs().max() < 1e-5 for goal in way.goals)
    assert (way.states[1] - way.states[-1]).abs().max() > 0.1


def test_precision_and_batches_are_those_asked_for(models: dict[str, Generator]) -> None:
    (place, *_) = models
    loaded = load(Request(models=(place,), dtype="bfloat16", batch_size=3), place)
    assert (loaded.model.dtype, loaded.batch_size) == (torch.bfloat16, 3)


PROMPTS = {"prompts": ("a seven",)}
CLASHES = {
    "There is no prompt": {"prompts": ()},
    "Both --prompt and --prompts": {"prompt_file": "prompts.txt"},
    "--column goes with": {"column": "caption"},
    "--seed and --seeds": {"seed": 0, "seeds": "3"},
    "neither a seed nor a range": {"seeds": "3-x"},
    "ends before it begins": {"seeds": "9-3"},
    "names more than 10,000,000 seeds": {"seeds": "0-99999999999"},
    "--animate and --between do not": {"animate": True, "between": 2, "seeds": "1,2"},
    "several models and --latents-out do not": {"models": ("a", "b"), "latents_file": Path("x.npy")},
    "a folder of images and --captions do not": {"output": "images/", "captions": True},
    "--shard-size is for a folder": {"shard_size": 10},
    "--worker-count is for a folder": {"worker_index": 0, "worker_count": 2},
    "in no format of films": {"animate": True, "output": "way.jpg"},
    "--between has nothing": {"between": 3, **PROMPTS},
    "A sheet shows 4,096 images at most, not 10,000": {"seeds": "0-4999"},
    "--animate shows 16": {"animate": True, "output": "way.gif", "seeds": "0-99"},
}


@pytest.mark.parametrize("told", CLASHES)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, model: Generator, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refusal(model, tmp_path, ConfigError, **CLASHES[told]).message


def test_a_worker_is_one_of_the_count(tmp_path: Path, model: Generator) -> None:
    error = refusal(model, tmp_path, InstaFlowError, output=f"{tmp_path / 'out'}/", worker_index=2, worker_count=2)
    assert "The worker's index is 2, but their count is 2" in error.message and not (tmp_path / "out").exists()


def test_prompts_come_from_files_and_from_standard_input(
    tmp_path: Path, model: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a seven\n\nan odd digit\n")
    (tmp_path / "table.csv").write_text("id,words\n1,a seven\n2,an odd digit\n")
    expected = model.latents(["a seven", "an odd digit"]).numpy()
    typed_in = io.TextIOWrapper(io.BytesIO(b"a seven\r\n \nan odd digit"))
    monkeypatch.setattr("sys.stdin", typed_in)
    for changes in (
        {"prompt_file": f"{tmp_path}/prompts.txt"},
        {"prompt_file": f"{tmp_path}/table.csv", "column": "words"},
        {"prompt_file": "-"},
    ):
        run(tmp_path, model, prompts=(), latents_file=tmp_path / "out.npy", **changes)
        assert np.abs(np.load(tmp_path / "out.npy") - expected).max() < 1e-5
    with pytest.raises(ConfigError, match="Standard input holds no prompt"):
        run(tmp_path, model, prompts=(), prompt_file="-")
    with pytest.raises(ConfigError, match=r"'gone\.txt' does not exist") as caught:
        run(tmp_path, model, prompts=(), prompt_file="gone.txt")
    assert caught.value.hint == "A relative path starts where the command is typed"


@pytest.mark.parametrize("place", ["run", "run/student"])
def test_a_folder_around_the_model_is_told_before_anything_is_loaded(tmp_path: Path, place: str) -> None:
    (tmp_path / "run" / "student" / "model").mkdir(parents=True)
    (tmp_path / "run" / "student" / "model" / "model_index.json").write_text("{}")
    with pytest.raises(DataError, match="is no pipeline folder") as caught:
        wanted_by(Request(models=(f"{tmp_path / place}",), prompts=("a seven",), output=f"{tmp_path}/x.png"))
    assert caught.value.hint == f"Did you mean '{tmp_path}/run/student/model'?"


@pytest.mark.parametrize("ending", ["jpg", "webp", "gif", "PDF"])
def test_other_formats_are_written(tmp_path: Path, model: Generator, ending: str) -> None:
    run(tmp_path, model, output=f"{tmp_path}/grid.{ending}")
    assert (tmp_path / f"grid.{ending}").stat().st_size > 30


@pytest.mark.parametrize("ending", ["psd", "mpg", "h5", "hdf", "wmf", "xbm", "txt", ""])
def test_a_format_that_is_not_written_is_refused(tmp_path: Path, model: Generator, ending: str) -> None:
    error = refusal(model, tmp_path, ConfigError, output=f"{tmp_path}/grid.{ending}")
    assert f"'{tmp_path}/grid.{ending}'" in error.message
    assert "grid.png" in error.hint


def test_an_image_too_large_for_its_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="JPEG does not take an RGB image of 70000×1 pixels"):
        encoded(Image.new("RGB", (70000, 1)), tmp_path / "grid.jpg")


@pytest.mark.parametrize("option", ["output", "latents_file"])
def test_what_is_no_regular_file_is_left_alone(tmp_path: Path, model: Generator, option: str) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert (
        "no regular file"
        in refusal(model, tmp_path, ConfigError, **{option: pipe if option == "latents_file" else str(pipe)}).message
    )
    assert pipe.is_fifo()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_guidance_that_is_not_finite_is_refused(tmp_path: Path, model: Generator, value: float) -> None:
    error = refusal(model, tmp_path, ConfigError, guidance_scale=value)
    assert f"'--guidance-scale' must be a finite number, not {value}" in error.message


def test_a_prompt_that_is_not_utf8_is_refused(tmp_path: Path, model: Generator) -> None:
    typed = os.fsdecode(b"a caf\xe9")
    error = refusal(model, tmp_path, ConfigError, prompts=("a seven", typed))
    assert "character 5" in error.message
    error.message.encode()  # it can be printed


@pytest.mark.parametrize("kind", ["float64", "float16", ">f4", "int32"])
def test_noise_of_another_dtype_is_refused(tmp_path: Path, model: Generator, noise: np.ndarray, kind: str) -> None:
    file = tmp_path / "noise.npy"
    np.save(file, noise.astype(kind))
    error = refusal(model, tmp_path, DataError, noise_file=file)
    assert f"holds noise of {kind}; float32 is needed" in error.message
    exec(error.hint.removeprefix("Convert it: "), {"numpy": np})
    run(tmp_path, model, noise_file=file)  # now it will do


def test_noise_of_another_shape_or_not_finite_is_refused(tmp_path: Path, model: Generator, noise: np.ndarray) -> None:
    file = tmp_path / "noise.npy"
    np.save(file, noise[:1])
    with pytest.raises(DataError, match="one for each prompt"):
        run(tmp_path, model, noise_file=file)
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
def test_noise_that_is_no_array_is_refused(tmp_path: Path, model: Generator, content: bytes) -> None:
    file = tmp_path / "noise.npy"
    file.write_bytes(content)
    error = refusal(model, tmp_path, DataError, noise_file=file)
    assert f"The noise file '{file}' cannot be read" in error.message
    assert "numpy.save" in error.hint


@pytest.mark.parametrize("option", ["latents_file", "output"])
def test_a_full_disk_leaves_no_part_of_a_file(
    tmp_path: Path, model: Generator, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run(tmp_path, model, **{option: tmp_path / "out.png" if option == "latents_file" else f"{tmp_path}/out.png"})
    assert caught.value.errno == errno.ENOSPC  # which the command line knows
    assert list(tmp_path.iterdir()) == []


def test_the_grid_enlarges_small_images_alone() -> None:
    images = [Image.new("RGB", (40, 40), (value, 0, 0)) for value in (1, 2, 3)]
    grid = sheet(images)
    assert grid.size == (240, 240)
    assert [grid.getpixel(place) for place in ((119, 119), (120, 0), (119, 120), (239, 239))] == [
        (1, 0, 0),
        (2, 0, 0),
        (3, 0, 0),
        (0, 0, 0),
    ]
    assert sheet([Image.new("RGB", (200, 96))]).size == (200, 96)
