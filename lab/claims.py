# SPDX-License-Identifier: Apache-2.0
"""Sentences that people say about projectors, each with the figure that decides it here. A new claim is an entry of
`CLAIMS`; where a preset lacks what it compares, it is left out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from lab.plan import Preset, tokens_of
from lab.results import Cell, Estimate, Results, estimate
from lab.scenes import GROUPS
from lab.ways import PLAIN, elastic_width

MIN_SEEDS = 3
MARGIN = 0.03  # below which two accuracies count as equal


def larger(found: Estimate) -> str:
    """By more than what counts as equal."""
    return _verdict(found.low > MARGIN, found.high < 0)


def no_worse(found: Estimate, margin: float = MARGIN) -> str:
    return _verdict(found.low > -margin, found.high < -margin)


def equal(found: Estimate) -> str:
    return _verdict(found.low > -MARGIN and found.high < MARGIN, found.low > MARGIN or found.high < -MARGIN)


def _verdict(supported: bool, refuted: bool) -> str:
    return "supported" if supported else "not supported" if refuted else "undecided"


@dataclass(frozen=True)
class Setting:
    """What claims refer to: the run's preset and its number of patches."""

    preset: Preset
    num_patches: int

    def main(self, name: str) -> Cell:
        """Of the main comparison."""
        return Cell(name, tokens_of(name, self.preset.num_tokens, self.num_patches))

    def matched(self, name: str) -> Cell:
        return Cell(name, self.preset.num_tokens, "matched")

    def curve(self, name: str, which: int) -> Cell:
        """At the fewest (0) or the most (-1) tokens of the curve."""
        return Cell(name, sorted(self.preset.curve)[which])

    def elastic(self, name: str, way: str = PLAIN) -> Cell:
        return Cell(name, self.preset.num_tokens, elastic_width(way))

    def every_patch(self, name: str, width: str = "default") -> Cell:
        return Cell(name, self.num_patches, width)

    @property
    def end(self) -> int:
        """Steps of the comparison."""
        return self.preset.points[-1]

    @property
    def early(self) -> int:
        return self.preset.points[-2]

    @property
    def long(self) -> int:
        return self.preset.long_points[-1]


@dataclass(frozen=True)
class Claim:
    """
    Args:
        text: the sentence.
        figure: what is computed, in words.
        draws: of the figure. A KeyError or IndexError: this run does not have what it takes.
        verdict: from the figure with its interval.
    """

    text: str
    figure: str
    draws: Callable[[Results, Setting], np.ndarray]
    verdict: Callable[[Estimate], str]


def _answers(results: Results, cell: Cell, step: int):
    if cell not in results.cells:
        raise KeyError(cell)
    return results.at_step(cell, step)


def _apart(results: Results, first: Cell, second: Cell, step: int, kinds=None) -> np.ndarray:
    return results.difference(_answers(results, first, step), _answers(results, second, step), kinds)


def _equal_time(results: Results, setting: Setting, first: str, second: str, kinds=None) -> np.ndarray:
    """After the CPU time of the one that was done first."""
    cells = setting.main(first), setting.main(second)
    if not results.cells.keys() >= set(cells):
        raise KeyError(cells)
    seconds, others = (results.seconds(cell, setting.end) for cell in cells)
    shorter = {unit: min(seconds[unit], others[unit]) for unit in seconds.keys() & others.keys()}
    return results.difference(*(results.at_seconds(cell, shorter) for cell in cells), kinds)


def _lag_lost(results: Results, setting: Setting) -> np.ndarray:
    """Over the runs that went on."""
    cells, lags = (setting.main("c-abs"), setting.main("resampler")), []
    longer = [_answers(results, cell, setting.long) for cell in cells]
    for step in (setting.end, setting.long):
        first, second = (_answers(results, cell, step) for cell in cells)
        went_on = first.keys() & second.keys() & longer[0].keys() & longer[1].keys()
        lags.append(results.difference({unit: first[unit] for unit in went_on}, second))
    return lags[0] - lags[1]


def _used_elsewhere(results: Results, setting: Setting) -> np.ndarray:
    trained_there = setting.curve("c-abs", -1)
    answers = _answers(results, trained_there, setting.end)
    used = results.elsewhere(setting.main("c-abs"), trained_there.num_tokens, setting.end)
    return results.difference(used, answers)


def elastic_gap(
    results: Results, setting: Setting, name: str, numbers: Sequence[int], step: int, way: str = PLAIN
) -> np.ndarray:
    """The mean over some M of: an elastic projector after `step` steps, minus one that is trained for this M alone, in the end."""
    elastic, gaps = setting.elastic(name, way), []
    if not numbers or elastic not in results.cells:
        raise KeyError(elastic)
    for number in numbers:
        fixed = Cell(name, number)
        gaps.append(results.difference(results.at(elastic, number, step), results.at_step(fixed, setting.end)))
    return np.mean(gaps, axis=0)


def _elastic_claims(who: str, way: str) -> tuple[Claim, ...]:
    def worse_end(r: Results, s: Setting) -> np.ndarray:
        ends = (s.preset.numbers[0], s.preset.numbers[-1])
        return np.minimum(*(elastic_gap(r, s, "c-abs", [end], 2 * s.end, way) for end in ends))

    keeps, figure = f"{who} keeps what those trained for one M have", f"elastic ({way}) minus fixed"
    return (
        Claim(
            f"{keeps}, inside its range, at equal steps",
            f"{figure}, mean over the M between the fewest and the most; above -0.02",
            lambda r, s: elastic_gap(r, s, "c-abs", s.preset.numbers[1:-1], s.end, way),
            partial(no_worse, margin=0.02),
        ),
        Claim(
            f"{keeps}, at all of them, at twice the steps",
            f"{figure} after twice the steps, mean over all M; above -0.01",
            lambda r, s: elastic_gap(r, s, "c-abs", s.preset.numbers, 2 * s.end, way),
            partial(no_worse, margin=0.01),
        ),
        Claim(
            f"{keeps}, at both ends of its range, at twice the steps",
            f"{figure} after twice the steps, the worse of the fewest and the most; above -0.01",
            worse_end,
            partial(no_worse, margin=0.01),
        ),
    )


CLAIMS = (
    Claim(
        "C-Abs learns questions of place faster than a resampler, at equal steps",
        "C-Abs minus resampler, place, early",
        lambda r, s: _apart(r, s.main("c-abs"), s.main("resampler"), s.early, GROUPS["place"]),
        larger,
    ),
    Claim(
        "C-Abs learns questions of place faster than a resampler, at equal CPU time",
        "C-Abs minus resampler, place, after the time of the shorter run",
        lambda r, s: _equal_time(r, s, "c-abs", "resampler", GROUPS["place"]),
        larger,
    ),
    Claim(
        "the resampler's lag is one of speed: it shrinks with three times the steps",
        "the lag in the end minus the lag after three times the steps",
        _lag_lost,
        larger,
    ),
    Claim(
        "C-Abs is better than average pooling + MLP, at equal tokens",
        "C-Abs minus average pooling + MLP",
        lambda r, s: _apart(r, s.main("c-abs"), s.main("pool-mlp"), s.end),
        larger,
    ),
    Claim(
        "C-Abs is better than average pooling + MLP, at equal tokens and CPU time",
        "C-Abs minus average pooling + MLP, after the time of the shorter run",
        lambda r, s: _equal_time(r, s, "c-abs", "pool-mlp"),
        larger,
    ),
    Claim(
        "C-Abs is better than average pooling + MLP, at equal tokens and parameters",
        "C-Abs minus average pooling + MLP of matched width",
        lambda r, s: _apart(r, s.main("c-abs"), s.matched("pool-mlp"), s.end),
        larger,
    ),
    Claim(
        "C-Abs is better than an MLP at one token for each patch, at equal parameters",
        "C-Abs minus MLP of matched width, both M = N",
        lambda r, s: _apart(r, s.every_patch("c-abs"), s.every_patch("pool-mlp", "matched"), s.end),
        larger,
    ),
    Claim(
        "C-Abs at M < N keeps what a linear projector keeps at N",
        f"C-Abs minus linear at M = N; no worse: above -{MARGIN}",
        lambda r, s: _apart(r, s.main("c-abs"), s.every_patch("linear"), s.end),
        no_worse,
    ),
    Claim(
        "D-Abs equals C-Abs",
        f"D-Abs minus C-Abs; equal: within {MARGIN}",
        lambda r, s: _apart(r, s.main("d-abs"), s.main("c-abs"), s.end),
        equal,
    ),
    Claim(
        "more visual tokens are better for C-Abs, from the fewest to the main M",
        "C-Abs at the main M minus at the fewest",
        lambda r, s: _apart(r, s.main("c-abs"), s.curve("c-abs", 0), s.end),
        larger,
    ),
    Claim(
        "more visual tokens are better for C-Abs, from the main M to more",
        "C-Abs at the largest M of the curve minus at the main M",
        lambda r, s: _apart(r, s.curve("c-abs", -1), s.main("c-abs"), s.end),
        larger,
    ),
    Claim(
        "a C-Abs trained at one M serves others",
        f"C-Abs trained at the main M and used at the largest of the curve, minus one trained there; above -{MARGIN}",
        _used_elsewhere,
        no_worse,
    ),
    *_elastic_claims("one elastic C-Abs", PLAIN),
    *_elastic_claims("one elastic C-Abs that learned twice the images a step", "twice the images a step"),
)


@dataclass(frozen=True)
class Judged:
    claim: Claim
    found: Estimate
    verdict: str


def judge(results: Results, setting: Setting) -> list[Judged]:
    """The claims that this run can say something about. With fewer than `MIN_SEEDS` seeds all are undecided."""
    judged = []
    for claim in CLAIMS:
        try:
            found = estimate(claim.draws(results, setting))
        except (KeyError, IndexError):  # a projector, an M or a kind that this run does not have
            continue
        judged.append(Judged(claim, found, claim.verdict(found) if len(results.seeds) >= MIN_SEEDS else "undecided"))
    return judged
