# SPDX-License-Identifier: Apache-2.0
"""The share of each dataset in a mixture (paper, section 4, "dataset balancing").

A balancing is a function of the sources and of the recipe's weights by name, and gives a weight for each source. They
are normalised afterwards. A new one is a function and an entry in `BALANCINGS`.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from training.recipe.mixture import Source

SAMPLE_CAP = 100_000


def per_dataset(sources: "list[Source]", tuned: Mapping[str, float]) -> list[float]:
    """The same for each dataset."""
    return [1.0] * len(sources)


def per_task(sources: "list[Source]", tuned: Mapping[str, float]) -> list[float]:
    """The same for each task, and within it for each of its datasets."""
    tasks = [source.task for source in sources]
    return [1 / tasks.count(task) for task in tasks]


def per_sample_100k(sources: "list[Source]", tuned: Mapping[str, float]) -> list[float]:
    """As many as the dataset has records, at most 100,000; a stream counts as 100,000."""
    return [SAMPLE_CAP if source.size is None else min(source.size, SAMPLE_CAP) for source in sources]


def per_dataset_tuned(sources: "list[Source]", tuned: Mapping[str, float]) -> list[float]:
    """The recipe's own weights.

    Raises:
        ValueError: a source without a weight.
    """
    missing = [source.name for source in sources if source.name not in tuned]
    if missing:
        raise ValueError(f"balancing=per-dataset-tuned, but weights has none for {', '.join(missing)}; add them")
    return [tuned[source.name] for source in sources]


BALANCINGS: dict[str, Callable[["list[Source]", Mapping[str, float]], list[float]]] = {
    "per-dataset": per_dataset,
    "per-task": per_task,
    "per-sample-100k": per_sample_100k,
    "per-dataset-tuned": per_dataset_tuned,
}


def sampling_weights(sources: "list[Source]", balancing: str, tuned: Mapping[str, float] | None = None) -> np.ndarray:
    """The share of each source in the draws, (sources,), summing to 1.

    Args:
        balancing: one of `BALANCINGS`.
        tuned: name of a source -> weight, read by `per-dataset-tuned`.

    Raises:
        ValueError: an unknown balancing, a source without a tuned weight, or weights that do not make a distribution.
    """
    if balancing not in BALANCINGS:
        raise ValueError(f"balancing={balancing!r} is unknown; use one of {', '.join(BALANCINGS)}")
    weights = np.array(BALANCINGS[balancing](sources, tuned or {}), dtype=float)
    if (weights < 0).any() or not weights.sum() > 0 or not np.isfinite(weights).all():
        named = {source.name: float(weight) for source, weight in zip(sources, weights)}
        raise ValueError(f"weights {named} make no distribution; they must not be negative, nor all zero")
    return weights / weights.sum()
