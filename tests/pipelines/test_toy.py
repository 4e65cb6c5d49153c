"""The toy shows what its page says, for every seed; and the command writes it down."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from PIL import Image

import cli
from instaflow.errors import ConfigError
from instaflow.toy import demonstration
from instaflow.toy.mixtures import remote
from pipelines import toy

SEEDS = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """What the command writes and says."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("made") / "deep" / "toy"
    yield folder, toy.run(seed=3, seeds=SEEDS, output=folder)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found(made: tuple[Path, list[str]]) -> dict[str, Any]:
    return json.loads((made[0] / "toy.json").read_text("utf-8"))


def each(found: dict[str, Any], model: str, measure: str) -> list[Any]:
    """A model's measure, by seed."""
    values = [one[measure] for one in found["measures"][model]]
    assert len(values) == SEEDS
    return values


@pytest.mark.slow
def test_the_real_score_alone_collapses_to_the_nearest_mode(found: dict[str, Any]) -> None:
    assert each(found, "real score", "covered") == [1] * SEEDS
    nearest = min(range(5), key=lambda mode: sum(value**2 for value in found["modes"][mode]))
    assert all(shares[nearest] > 0.99 for shares in each(found, "real score", "shares"))


@pytest.mark.slow
def test_a_fake_score_finds_more_and_misses_the_far_mode(found: dict[str, Any]) -> None:
    assert all(1 < covered < 5 for covered in each(found, "real and fake score", "covered"))
    farthest = max(range(5), key=lambda mode: sum(value**2 for value in found["modes"][mode]))
    assert all(shares[farthest] < 0.04 for shares in each(found, "real and fake score", "shares"))


@pytest.mark.slow
def test_with_regression_every_mode_is_covered(found: dict[str, Any]) -> None:
    assert each(found, "with regression", "covered") == [5] * SEEDS
    alone = each(found, "real and fake score", "energy_distance")
    both = each(found, "with regression", "energy_distance")
    assert all(one > 3 * other for one, other in zip(alone, both, strict=True))


@pytest.mark.slow
def test_reflow_straightens_so_that_one_step_covers_every_mode(found: dict[str, Any]) -> None:
    before, after = ([one["value"] for one in found["straightness"][flow]] for flow in ("teacher", "reflow"))
    assert all(one > 10 * other for one, other in zip(before, after, strict=True))
    assert each(found, "start", "covered") == [1] * SEEDS
    assert each(found, "reflow", "covered") == [5] * SEEDS
    for measure in ("energy_distance", "teacher_distance"):
        start, reflow = (each(found, model, measure) for model in ("start", "reflow"))
        assert all(one > 3 * other for one, other in zip(start, reflow, strict=True))


@pytest.mark.slow
def test_the_figure_the_page_and_the_table_are_written(made: tuple[Path, list[str]], found: dict[str, Any]) -> None:
    folder, lines = made
    assert {path.name for path in folder.iterdir()} == {"toy.png", "toy.html", "toy.json"}
    assert found["seeds"] == [3, 4, 5, 6]
    with Image.open(folder / "toy.png") as image:
        assert image.size == (1920, 690)
        assert len(image.convert("RGB").getcolors(256) or []) > 20  # drawn on, in more than one colour
    text = (folder / "toy.html").read_text("utf-8")
    assert text.count("<img ") == text.count("<source ") == 8
    assert "seeds 3 to 6" in text
    assert not re.search(r"https?://|<script", text)  # it needs no network and no script
    rows = dict(re.findall(r"  (\(\w\) [a-z ]+?)  +(\d of 5)", "\n".join(lines)))
    assert rows == {
        "(a) real score": "1 of 5",
        "(b) real and fake score": "4 of 5",
        "(c) with regression": "5 of 5",
    }
    assert lines[-1] == f"The page: {folder / 'toy.html'}"


def test_each_training_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"STARTING_PAIRS": 64, "STARTING_SAMPLES": 3 * 128, "PAIRS": 64, "MATCHING_STEPS": 2}
    for name, value in {**few, "REFLOW_SAMPLES": 4 * 128, "EVALUATED": 64, "TEACHER_STEPS": 4}.items():
        monkeypatch.setattr(demonstration, name, value)
    demonstration.demonstrate(remote(), [0])
    assert re.findall(r"(.*): (\d) updates in [0-9.]+ s\n", capsys.readouterr().out) == [
        ("start", "3"),
        ("real score", "2"),
        ("real and fake score", "2"),
        ("with regression", "2"),
        ("reflow", "4"),
    ]


def test_a_file_in_the_place_of_the_folder_is_an_error_before_anything_is_trained(tmp_path: Path) -> None:
    place = tmp_path / "toy"
    place.write_text("mine")
    with pytest.raises(ConfigError, match=r"toy' is a file, and must be a folder"):
        toy.run(seed=0, seeds=1, output=place)
    assert place.read_text() == "mine"


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--seeds", "0"], ["--seeds", "many"]], ids=" ".join)
def test_a_bad_value_is_wrong_usage(words: list[str]) -> None:
    with pytest.raises(click.BadParameter) as error:
        whole = cli.cli.make_context("instaflow", ["toy"])
        cli.cli.commands["toy"].make_context("toy", list(words), parent=whole)
    assert error.value.param and words[0] in error.value.param.opts
