import json

import pytest

from instaflow.errors import DataError
from instaflow.models.settings import FILE, ModelSettings, read_settings, write_settings

STUDENT = ModelSettings(
    kind="student",
    parametrization="velocity",
    num_steps=1,
    guidance_scale=1.0,
    weights="raw",
    lineage=[{"stage": "naïve", "kind": "teacher", "summary": "…"}],
)


def test_round_trip(tmp_path):
    write_settings(tmp_path, STUDENT)
    assert read_settings(tmp_path) == STUDENT


def test_a_folder_without_them_is_a_plain_teacher(tmp_path):
    settings = read_settings(tmp_path)
    assert (settings.kind, settings.parametrization, settings.num_steps, settings.lineage) == (
        "teacher",
        "epsilon",
        25,
        [],
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "7",
        '{"kind": "teacher"}',
        '{"format": 1, "kind": "teacher", "colour": "blue"}',
        '{"format": 2}',
        '{"format": 1, "num_st',
        '{"format": 1, "num_steps": "many"}',
        '{"format": 1, "num_steps": 0}',
        '{"format": 1, "kind": "painter"}',
        '{"format": 1, "parametrization": "data"}',
        '{"format": 1, "guidance_scale": null}',
    ],
)
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match=FILE) as caught:
        read_settings(tmp_path)
    assert caught.value.hint


def test_bytes_that_are_no_text(tmp_path):
    write_settings(tmp_path, STUDENT)
    (tmp_path / FILE).write_bytes(b"\xff\xfe" + json.dumps({"format": 1}).encode())
    with pytest.raises(DataError, match=FILE):
        read_settings(tmp_path)
