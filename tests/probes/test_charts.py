"""Axes in round numbers, points where they belong, outlines that stay open where a value is missing."""

import re

import pytest

from agglom.probes.charts import Line, Scale, line_chart, radar, strip_plot


@pytest.mark.parametrize(
    "values,low,high,unit",
    [
        ([0, 0.65], 0, 0.8, 0.2),
        ([0, 0.049], 0, 0.05, 0.01),
        ([0.31, 0.58], 0.3, 0.6, 0.1),
        ([-3, 146], -50, 150, 50),
        ([2, 2], 1.5, 2.5, 0.5),
    ],
)
def test_scales_are_round_and_hold_the_values(values, low, high, unit):
    scale = Scale.over(values)
    assert scale == pytest.approx((low, high, unit)) and len(scale.ticks) <= 7
    assert scale.ticks[0] == pytest.approx(low) and scale.ticks[-1] == pytest.approx(high)


def numbers(pattern, svg):
    return [float(x) for x in re.findall(pattern, svg)]


def test_a_strip_puts_values_on_its_axis():
    svg = strip_plot(0.5, (0.25, 0.75), Scale(0, 1, 0.25), "c0", 0.1)
    assert numbers(r'<circle[^>]* cx="([\d.]+)"', svg) == [88.0]  # the middle of 176
    assert numbers(r'class="bar c0" x1="([\d.]+)"', svg) == [6 + 164 / 4]
    assert numbers(r'class="chance" x1="([\d.]+)"', svg) == [22.4]


def test_a_radar_of_four_is_a_compass():
    rows = [("s", "c0", dict.fromkeys("NESW", 1.0)), ("t", "c1", {"N": 0.5, "S": 0.5, "W": 0.5})]
    svg = radar("r", list("NESW"), rows)
    assert 'class="area c0" points="260.0,40.0 405.0,185.0 260.0,330.0 115.0,185.0"' in svg
    assert len(re.findall(r'class="curve c1" points="\d', svg)) - 1 == 2  # S to W, W to N; one more is in the legend
    assert svg.count('class="dot c1"') == 3


def test_a_curve_says_its_ends():
    svg = line_chart("loss <x>", [Line("a", [(0, 2.0), (10, 1.0)], "c0"), Line("b", [(5, 1.5)], "c1")])
    assert (
        'aria-label="loss &lt;x&gt;: a from 2 at step 0 to 1 at step 10; b from 1.5 at step 5 to 1.5 at step 5"' in svg
    )
    first, last = re.search(r'class="curve c0" points="(\S+) (\S+)"', svg).groups()
    assert first == "46.0,8.0" and last == "310.0,146.0"  # high at the left, low at the right
