# SPDX-License-Identifier: Apache-2.0
"""The lab's plan, intervals and verdicts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from lab.claims import Setting, equal, judge, larger, no_worse
from lab.experiment import Experiment
from lab.plan import (
    MAX_RATES,
    PRESETS,
    RATES,
    Variant,
    best_rate,
    experiments,
    is_at_the_edge,
    rate_search,
    variants_of,
)
from lab.projectors import make_projector, names_of, projector_config
from lab.results import Cell, Estimate, Results, estimate
from lab.scene_task import SceneTask
from lab.ways import PLAIN, WAYS, elastic_width


def record(projector: str, seed: int, right: dict[str, str], num_tokens: int = 16, tower: str = "clip", points=None):
    points = points or [{"step": 10, "cpu_seconds": 1.0, "right": right, "elsewhere": {}}]
    return {
        "projector": projector,
        "num_tokens": num_tokens,
        "width": "default",
        "tower": tower,
        "seed": seed,
        "points": points,
    }


def answers(accuracy: float, number: int, seed: int) -> str:
    return "".join(str(int(x)) for x in np.random.default_rng(seed).random(number) < accuracy)


def images(number: int, seeds=(0, 1, 2), kinds=("exist",), towers=("clip",)) -> dict:
    return {(tower, seed): {kind: np.arange(number) for kind in kinds} for tower in towers for seed in seeds}


def test_the_interval_of_one_seed_is_that_of_a_share():
    right = {"exist": answers(0.7, 400, 5)}
    results = Results([record("c-abs", 0, right)], images(400, seeds=(0,)))
    found = estimate(results.draws(results.at_step(Cell("c-abs", 16), 10)))
    share = right["exist"].count("1") / 400
    assert found.mean == pytest.approx(share)
    error = 1.96 * np.sqrt(share * (1 - share) / 400)  # the normal approximation
    assert found.low == pytest.approx(share - error, abs=0.01) and found.high == pytest.approx(share + error, abs=0.01)


def test_seeds_that_differ_widen_the_interval():
    alike = [record("c-abs", seed, {"exist": answers(0.7, 400, seed)}) for seed in range(3)]
    apart = [record("c-abs", seed, {"exist": answers(0.5 + 0.2 * seed, 400, seed)}) for seed in range(3)]
    widths = []
    for records in (alike, apart):
        results = Results(records, images(400))
        found = estimate(results.draws(results.at_step(Cell("c-abs", 16), 10)))
        widths.append(found.high - found.low)
    assert widths[1] > 2 * widths[0]


def test_a_difference_is_one_of_pairs():
    """Two projectors that fail on the same images do not differ, however few images there are."""
    right = [{"exist": answers(0.6, 30, seed)} for seed in range(3)]
    records = [record(name, seed, right[seed]) for name in ("c-abs", "d-abs") for seed in range(3)]
    results = Results(records, images(30))
    found = results.difference(*(results.at_step(Cell(name, 16), 10) for name in ("c-abs", "d-abs")))
    assert np.abs(found).max() == 0


def test_only_common_units_are_compared():
    """A tower that one of the two did not run with does not count."""
    right = {"exist": "1" * 20}
    wrong = {"exist": "0" * 20}
    records = [record("c-abs", seed, right) for seed in range(3)]
    records += [record("c-abs", seed, wrong, tower="siglip") for seed in range(3)]
    records += [record("linear", seed, right) for seed in range(3)]
    results = Results(records, images(20, towers=("clip", "siglip")))
    first, second = (results.at_step(Cell(name, 16), 10) for name in ("c-abs", "linear"))
    assert results.draws(first)[0] == 0.5 and results.difference(first, second)[0] == 0


def test_answers_between_two_points():
    points = [
        {"step": 10, "cpu_seconds": 1.0, "right": {"exist": "0000"}, "elsewhere": {}},
        {"step": 20, "cpu_seconds": 3.0, "right": {"exist": "1100"}, "elsewhere": {}},
    ]
    results = Results([record("c-abs", 0, {}, points=points)], images(4, seeds=(0,)))
    cell = Cell("c-abs", 16)
    for seconds, share in ((0.5, 0), (2.0, 0.25), (2.5, 0.375), (9.0, 0.5)):
        assert results.draws(results.at_seconds(cell, {("clip", 0): seconds}))[0] == pytest.approx(share)


@pytest.mark.parametrize(
    "rule, low, high, verdict",
    [
        (larger, 0.04, 0.2, "supported"),
        (larger, 0.02, 0.2, "undecided"),
        (larger, -0.01, 0.2, "undecided"),
        (larger, -0.2, -0.01, "not supported"),
        (no_worse, -0.02, 0.2, "supported"),
        (no_worse, -0.04, 0.2, "undecided"),
        (no_worse, -0.2, -0.04, "not supported"),
        (equal, -0.02, 0.02, "supported"),
        (equal, -0.02, 0.04, "undecided"),
        (equal, 0.04, 0.2, "not supported"),
    ],
)
def test_verdicts(rule, low, high, verdict):
    assert rule(Estimate((low + high) / 2, low, high)) == verdict


def test_seeds_that_share_their_images_are_drawn_together():
    """Three seeds that fail on the same images tell no more about images than one does."""
    right = {"exist": answers(0.6, 100, 1)}
    records = [record("c-abs", seed, right) for seed in range(3)]
    widths = []
    for sets in (None, {("clip", seed): 0 for seed in range(3)}):
        results = Results(records, images(100), sets)
        found = estimate(results.draws(results.at_step(Cell("c-abs", 16), 10)))
        widths.append(found.high - found.low)
    assert widths[1] > 1.3 * widths[0]


KINDS = ("exist", "count", "what", "where", "leftmost", "topmost")


def course(
    accuracies: dict[int, float], seconds: float = 1.0, number: int = 200, elsewhere: dict | None = None
) -> list:
    """Points of a run: by step, the share of questions of each kind that is answered, always the first ones."""
    return [
        {
            "step": step,
            "cpu_seconds": seconds * step,
            "right": dict.fromkeys(KINDS, "1" * round(number * share) + "0" * round(number * (1 - share))),
            "elsewhere": {
                each: dict.fromkeys(KINDS, "1" * round(number * part) + "0" * round(number * (1 - part)))
                for each, part in (elsewhere or {}).items()
            },
        }
        for step, share in accuracies.items()
    ]


def judged(records: list[dict], preset=PRESETS["full"]) -> dict[str, tuple[float, str]]:
    found = judge(Results(records, images(200, kinds=KINDS, towers=("clip", "siglip"))), Setting(preset, 144))
    return {each.claim.figure: (round(each.found.mean, 3), each.verdict) for each in found}


def test_the_figures_of_claims():
    early, end, long = PRESETS["full"].points[-2], PRESETS["full"].points[-1], PRESETS["full"].long_points[-1]
    records = []
    for seed in range(3):
        for tower, better in (("clip", 0.0), ("siglip", 0.2)):
            steps = {early: 0.4, end: 0.6 + better}
            longer = {long: 0.7} if tower == "clip" else {}
            points = course(steps | longer, seconds=1, elsewhere={"36": 0.3})
            records.append(record("c-abs", seed, {}, points=points, tower=tower))
            points = course({early: 0.2, end: 0.3} | ({long: 0.6} if longer else {}), seconds=2)
            records.append(record("resampler", seed, {}, points=points, tower=tower))
        records.append(record("pool-mlp", seed, {}, points=course({early: 0.2, end: 0.5}, seconds=0.5)))
        records.append(record("c-abs", seed, {}, num_tokens=36, points=course({early: 0.5, end: 0.8})))
    found = judged(records)
    assert found["C-Abs minus resampler, place, early"] == (0.2, "supported")
    # After the time in which C-Abs is done, the resampler has done half of its steps.
    assert found["C-Abs minus resampler, place, after the time of the shorter run"] == (0.5, "supported")
    assert found["the lag in the end minus the lag after three times the steps"] == (0.2, "supported")  # on clip alone
    assert found["C-Abs minus average pooling + MLP"] == (0.1, "supported")  # siglip's C-Abs has nobody to compare with
    # The baseline is done when C-Abs has done half of its steps, before its first point.
    assert found["C-Abs minus average pooling + MLP, after the time of the shorter run"] == (-0.1, "not supported")
    assert found["C-Abs at the largest M of the curve minus at the main M"] == (0.2, "supported")
    used = "C-Abs trained at the main M and used at the largest of the curve, minus one trained there; above -0.03"
    assert found[used] == (-0.5, "not supported")
    assert not any("linear" in figure or "D-Abs" in figure or "fewest" in figure for figure in found)


def test_a_preset_without_longer_runs_has_no_claim_about_them():
    points = course(dict.fromkeys(PRESETS["quick"].points, 0.5))
    records = [record(name, seed, {}, points=points) for name in ("c-abs", "resampler") for seed in range(3)]
    assert len(judged(records, PRESETS["quick"])) == 2


def test_two_seeds_decide_nothing():
    points = {
        name: course(dict.fromkeys(PRESETS["quick"].points, share)) for name, share in (("c-abs", 1), ("pool-mlp", 0))
    }
    records = [record(name, seed, {}, points=points[name]) for name in points for seed in range(3)]
    assert judged(records, PRESETS["quick"])["C-Abs minus average pooling + MLP"] == (1, "supported")
    records = [each for each in records if each["seed"] < 2]
    assert judged(records, PRESETS["quick"])["C-Abs minus average pooling + MLP"] == (1, "undecided")


@pytest.mark.parametrize("best, tried", [(6e-3, 5), (4e-2, 6), (1e-3, 6), (0.1, 7)])
def test_the_best_learning_rate_is_not_at_the_edge(best, tried):
    found = search(lambda rate: abs(np.log(rate / best)))
    assert len(found) == tried and set(RATES) <= found.keys()
    assert min(found) < min(found, key=found.get) < max(found)


def search(loss) -> dict[float, float]:
    def run_all(planned):
        return [{"points": [{"loss": loss(each.learning_rate)}]} for each in planned]

    variant = Variant("c-abs", 16)
    return rate_search([variant], PRESETS["quick"], None, run_all)[variant]


def test_a_best_learning_rate_at_the_edge():
    """The search ends, and the report can tell. Where all are equally good, the middle is taken."""
    found = search(lambda rate: 1 / rate)
    assert len(found) == MAX_RATES and best_rate(found) == max(found) and is_at_the_edge(found)
    alike = dict.fromkeys(RATES, 0.3)
    assert best_rate(alike) == RATES[2] and not is_at_the_edge(alike)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"points": (10,)}, "at least two points, all ascending"),
        ({"points": (1000, 2000)}, r"points and long_points are \[1000, 2000, 720, 1080\]"),
        ({"curve": (16,)}, "name an M twice"),
        ({"curve": (5,)}, "M = 5 is not a square; use 4 or 9"),
        ({"seeds": 0}, "seeds=0"),
        ({"images": (10, 10)}, r"images=\[10, 10\]"),
    ],
)
def test_presets_that_cannot_be_run(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(PRESETS["full"], **wrong)


def test_what_is_planned():
    """Nothing twice; each M and width has a learning rate of its own; the second tower has the main comparison alone."""
    task = {tower: SceneTask("", tower, 0, 0, (9, 9, 9), 1, 1) for tower in ("clip", "siglip")}
    names, preset = names_of("linear,pool-mlp,c-abs"), PRESETS["full"]
    variants = variants_of(names, preset, task["clip"])
    assert len(set(variants)) == len(variants)
    rates = {variant: index / 1000 for index, variant in enumerate(variants, 1)}
    planned = experiments(rates, preset, list(task.values()), 144)
    assert len({each.name for each in planned}) == len(planned)
    on = {
        tower: {(each.projector, each.num_tokens, each.hidden_size) for each in planned if each.task.tower == tower}
        for tower in task
    }
    assert on["siglip"] == {("pool-mlp", 16, None), ("c-abs", 16, None)}
    assert on["clip"] == {
        ("linear", 144, None), ("blind", 16, None), ("shuffled", 16, None),
        *(("pool-mlp", number, None) for number in (4, 16, 36)), ("pool-mlp", 16, 592), ("pool-mlp", 144, 592),
        *(("c-abs", number, None) for number in (4, 16, 36, 144)),
    }  # fmt: skip
    for each in planned:
        as_planned = Variant(each.projector, each.num_tokens, each.hidden_size)
        if as_planned in rates:
            assert each.learning_rate == rates[as_planned]
        assert each.points[-1] == (1080 if as_planned == Variant("c-abs", 16) and each.task.tower == "clip" else 360)
    rate_of = {each.projector: each.learning_rate for each in planned}
    assert rate_of["blind"] == rates[Variant("pool-mlp", 16)] and rate_of["shuffled"] == rates[Variant("c-abs", 16)]


def test_the_claims_about_an_elastic_projector():
    preset, records = PRESETS["elastic"], []
    early, end = preset.points[-2:]
    fixed = {4: 0.4, 9: 0.5, 16: 0.6, 25: 0.6, 36: 0.6}
    for seed in range(3):
        for number, share in fixed.items():
            records.append(record("c-abs", seed, {}, num_tokens=number, points=course({early: 0.1, end: share})))
        points = course({end: 0.5}, elsewhere={"4": 0.3, "9": 0.45, "25": 0.6, "36": 0.5})
        points += course({2 * end: 0.7}, elsewhere=dict.fromkeys(("4", "9", "25", "36"), 0.7))
        records.append({**record("c-abs", seed, {}, points=points), "width": "elastic"})
    found = {figure: each for figure, each in judged(records, preset).items() if figure.startswith("elastic")}
    assert list(found.values()) == [(-0.05, "not supported"), (0.16, "supported"), (0.1, "supported")]
    twice = elastic_width("twice the images a step")
    other = [{**each, "width": twice} for each in records if each["width"] == "elastic"]
    more = {figure: each for figure, each in judged(records + other, preset).items() if figure.startswith("elastic")}
    assert len(more) == 6 and list(more.values()) == 2 * list(found.values())
    without = [each for each in records if each["width"] != "elastic"]
    assert not any(figure.startswith("elastic") for figure in judged(without, preset))


def test_what_is_planned_of_an_elastic_projector():
    task, preset = SceneTask("", "clip", 0, 0, (9, 9, 9), 1, 1), PRESETS["elastic"]
    variants = variants_of(names_of(None, preset.left_out), preset, task)
    every_m = (4, 9, 16, 25, 36)
    assert set(variants) == {*(Variant("c-abs", number) for number in every_m), Variant("c-abs", 16, None, every_m)}
    planned = experiments(dict.fromkeys(variants, 0.01), preset, [task], 144)
    points = {(each.num_tokens, bool(each.trained_at)): (each.points[-1], each.elsewhere) for each in planned}
    assert points.pop((16, True)) == (720, ()) and points.pop((16, False)) == (360, (4, 9, 25, 36))
    assert set(points.values()) == {(360, ())} and len(points) == 4
    assert Counter(each.way for each in planned if each.trained_at) == dict.fromkeys(WAYS, 1)
    assert len({each.name for each in planned}) == len(planned)
    d_abs = experiments({Variant("d-abs", 16, None, every_m): 0.01}, preset, [task], 144)
    assert {each.way for each in d_abs} == {name for name, way in WAYS.items() if not way.scaled}


class Asked:
    """A task whose batches say what was asked for."""

    seed = 3

    def batch(self, *asked):
        return asked


def lessons(steps: int, way: str, trained_at=(4, 9, 16)) -> list[list]:
    experiment = Experiment("c-abs", Asked(), 16, 0.01, (10,), trained_at=trained_at, way=way)
    return [experiment.lessons(step) for step in range(steps)]


def test_each_image_of_an_elastic_step_draws_its_m():
    assert Experiment("c-abs", Asked(), 16, 0.01, (10,)).lessons(7) == [(16, (7, 32, 16), None)]
    assert lessons(8, PLAIN, trained_at=(16,))[7] == [(16, (7, 32, 16), None)]
    drawn, seen = Counter(), set()
    for step in lessons(200, PLAIN):
        assert sum(count for _, (_, count, _), _ in step) == 32
        for number, (key, count, asked), teacher in step:
            assert number == asked and key not in seen and teacher is None
            seen.add(key)
            drawn[number] += count
    assert all(abs(count - 200 * 32 / 3) < 150 for count in drawn.values()) and len(drawn) == 3


def test_other_ways_to_learn_several_m():
    each_batch = lessons(200, "each batch draws its M")
    assert all(len(step) == 1 and step[0].batch[1] == 32 for step in each_batch)
    assert {step[0].number for step in each_batch} == {4, 9, 16}
    drawn = Counter()
    for step in lessons(200, "the fewest and the most twice as often"):
        drawn.update({lesson.number: lesson.batch[1] for lesson in step})
    assert [round(drawn[number] / 6400, 1) for number in (4, 9, 16)] == [0.4, 0.2, 0.4]
    for step in lessons(20, "the largest M teaches"):
        for number, batch, teacher in step:
            assert teacher == (None if number == 16 else (16, (*batch[:2], 16)))
    for step in lessons(20, "twice the images a step"):
        assert sum(lesson.batch[1] for lesson in step) == 64 and len({lesson.batch[0] for lesson in step}) == len(step)
    then = lessons(260, "the default M alone for 240 steps, then each image draws")
    assert all(len(step) == 1 and step[0][0] == 16 and step[0].batch[1] == 32 for step in then[:240])
    assert {lesson.number for step in then[240:] for lesson in step} == {4, 9, 16}


def test_a_projector_with_a_scale_for_each_m():
    task = SceneTask("", "clip", 0, 0, (9, 9, 9), 1, 1)
    config = projector_config("c-abs", *task.configs(), 16, None, (4, 16))
    torch.manual_seed(0)
    plain = make_projector("c-abs", config)
    scaled = make_projector("c-abs", config, scaled=True)
    assert scaled.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["scale", "shift"]
    features = torch.randn(2, 144, 64)
    torch.testing.assert_close(scaled(features, 4), plain(features, 4))
    with torch.no_grad():
        scaled.shift[0] += 1.0
    torch.testing.assert_close(scaled(features, 16), plain(features, 16))
    assert not torch.allclose(scaled(features, 4), plain(features, 4), atol=0.01)
