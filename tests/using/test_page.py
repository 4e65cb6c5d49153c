"""The page on using a student is run as it stands, on small models in its folders."""

import io
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from instaflow.models.samplers import flow_scheduler
from tests.models.made import teacher_scheduler, write_flow, write_model, write_xl_flow
from tests.using.made import write_refiner

PAGE = (Path(__file__).parents[2] / "docs" / "using.md").read_text()
STUDENT = {"kind": "student", "parametrization": "velocity", "num_steps": 1, "guidance_scale": 1.0}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "runs/mine/teacher/model")
    write_flow(tmp_path / "runs/mine/2rf/model", "velocity")
    write_model(tmp_path / "runs/mine/student/model", flow_scheduler("velocity", teacher_scheduler()), **STUDENT)
    write_xl_flow(tmp_path / "runs/xl/student/model", "velocity")
    write_refiner(tmp_path / "refiner")
    Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / "photo.jpg")
    (tmp_path / "prompts.txt").write_text("a red bicycle\na blue car\na green tram\n")
    return tmp_path


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def test_the_python_on_the_page_runs(place):
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert len(names["variations"]) == 8
    assert names["edited"][0].size == names["again"][0].size == names["changed"].size == (16, 16)
    assert names["refined"].size == (16, 16) and (place / "bicycle.png").is_file()


def test_the_commands_on_the_page_run(place, typed, monkeypatch):
    for line in "".join(blocks("sh")).splitlines():
        before, _, command = line.rpartition("| ")
        if before:
            assert before == "cat prompts.txt "
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((place / "prompts.txt").read_bytes())))
        code, out, err = typed(*shlex.split(command)[1:])
        assert code == 0, (line, out, err)
    made = {path.name for path in place.iterdir()}
    assert {
        "grid.png",
        "sheet.png",
        "sheet.webp",
        "seven.png",
        "models.png",
        "steps.webp",
        "strip.png",
        "way.png",
    } < made
    assert len(list(place.glob("images/*.tar"))) == 2 and len(list(place.glob("big/*.tar"))) == 8
    assert len(list(place.glob("loose/*.png"))) == 3
