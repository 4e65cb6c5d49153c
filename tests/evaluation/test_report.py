import json
import math
from dataclasses import replace

import numpy as np
import pytest

from instaflow.evaluation.report import Report, Row, Stage, distance_summary, model_kind, report_json
from tests.evaluation.example import ROWS, STAGES, full_report

PROMISED = [
    "model",
    "num_steps",
    "guidance_scale",
    "weights",
    "num_samples",
    "frechet_distance_real",
    "frechet_distance_teacher",
    "prompt_accuracy",
    "straightness",
    "seconds_per_image",
]


def strict(report: Report) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(json.dumps(report_json(report)), parse_constant=refuse)


def test_every_row_has_the_promised_keys_and_its_own_values():
    content = strict(full_report())
    assert len(content["rows"]) == len(ROWS)
    for written, row in zip(content["rows"], ROWS, strict=True):
        assert {key: written[key] for key in PROMISED} == {key: getattr(row, key) for key in PROMISED}
    assert content["floors"]["real_halves"] == 0.118
    assert content["stages"][2]["parents"] == ["teacher", "pairs"]
    assert content["protocol"]["samples"] == "2,000 prompts"


@pytest.mark.parametrize("broken", [math.nan, math.inf, np.float32("nan")])
def test_a_number_that_is_not_finite_is_null(broken):
    row = replace(ROWS[0], frechet_distance_real=broken, seconds_per_image=np.float32(0.5))
    written = strict(replace(full_report(), rows=[row], seconds=broken))
    assert written["rows"][0]["frechet_distance_real"] is None
    assert written["rows"][0]["seconds_per_image"] == 0.5
    assert written["seconds"] is None


def test_what_each_image_adds_is_in_no_file():
    rows = [replace(row, parts={"diversity": np.ones(3)}, intervals={"diversity": 0.5}) for row in ROWS]
    written = strict(replace(full_report(), rows=rows))
    for row in [*written["rows"], *written["scores"][0]["rows"]]:
        assert "parts" not in row and "frechet_distance_real" in row
    assert written["rows"][0]["intervals"] == {"diversity": 0.5}


def test_gaps_are_summed_up_without_their_images():
    gaps = strict(full_report())["gaps"]
    assert gaps["distances"]["student"] == pytest.approx(
        {"count": 100, "median": 0.505, "percentile_95": 0.9505, "largest": 1.0}
    )
    assert gaps["worst"][0]["prompt"] == "an odd digit"


def test_the_summary_of_no_distance_counts_none():
    assert distance_summary([math.nan])["count"] == 0


def test_the_kind_of_a_model_follows_from_its_lineage():
    kinds = {name: model_kind(name, STAGES) for name in ("teacher", "2rf", "student", "direct", "some/hub-model")}
    assert kinds == {
        "teacher": "teacher",
        "2rf": "flow",
        "student": "student",
        "direct": "direct",
        "some/hub-model": "teacher",
    }
    more = [*STAGES, Stage(name="fast", kind="dmd", parents=["teacher"])]
    assert model_kind("fast", more) == "dmd"
    more = [*STAGES, Stage(name="halved", kind="distill", method="progressive", parents=["2rf", "pairs"])]
    assert model_kind("halved", more) == "progressive"


def test_a_row_keeps_no_place_for_misspelt_figures():
    with pytest.raises(TypeError):
        Row(model="student", fid=1.0)  # type: ignore[call-arg]
