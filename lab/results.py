# SPDX-License-Identifier: Apache-2.0
"""Accuracies of finished experiments, with intervals.

An accuracy is the mean over kinds of questions. Its interval is a bootstrap over seeds and, within a seed, over images,
widened by sqrt(n / (n - 1)) for n seeds. With three seeds it is a rough one.
All draws use the same random numbers, so that a difference of two accuracies is one of pairs: the same images, the same
stand-ins.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DRAWS = 2000
INTERVAL = (2.5, 97.5)  # percentiles

Unit = tuple[str, int]  # tower, seed
Right = dict[
    str, np.ndarray
]  # by kind, whether each row was right: 0 to 1, and between them between two points of a run


@dataclass(frozen=True)
class Cell:
    """What one line of a comparison is about. `width` is `default`, `matched`, or, for one that is trained for several M, of which
    `num_tokens` is the default, `elastic` and the way in which it learned them where that is not the plain one."""

    projector: str
    num_tokens: int
    width: str = "default"

    def __str__(self) -> str:
        return f"{self.projector} at M = {self.num_tokens}" + ("" if self.width == "default" else f", {self.width}")


@dataclass(frozen=True)
class Estimate:
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(draws: np.ndarray) -> Estimate:
    low, high = np.percentile(draws[1:], INTERVAL)
    return Estimate(float(draws[0]), float(low), float(high))


class Results:
    """
    Args:
        records: as `lab.experiment.run` writes them, of the `test` split.
        images: by unit and kind, the image that each row asks about.
        sets: by unit, the number of its set of images. Units with the same set are drawn together.
    """

    def __init__(
        self, records: list[dict], images: dict[Unit, dict[str, np.ndarray]], sets: dict[Unit, int] | None = None
    ):
        self.images, self.sets = images, sets or {unit: unit[1] for unit in images}
        self.cells: dict[Cell, dict[Unit, dict]] = {}
        for record in records:
            cell = Cell(record["projector"], record["num_tokens"], record["width"])
            self.cells.setdefault(cell, {})[record["tower"], record["seed"]] = record
        everywhere = set.intersection(*(set(kinds) for kinds in images.values()))
        self.kinds = tuple(kind for kind in next(iter(images.values())) if kind in everywhere)
        self.seeds = sorted({record["seed"] for record in records})

    def at_step(self, cell: Cell, step: int) -> dict[Unit, Right]:
        """Answers after a number of steps, of the runs that have it."""
        return {unit: arrays(point["right"]) for unit, point in self._points(cell, step).items()}

    def seconds(self, cell: Cell, step: int) -> dict[Unit, float]:
        """CPU time that a number of steps took."""
        return {unit: point["cpu_seconds"] for unit, point in self._points(cell, step).items()}

    def _points(self, cell: Cell, step: int) -> dict[Unit, dict]:
        found = ((unit, point) for unit, record in self.cells[cell].items() for point in record["points"])
        return {unit: point for unit, point in found if point["step"] == step}

    def at_seconds(self, cell: Cell, seconds: dict[Unit, float]) -> dict[Unit, Right]:
        """Answers after so many seconds of CPU time, linear between the points of a run."""
        found = {}
        for unit, record in self.cells[cell].items():
            if unit in seconds:
                times = [point["cpu_seconds"] for point in record["points"]]
                answers = [arrays(point["right"]) for point in record["points"]]
                place = float(np.interp(seconds[unit], times, range(len(times))))
                before, share = int(place), place % 1
                after = min(before + 1, len(times) - 1)
                found[unit] = {
                    kind: (1 - share) * answers[before][kind] + share * answers[after][kind] for kind in answers[before]
                }
        return found

    def elsewhere(self, cell: Cell, num_tokens: int, step: int) -> dict[Unit, Right]:
        """Answers of a projector used with another M than its default."""
        points = ((unit, point["elsewhere"]) for unit, point in self._points(cell, step).items())
        return {unit: arrays(found[str(num_tokens)]) for unit, found in points if str(num_tokens) in found}

    def at(self, cell: Cell, num_tokens: int, step: int) -> dict[Unit, Right]:
        """Answers with any M that a projector was evaluated at."""
        same = num_tokens == cell.num_tokens
        return self.at_step(cell, step) if same else self.elsewhere(cell, num_tokens, step)

    def draws(self, answers: dict[Unit, Right], kinds: Iterable[str] | None = None) -> np.ndarray:
        """(1 + DRAWS,) accuracies: first what was seen, then draws of it. Towers count the same."""
        by_seed = defaultdict(list)
        for unit, right in answers.items():
            by_seed[unit[1]].append(self._image_draws(unit, right, self.kinds if kinds is None else tuple(kinds)))
        accuracies = np.stack([np.mean(by_seed[seed], axis=0) for seed in sorted(by_seed)])  # (seeds, 1 + DRAWS)
        chosen = np.random.default_rng(0).integers(len(accuracies), size=(len(accuracies), DRAWS))
        drawn = np.take_along_axis(accuracies[:, 1:], chosen, axis=0).mean(axis=0)
        mean = accuracies[:, :1].mean(axis=0)
        # The spread of draws of n has n where an unbiased one has n - 1.
        wider = np.sqrt(len(accuracies) / max(1, len(accuracies) - 1))
        return np.concatenate([mean, mean + (drawn - mean) * wider])

    def difference(
        self, first: dict[Unit, Right], second: dict[Unit, Right], kinds: Iterable[str] | None = None
    ) -> np.ndarray:
        """Draws of the first minus the second, over the units that both have.

        Raises:
            KeyError: there is none.
        """
        common = first.keys() & second.keys()
        if not common:
            raise KeyError("no tower and seed that both were run with")
        first, second = ({unit: each[unit] for unit in sorted(common)} for each in (first, second))
        return self.draws(first, kinds) - self.draws(second, kinds)

    def _image_draws(self, unit: Unit, right: Right, kinds: tuple[str, ...]) -> np.ndarray:
        images = self.images[unit]
        number = 1 + max(int(each.max()) for each in images.values())
        counts = _counts(self.sets[unit], number)
        shares = []
        for kind in kinds:
            asked = np.bincount(images[kind], minlength=number)
            correct = np.bincount(images[kind], weights=right[kind], minlength=number)
            shares.append((counts @ correct) / np.maximum(counts @ asked, 1))
        return np.mean(shares, axis=0)


@lru_cache(maxsize=8)
def _counts(seed: int, number: int) -> np.ndarray:
    """(1 + DRAWS, number) how often each image counts: once, then as often as it is drawn."""
    counts = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=DRAWS)
    return np.concatenate([np.ones((1, number), dtype=counts.dtype), counts])


def arrays(right: dict[str, str]) -> Right:
    """Answers as `lab.experiment.evaluate` gives them, as numbers."""
    return {kind: np.frombuffer(answers.encode(), dtype=np.uint8) - float(ord("0")) for kind, answers in right.items()}
