# SPDX-License-Identifier: Apache-2.0
"""A mixture as a table."""

import numpy as np

from training.recipe.mixture import Source


def mixture_table(
    sources: list[Source],
    weights: np.ndarray,
    num_samples: int,
    lengths: dict[str, float] | None = None,
    unit: str = "tokens",
) -> list[list[str]]:
    """Head and rows: dataset, task, samples, weight, and the draws and epochs that are expected in a run.

    Args:
        num_samples: draws in the run.
        lengths: dataset -> mean length of its samples, in `unit`; makes one more column.
    """
    rows = [["dataset", "task", "samples", "weight", "draws", "epochs", *([unit] if lengths else [])]]
    for source, weight in zip(sources, weights):
        draws, size = weight * num_samples, source.size
        rows.append(
            [
                source.name,
                source.task,
                "stream" if size is None else f"{size:,}",
                f"{weight:.4f}",
                f"{draws:,.0f}",
                "-" if size is None else f"{draws / size:,.2f}",
                *([f"{lengths[source.name]:.0f}"] if lengths else []),
            ]
        )
    return rows


def format_table(rows: list[list[str]]) -> str:
    """Columns aligned, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" if place < 2 else f"{cell:>{width}}" for place, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    )  # fmt: skip
