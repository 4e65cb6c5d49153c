"""What a model cost after its teacher: by a report's stages, or by the way that its folder tells."""

from dataclasses import replace

import pytest

from instaflow.evaluation.costs import cost_of, device_hours, devices, told_cost, training_samples
from instaflow.provenance import Origin
from tests.evaluation.example import full_report

TEACHER = Origin(name="teacher", kind="teacher", content="", samples=9, seconds=9.0, processes=9, hardware="old")
PAIRS = Origin(name="pairs", kind="couple", content="", samples=100, seconds=1800.0, processes=4, hardware="a GPU")
FLOW = Origin(name="2rf", kind="reflow", content="", samples=640, seconds=3600.0, processes=2, hardware="a GPU")
STUDENT = Origin(name="student", kind="distill", content="", samples=64, seconds=900.0, processes=2, hardware="a card")
WAY = [TEACHER, PAIRS, FLOW, STUDENT]


def row_of(report, model):
    return next(row for row in report.rows if row.model == model)


def test_hours_are_those_of_all_devices_and_of_all_stages_after_the_teacher():
    report = full_report()
    expected = {"student": 41 + 78 + 22 + 66, "direct": 41 + 139, "2rf": 41 + 78}
    for model, seconds in expected.items():
        assert device_hours(report, row_of(report, model)) == pytest.approx(2 * seconds / 3600)
    assert device_hours(report, row_of(report, "teacher")) is None  # which is where the count begins
    unknown = [replace(stage, processes=None) if stage.name == "pairs2" else stage for stage in report.stages]
    report = replace(report, stages=unknown)
    assert device_hours(report, row_of(report, "student")) is None and device_hours(report, row_of(report, "direct"))


def test_a_way_s_cost_is_that_of_its_stages_after_the_teacher():
    told = {"seconds": 6300.0, "device_hours": 2 + 2 + 0.5, "devices": ["a GPU", "a card"]}
    assert cost_of(WAY) == {"training_samples": 704, **told}
    hub = Origin(name="a/b", kind="model", content="a/b@1")
    assert cost_of([hub, *WAY[1:]]) == cost_of(WAY)
    assert cost_of([TEACHER]) == cost_of([]) == {}


@pytest.mark.parametrize("place", [1, 2, 3])
def test_what_a_part_does_not_tell_is_not_guessed(place):
    def without(**fields):
        return [replace(origin, **fields) if origin is WAY[place] else origin for origin in WAY]

    assert cost_of(without(seconds=None))["device_hours"] is None
    assert cost_of(without(processes=None))["device_hours"] is None
    assert cost_of(without(seconds=None))["training_samples"] == 704
    assert cost_of(without(kind="stage")) == {}  # made anew since
    assert (cost_of(without(samples=None)) == {}) == (place > 1)  # of what was trained


def test_a_row_s_own_cost_goes_before_the_stages():
    report = full_report()
    student = replace(row_of(report, "student"), cost=cost_of(WAY))
    assert (training_samples(report, student), device_hours(report, student)) == (704, 4.5)
    unknown = replace(student, cost={})
    assert (training_samples(report, unknown), device_hours(report, unknown)) == (0, None)
    assert devices(replace(report, rows=[student])) == ["a GPU", "a card"]
    assert told_cost(report, student) == student.cost and told_cost(report, unknown) == {}
    by_stages = told_cost(report, row_of(report, "student"))
    hours = device_hours(report, row_of(report, "student"))
    assert by_stages == {"training_samples": 580_000, "seconds": 207.0, "device_hours": hours, "devices": ["a GPU"]}
    assert told_cost(report, row_of(report, "teacher")) == {}
