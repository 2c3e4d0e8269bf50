# SPDX-License-Identifier: Apache-2.0
"""Intervals and verdicts of the lab."""

import numpy as np
import pytest

from lab.claims import CLAIMS, Setting, equal, judge, larger, no_worse
from lab.plan import MAX_RATES, PRESETS, RATES, best_rate, is_at_the_edge, rate_search
from lab.results import Cell, Estimate, Results, estimate


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
        (larger, 0.01, 0.2, "supported"),
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


def test_claims_are_judged_where_there_is_what_they_compare():
    preset = PRESETS["quick"]
    kinds = ("exist", "count", "what", "where", "leftmost", "topmost")
    points = [
        {"step": step, "cpu_seconds": 1.0 * step, "right": dict.fromkeys(kinds, "1" * 30), "elsewhere": {}}
        for step in preset.points
    ]
    worse = [{**point, "right": dict.fromkeys(kinds, "0" * 30)} for point in points]
    records = [record("c-abs", seed, {}, points=points) for seed in range(3)]
    records += [record("pool-mlp", seed, {}, points=worse) for seed in range(3)]
    judged = judge(Results(records, images(30, kinds=kinds)), Setting(preset, 144))
    assert [each.claim.text for each in judged] == ["C-Abs is better than average pooling + MLP, at equal tokens"]
    assert judged[0].verdict == "supported" and judged[0].found.mean == 1
    two_seeds = [each for each in records if each["seed"] < 2]
    (undecided,) = judge(Results(two_seeds, images(30, kinds=kinds)), Setting(preset, 144))
    assert undecided.verdict == "undecided" and len(CLAIMS) > 8


@pytest.mark.parametrize("best, tried", [(6e-3, 5), (4e-2, 6), (1e-3, 6), (0.1, 7)])
def test_the_best_learning_rate_is_not_at_the_edge(best, tried):
    def run_all(planned):
        share = [max(0, 10 - int(4 * abs(np.log(each.learning_rate / best)))) for each in planned]
        return [
            {
                "projector": each.projector,
                "learning_rate": each.learning_rate,
                "points": [{"right": {"exist": "1" * right + "0" * (10 - right)}}],
            }
            for each, right in zip(planned, share)
        ]

    (found,) = rate_search(["c-abs"], PRESETS["quick"], None, 144, run_all).values()
    assert len(found) == tried and set(RATES) <= found.keys()
    assert min(found) < max(found, key=found.get) < max(found)


def test_a_best_learning_rate_at_the_edge():
    """The search ends, and the report can tell. Where all are equally good, the middle is taken."""

    def run_all(planned):
        return [
            {
                "projector": each.projector,
                "learning_rate": each.learning_rate,
                "points": [{"right": {"exist": "1" * int(1000 * each.learning_rate) + "0" * 9000}}],
            }
            for each in planned
        ]

    (found,) = rate_search(["c-abs"], PRESETS["quick"], None, 144, run_all).values()
    assert len(found) == MAX_RATES and best_rate(found) == max(found) and is_at_the_edge(found)
    alike = dict.fromkeys(RATES, 0.3)
    assert best_rate(alike) == RATES[2] and not is_at_the_edge(alike)
