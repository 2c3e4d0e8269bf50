# SPDX-License-Identifier: Apache-2.0
"""Ways in which one projector learns several M. The first is that of `--elastic`; the others are tried beside it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # as `lab.experiment.Task.batch` gives it


class Lesson(NamedTuple):
    """What is learned at one M in a step.

    Args:
        number: M.
        batch: images, questions and answers.
        at_most: the same with the largest M, whose answers teach those of this one; None where nobody teaches.
    """

    number: int
    batch: Batch
    at_most: Batch | None = None


@dataclass(frozen=True)
class Way:
    """
    Args:
        name: in reports.
        ends: how much oftener than others the fewest and the most are drawn.
        by_batch: all images of a step have one M; otherwise each draws its own.
        batches: in a step.
        taught: each image is learned at the largest M, too, and what is answered there teaches what is answered at its M: the
            divergence (Kullback-Leibler) is added to the loss.
        scaled: the pooled map has a scale and a shift of its own for each M.
        alone: steps in which the default M alone is learned, before all are.
    """

    name: str
    ends: float = 1
    by_batch: bool = False
    batches: int = 1
    taught: bool = False
    scaled: bool = False
    alone: int = 0

    def lessons(
        self,
        batch: Callable[[int, int, int], Batch],
        seed: int,
        step: int,
        size: int,
        default: int,
        numbers: tuple[int, ...],
    ) -> Iterator[Lesson]:
        """Those of a step.

        Args:
            batch: from a number, the same for the same; how many images; M.
            size: images of a batch.
            default: M of the comparison.
            numbers: M, ascending.
        """
        if step < self.alone:
            numbers = (default,)
        for which in range(step * self.batches, (step + 1) * self.batches):
            drawn = self._draw(np.random.default_rng((seed, which, len(numbers))), size, numbers)
            for place, number in enumerate(numbers):
                if count := int((drawn == number).sum()):
                    same = which * len(numbers) + place
                    taught = self.taught and number < numbers[-1]
                    at_most = batch(same, count, numbers[-1]) if taught else None
                    yield Lesson(number, batch(same, count, number), at_most)

    def _draw(self, draw: np.random.Generator, size: int, numbers: tuple[int, ...]) -> np.ndarray:
        """M of each image (size,)."""
        if self.by_batch:
            return np.full(size, draw.choice(numbers))
        if self.ends == 1:
            return draw.choice(numbers, size=size)
        odds = np.ones(len(numbers))
        odds[[0, -1]] = self.ends
        return draw.choice(numbers, size=size, p=odds / odds.sum())


WAYS = {
    way.name: way
    for way in (
        Way("each image draws its M"),
        Way("each batch draws its M", by_batch=True),
        Way("the fewest and the most twice as often", ends=2),
        Way("a scale and a shift for each M", scaled=True),
        Way("the largest M teaches", taught=True),
        Way("twice the images a step", batches=2),
        Way("the default M alone for 240 steps, then each image draws", alone=240),
        Way("the default M alone for 240 steps, then the ends twice as often", alone=240, ends=2),
    )
}
PLAIN = next(iter(WAYS))


def elastic_width(way: str) -> str:
    """In a record, in place of the name of a width."""
    return "elastic" if way == PLAIN else f"elastic, {way}"
