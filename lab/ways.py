# SPDX-License-Identifier: Apache-2.0
"""Ways in which one projector learns several M. The first is that of `--elastic`; the others are tried beside it."""

from dataclasses import dataclass

import numpy as np


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

    def draw(self, draw: np.random.Generator, size: int, numbers: tuple[int, ...]) -> np.ndarray:
        """M (size,) of the images of a batch, out of `numbers`, which are ascending."""
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
