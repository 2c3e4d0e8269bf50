# SPDX-License-Identifier: Apache-2.0
"""The rows of a dataset, with the M that each draws in an epoch of an elastic run. (A mixture draws its own.)"""

import torch
from datasets import Dataset
from transformers import TrainerCallback

from training.elastic import ElasticDraw


class ElasticRows:
    """A transform from row numbers to rows with `num_query_tokens`.

    Args:
        dataset: of conversations.
        draw: of the M of each row.
        seed, name: of the draws, beside the row's number and the epoch.
    """

    def __init__(self, dataset: Dataset, draw: ElasticDraw, seed: int, name: str):
        self.dataset, self.draw, self.seed, self.name = dataset, draw, seed, name
        # Workers are processes, and may live longer than an epoch.
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __deepcopy__(self, memo) -> "ElasticRows":
        return self  # `datasets` copies a dataset whenever it changes a setting of it

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list]:
        rows, epoch = self.dataset[batch["row"]], int(self.epoch)
        return {**rows, "num_query_tokens": [self.draw.of(self.seed, self.name, row, epoch) for row in batch["row"]]}

    def begin(self, epoch: int) -> None:
        """From now on rows draw what they draw in this epoch, in workers that are running, too."""
        self.epoch.fill_(epoch)

    def as_dataset(self) -> Dataset:
        """It holds row numbers; reading one reads the row."""
        rows = Dataset.from_dict({"row": range(len(self.dataset))})
        rows.set_transform(self)
        return rows


class ElasticEpochs(TrainerCallback):
    """Tells the rows of a dataset which epoch begins; the data loader's iterator is made after that."""

    def __init__(self, rows: ElasticRows):
        self.rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.rows.begin(int(state.epoch or 0))
