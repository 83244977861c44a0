"""Learning-rate schedules at the places where their values are known."""

import pytest

from agglom.schedules import multiplier


def at(step, **options):
    options = {"schedule": "cosine", "warmup_steps": 10, "total_steps": 110, "final": 0.01, **options}
    return multiplier(step, **options)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_a_line_that_ends_at_the_peak(schedule):
    assert [at(step, schedule=schedule) for step in range(11)] == pytest.approx([(k + 1) / 11 for k in range(11)])


def test_cosine():
    assert (at(60), at(35), at(110), at(500)) == pytest.approx((0.505, 0.01 + 0.99 * 0.8535534, 0.01, 0.01))


def test_constant():
    assert {at(step, schedule="constant") for step in (10, 60, 110, 500)} == {1.0}


def test_wsd_is_flat_and_then_a_line():
    """The last fifth of 100 steps: from 80 on."""
    wsd = {"schedule": "wsd", "warmup_steps": 0, "total_steps": 100, "final": 0.0}
    assert [at(step, **wsd) for step in (0, 40, 80)] == [1.0, 1.0, 1.0]
    assert [at(step, **wsd) for step in (85, 90, 95, 100, 120)] == pytest.approx([0.75, 0.5, 0.25, 0, 0])
    assert at(50, **wsd, decay_fraction=1.0) == pytest.approx(0.5)
    assert at(99, **{**wsd, "final": 0.2}) == pytest.approx(0.2 + 0.8 * 0.05)
