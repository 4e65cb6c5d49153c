import re

import pytest

from instaflow.evaluation.svg import HEIGHT, WIDTH, Axis, Series, axis_over, chart


@pytest.mark.parametrize("values", [[0.09, 6.4], [0.3, 0.31], [1e-5, 4e3], [2.0, 2.0], [3e-15, 5e-15]])
@pytest.mark.parametrize("log", [True, False])
def test_an_axis_holds_its_values_and_a_few_ticks(values, log):
    axis = axis_over(values, "", log=log)
    pixels = [axis.place(value, 0, 100) for value in values]
    assert all(0 < pixel < 100 for pixel in pixels)
    ticks = axis.tick_values()
    assert 2 <= len(ticks) <= 10
    assert all(axis.low <= tick <= axis.high for tick in ticks)


def test_equal_ratios_are_equally_far_apart_on_a_log_axis():
    axis = Axis(label="", low=1, high=1000, log=True)
    assert [axis.place(value, 0, 300) for value in (1, 10, 100, 1000)] == pytest.approx([0, 100, 200, 300])


def test_points_are_drawn_where_the_axes_say():
    x, y = Axis(label="x", low=0, high=1), Axis(label="y", low=0, high=1)
    drawn = chart([Series(name="s", colour=0, points=[(0, 0), (1, 1)])], x=x, y=y, title="t")
    start, end = re.findall(r'class="line c0" d="M([\d.]+ [\d.]+)L([\d.]+ [\d.]+)"', drawn)[0]
    (x0, y0), (x1, y1) = ([float(v) for v in p.split()] for p in (start, end))
    assert 0 < x0 < x1 <= WIDTH and 0 < y1 < y0 <= HEIGHT


def test_the_label_of_a_rule_keeps_clear_of_the_data():
    """The data runs just below the rule on the right half, so that the label must go above it or to the left."""
    x, y = Axis(label="x", low=0, high=1), Axis(label="y", low=0, high=1)
    below = [Series(name="s", colour=0, points=[(0.0, 0.47), (1.0, 0.47)])]
    free = chart([], x=x, y=y, title="t", rules=[(0.5, "floor")])
    busy = chart(below, x=x, y=y, title="t", rules=[(0.5, "floor")])
    height = [float(re.findall(r'class="note" x="\d+" y="([\d.]+)"', drawn)[0]) for drawn in (free, busy)]
    assert height[1] < height[0]


def test_the_end_of_a_long_rule_s_label_fits_between_the_axes():
    x, y = Axis(label="x", low=0, high=1), Axis(label="y", low=0, high=1)
    drawn = chart([], x=x, y=y, title="t", rules=[(0.5, "/a/long/folder" * 9 + "/teacher, 3 steps"), (0.2, "floor")])
    labels = re.findall(r'<text class="note"[^>]*>(.*?)</text>', drawn)
    assert labels[0].startswith("…") and labels[0].endswith("/teacher, 3 steps") and len(labels[0]) == 48
    assert labels[1] == "floor"
