"""A saved report read back, and each fault of one named with its file."""

import json
import re

import pytest

from instaflow.errors import DataError
from instaflow.evaluation.report import report_json
from instaflow.evaluation.saved import FIGURES, read_report
from tests.evaluation.example import full_report


@pytest.fixture
def saved(tmp_path):
    """The content of a report, and a function that reads it from a file."""

    def read(content):
        (tmp_path / "report.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return read_report(tmp_path / "report.json")

    return report_json(full_report()), read


def test_a_report_is_read_as_it_was(saved):
    content, read = saved
    content["rows"][0] |= {"a figure of later versions": 1, "intervals": {"precision": 0.1, "recall": None}}
    again = report_json(read(content))
    del content["rows"][0]["a figure of later versions"]
    for name in ("title", "config", "seed", "hardware", "protocol", "rows", "versions", "floors", "stages", "aims"):
        assert again[name] == content[name]


NUMBERS = [(True, "is True, not a number"), ("1", "is '1', not a number"), (float("nan"), "is nan")]


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("rows",), [], "it has no rows"),
        (("rows", 0, "card"), None, "the card of teacher is None"),
        (("rows", 0, "intervals"), [0.1], "the intervals of teacher are [0.1]"),
        (("rows", 0, "cost"), [], "the cost of teacher is []"),
        (("rows", 0, "cost"), {"training_samples": "many"}, "cost, 'training_samples' is 'many', not a number"),
        (("rows", 0, "cost"), {"devices": [1]}, "teacher, cost, 'devices' is [1]"),
        (("seed",), None, "its seed is None"),
        *((("rows", 0, key), True, f"teacher, '{key}' is True, not a number") for key in FIGURES),
        *((("rows", 0, "recall"), value, f"teacher, 'recall' {said}") for value, said in NUMBERS),
        *((("rows", 0, "intervals"), {"recall": value}, f"interval of 'recall' {said}") for value, said in NUMBERS),
        *((("floors", "autoencoder"), value, f"floors, 'autoencoder' {said}") for value, said in NUMBERS),
    ],
)
def test_what_no_report_holds_is_named(saved, tmp_path, place, value, said):
    content, read = saved
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        read(content)
    assert caught.value.message.startswith(f"'{tmp_path}/report.json' is no report: ")
    assert caught.value.hint == f"Delete '{tmp_path}' to measure anew"


@pytest.mark.parametrize(
    "key", ["title", "config", "seed", "hardware", "protocol", "rows", "versions", "floors", "stages"]
)
def test_what_a_report_lacks_is_named(saved, key):
    content, read = saved
    del content[key]
    with pytest.raises(DataError, match=f"is no report: it has no '{key}'"):
        read(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is damaged: "),
        (10**5 * "[", "is damaged: "),
        ("[]", "is no report: list indices"),
        ('{"rows": [{}]}', "is no report: it has no .model."),
        ('{"rows": [1]}', "is no report: argument of type 'int'"),
        ('{"rows": [[]], "floors": 1}', "is no report: "),
    ],
)
def test_a_file_that_is_none_is_named(saved, content, said):
    with pytest.raises(DataError, match=f"report.json' {said}"):
        saved[1](content)


def test_a_file_that_is_not_there_is_named_with_another_way_out(tmp_path):
    with pytest.raises(DataError, match="is no report that can be read: No such file") as caught:
        read_report(tmp_path / "report.json", "Name another")
    assert caught.value.hint == "Name another"
