"""Stages and partitions as functions of the step: spans, shares of the draws, weights of the gradient, refusals."""

from collections import Counter

import pytest

from agglom.errors import UserError
from agglom.plan import Partition, Plan, Stage, problems, slot

NAMES = ["clip", "dino", "sam"]


def test_stages_begin_with_their_first_step():
    plan = Plan([Stage(steps=3), Stage(steps=2), Stage()])
    assert [plan.stage_at(step) for step in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [Plan([]).stage_at(step) for step in (0, 10**6)] == [0, 0]


def test_parts_take_what_they_leave_out_from_the_stage_and_the_data():
    stage = Stage(
        resolutions=[32], teachers=["clip"], batch_size=8,
        partitions=[Partition(), Partition(teachers=["sam"], size=128, resolutions=[64]), Partition(batch_size=2)],
    )  # fmt: skip
    plan = Plan([stage], size=48, batch_size=5)
    parts = [plan.part(0, number) for number in range(3)]
    assert [(p.resolution, p.size, p.batch_size) for p in parts] == [(32, 32, 8), (64, 128, 8), (32, 32, 2)]
    assert [plan.teachers(0, number, NAMES) for number in range(3)] == [["clip"], ["sam"], ["clip"]]
    assert plan.present(0, NAMES) == ["clip", "sam"]
    plain = Plan([], size=48, batch_size=5).part(7, 0)
    assert (plain.resolution, plain.size, plain.batch_size) == (48, 48, 5)


def test_each_partition_receives_its_share_of_slots():
    """Whatever the ranks and micro-batches, each step has every partition equally often."""
    plan = Plan([Stage(partitions=[Partition(batch_size=n) for n in (4, 2, 1)])])
    for ranks, micros in ((1, 3), (3, 1), (3, 2), (2, 3), (6, 1)):
        numbers = [plan.part(5, slot(m, r, ranks)).partition for m in range(micros) for r in range(ranks)]
        assert set(Counter(numbers).values()) == {ranks * micros // 3}


def test_every_resolution_is_drawn_equally_often_and_the_same_everywhere():
    sizes = [128, 192, 224, 256, 384, 432]
    plan = Plan([Stage(resolutions=sizes)], seed=3)
    drawn = [plan.part(step, 0).resolution for step in range(12_000)]
    counts = Counter(drawn)
    assert set(counts) == set(sizes)
    assert max(abs(count - 2000) for count in counts.values()) < 4 * (2000 * 5 / 6) ** 0.5
    assert drawn == [
        plan.part(step, other).resolution for step, other in zip(range(12_000), range(12_000), strict=True)
    ]
    assert drawn[:50] != [Plan([Stage(resolutions=sizes)], seed=4).part(step, 0).resolution for step in range(50)]
    repeats = sum(a == b for a, b in zip(drawn, drawn[1:], strict=False)) / len(drawn)
    assert repeats == pytest.approx(1 / 6, abs=0.015), "one step's draw says nothing about the next"


def test_scales_give_every_teacher_the_mean_over_all_its_images():
    """By hand: sum over slots of scale x mean / slots = mean over images, for any losses."""
    stage = Stage(partitions=[Partition(["clip", "dino"], batch_size=4), Partition(["clip", "sam"], batch_size=1)])
    plan = Plan([stage])
    losses = {("clip", 0): [1, 2, 3, 4], ("dino", 0): [5, 6, 7, 8], ("clip", 1): [10], ("sam", 1): [7]}
    for slots in (2, 4):
        for index, name in enumerate(NAMES):
            total = 0.0
            for number in range(slots):
                values = losses.get((name, number % 2))
                scale = plan.scales(0, number % 2, slots, NAMES)[index]
                assert (scale == 0) == (values is None)
                total += scale * sum(values) / len(values) / slots if values else 0
            seen = [value for (who, _), values in losses.items() if who == name for value in values]
            assert total == pytest.approx(sum(seen) / len(seen))
    assert Plan([]).scales(0, 0, 3, NAMES) == [1, 1, 1]


def test_alone_is_what_needs_no_bookkeeping():
    assert Plan([]).alone() and Plan([Stage(steps=3, resolutions=[32]), Stage()]).alone()
    assert not Plan([Stage(teachers=["clip"])]).alone()
    assert not Plan([Stage(partitions=[Partition(), Partition()])]).alone()


def test_slots_that_leave_a_partition_out_are_refused():
    plan = Plan([Stage(partitions=[Partition(), Partition()])])
    with pytest.raises(UserError, match="stages.0.partitions: 2 of them, but a step has 3 micro-batches"):
        plan.scales(0, 0, 3, NAMES)


def test_schedules_restart_or_go_on():
    stages = [Stage(steps=10), Stage(steps=20, restart=False), Stage()]
    assert Plan(stages).spans(100) == [(0, 30), (0, 30), (30, 70)]
    assert Plan([]).spans(100) == [(0, 100)]
    assert Plan([Stage(steps=10), Stage(restart=False)]).spans(100) == [(0, 100), (0, 100)]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([Stage(steps=90), Stage(steps=20)], "stages: 110 steps in all; valid: at most trainer.max_steps 100"),
        (
            [Stage(steps=100), Stage()],
            "stages.1.steps: missing, and the stages before it take all of trainer.max_steps",
        ),
        ([Stage(), Stage(steps=5)], "stages.0.steps: missing; valid: > 0 (only the last"),
        ([Stage(steps=0)], "stages.0.steps: 0; valid: > 0"),
        ([Stage(steps=5, freeze_steps=5)], "stages.0.freeze_steps: 5; valid: less than the stage's 5 steps"),
        ([Stage(warmup_steps=-1)], "stages.0.warmup_steps: -1; valid: >= 0"),
        ([Stage(lr=0.0)], "stages.0.lr: 0.0; valid: > 0"),
        ([Stage(teachers=["clpi"])], "stages.0.teachers: 'clpi'; valid: clip, dino, sam (did you mean clip?)"),
        ([Stage(partitions=[Partition(), Partition(["x"])])], "stages.0.partitions.1.teachers: 'x'; valid: clip, dino"),
        ([Stage(teachers=[])], "stages.0.teachers: empty; valid: names of teachers"),
        ([Stage(resolutions=[])], "stages.0.resolutions: empty"),
        ([Stage(resolutions=[64, 0])], "stages.0.resolutions: 0; valid: > 0"),
        ([Stage(resolutions=[64, 512], size=256)], "stages.0.resolutions: 512; valid: at most the size 256"),
        ([Stage(partitions=[Partition(batch_size=3), Partition()])], "stages.0.partitions: batch_size [3, None]"),
        ([Stage(batch_size=0)], "stages.0.batch_size: 0; valid: > 0"),
    ],
)
def test_each_problem_has_its_key_and_its_valid_set(stages, words):
    found = list(problems(stages, max_steps=100, teachers=NAMES))
    assert len(found) == 1 and words in found[0] and "\n" not in found[0], found


def test_all_problems_at_once():
    stages = [Stage(steps=200, teachers=["x"], lr=-1.0), Stage(partitions=[Partition(["y"], resolutions=[0])])]
    found = list(problems(stages, max_steps=100, teachers=NAMES))
    for key in (
        "stages.0.teachers",
        "stages.0.lr",
        "stages.1.partitions.0.teachers",
        "stages.1.partitions.0.resolutions",
    ):
        assert sum(line.startswith(key + ":") for line in found) == 1, found
    assert any(line.startswith("stages: 200 steps in all") for line in found)
    assert list(problems([Stage(steps=50), Stage(steps=50)], max_steps=100, teachers=NAMES)) == []
