# SPDX-License-Identifier: Apache-2.0
"""Rows of text about images, as tensors. Shapes: Q rows, T tokens, M visual tokens."""

from dataclasses import dataclass

import torch

SPLITS = ("train", "validation", "test")


@dataclass
class Rows:
    """Rows of text about images: `ids` (Q, T) with M placeholders each; `labels` (Q, T), -100 where nothing is to be
    said; `images` (Q,), ascending; `kinds`, a name for each row."""

    ids: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor
    kinds: list[str]
