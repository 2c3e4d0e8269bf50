# SPDX-License-Identifier: Apache-2.0
"""How many visual tokens each sample of an elastic run has. Loads nothing heavy, so that `--elastic` is checked at once."""

import math
import random
from dataclasses import dataclass

EXAMPLE = 'such as --elastic "16,64,144" or, with 64 twice as often, "16,64:2,144"'


@dataclass(frozen=True)
class ElasticDraw:
    """The M of each sample, drawn by weight.

    What a sample draws depends on the seed, its dataset, its record and the epoch alone: not on the process that reads it, nor
    on where a run was stopped and resumed.

    Args:
        numbers: M, in ascending order.
        weights: of each, more than 0.
    """

    numbers: tuple[int, ...]
    weights: tuple[float, ...]

    def of(self, seed: int, dataset: str, index: int, epoch: int) -> int:
        """M of record `index` of a dataset in an epoch; of all its images."""
        return random.Random(f"{seed}/elastic/{dataset}/{index}/{epoch}").choices(self.numbers, self.weights)[0]

    def in_words(self) -> str:
        """`16 (25%), 64 (50%) or 144 (25%)`."""
        total = sum(self.weights)
        *others, last = (f"{n} ({w / total:.0%})" for n, w in zip(self.numbers, self.weights))
        return f"{', '.join(others)} or {last}" if others else last


def elastic_draw(text: str | None, trained: list[int] | None) -> ElasticDraw | None:
    """What a run draws from: what `--elastic` says; without it, the numbers that the model was trained for, equally often;
    None for a model with a fixed M.

    Raises:
        ValueError: as [`parse_elastic`].
    """
    if text is not None:
        return parse_elastic(text)
    return ElasticDraw(tuple(trained), (1.0,) * len(trained)) if trained else None


def parse_elastic(text: str) -> ElasticDraw:
    """What `--elastic` says: numbers M, each with `:weight` where it is not 1.

    Raises:
        ValueError: it says something else.
    """
    weights = {}
    for part in str(text).split(","):
        number, colon, weight = part.partition(":")
        try:
            number, weight = int(number), float(weight) if colon else 1.0
        except ValueError:
            raise ValueError(
                f"--elastic {text!r}: {part.strip()!r} is no number of visual tokens; give numbers, {EXAMPLE}"
            ) from None
        if number < 1 or not 0 < weight < math.inf:
            raise ValueError(
                f"--elastic {text!r}: {part.strip()!r} must be a number of at least 1, its weight more than 0; {EXAMPLE}"
            )
        if number in weights:
            raise ValueError(f"--elastic {text!r} names {number} twice; give it a weight instead, {EXAMPLE}")
        weights[number] = weight
    numbers = sorted(weights)
    return ElasticDraw(tuple(numbers), tuple(weights[number] for number in numbers))
