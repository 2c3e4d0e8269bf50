# SPDX-License-Identifier: Apache-2.0
"""Batches of about the same number of tokens, and not of samples, for packed training.

A step keeps its number of samples. They are dealt to the step's batches (one a process, times the accumulated ones) so that all
are of one length: no process waits for another, and the longest batch, which decides the memory, is not far from the mean.
"""

import heapq
import logging
from collections.abc import Callable, Iterator

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from training.collator import HoneybeeDataCollator
from training.recipe.mixture import Mixture
from training.trainer.elastic_rows import ElasticRows
from training.trainer.length_grouping import WINDOW, Lengths, lengths_by_window, windows

logger = logging.getLogger(__name__)

MEASURED_EPOCHS = 4  # of data whose lengths differ between epochs
MEASURED = 4  # windows, whose steps are dealt together, that say how many batches a step needs
SPARE = 0.05  # share of a batch that is left for windows with longer samples, unless all samples were measured


def deal_to_steps(lengths: np.ndarray, steps: int) -> list[np.ndarray]:
    """Deals samples to several steps: the same number to each, of about the same number of tokens.

    Args:
        lengths: (samples,) tokens; a multiple of `steps`.

    Returns:
        Positions in `lengths`, (samples / steps,) for each step.
    """
    by_length = np.argsort(-lengths, kind="stable").reshape(-1, steps)
    sums, dealt = np.zeros(steps, dtype=np.int64), np.empty_like(by_length)
    for number, samples in enumerate(by_length):  # the longest of these to the step that has least
        order = np.argsort(sums, kind="stable")
        dealt[number, order] = samples
        sums[order] += lengths[samples]
    return list(dealt.T)


def deal_to_batches(lengths: np.ndarray, batches: int) -> list[list[int]]:
    """Deals samples to batches of about the same number of tokens, the longest batch first.

    Args:
        lengths: (samples,) tokens, at least as many as `batches`.

    Returns:
        Positions in `lengths` for each batch.
    """
    heap = [(0, number) for number in range(batches)]
    dealt: list[list[int]] = [[] for _ in range(batches)]
    for sample in np.argsort(-lengths, kind="stable").tolist():
        tokens, number = heapq.heappop(heap)
        dealt[number].append(sample)
        heapq.heappush(heap, (tokens + int(lengths[sample]), number))
    return [dealt[number] for _, number in sorted(heap, reverse=True)]


class TokenBatches(Sampler[list[int]]):
    """A batch sampler whose batches hold at most `max_tokens` tokens, where the samples allow it.

    Which samples make a step depends on the seed, the epoch and the window, and not on the number of batches: a run may be
    resumed with more processes. The last step of an epoch has what is left, and is left out where that is fewer samples than batches.

    Args:
        lengths: see [`lengths_by_window`].
        num_samples: in an epoch.
        step_size: samples of a step.
        max_tokens: of a batch.
        processes: a step has a multiple of them of batches; how many is in `batches_per_step`.
        seed, shuffle, epoch: see [`LengthGroupedSampler`].
        rows: tell the lengths of an epoch, where samples have others in each.

    Raises:
        ValueError: a step, or the whole epoch, has fewer samples than batches.
    """

    drop_last = False

    def __init__(
        self,
        lengths: Lengths,
        num_samples: int,
        step_size: int,
        max_tokens: int,
        processes: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        epoch: Callable[[], int] = lambda: 0,
        rows: ElasticRows | None = None,
    ):
        self.lengths, self.num_samples, self.step_size, self.rows = lengths, num_samples, step_size, rows
        self.max_tokens, self.seed, self.shuffle, self.epoch = max_tokens, seed, shuffle, epoch
        self._warned = False
        self.batches_per_step = self._count_batches(processes)
        if not len(self):
            raise ValueError(
                f"max_tokens_per_batch={max_tokens}: {num_samples} samples do not fill the {self.batches_per_step} batches of a "
                "step; give more data, raise --max_tokens_per_batch, or use fewer processes"
            )

    def _count_batches(self, processes: int) -> int:
        measured = min(MEASURED * WINDOW * self.step_size, self.num_samples)
        limit = self.max_tokens * (1 if measured == self.num_samples and self.rows is None else 1 - SPARE)
        epochs = reversed(range(1 if self.rows is None else MEASURED_EPOCHS))  # the rows are left in the first one
        steps = [lengths for epoch in epochs for _, lengths in self._steps(epoch, measured)]
        longest_sample = max(int(lengths.max()) for lengths in steps)
        # A sample that is a batch by itself needs nothing to spare.
        limit = min(max(limit, longest_sample), self.max_tokens)
        # No fewer than the tokens need; then one more for each process until the longest batch fits.
        number = processes * max(1, int(max(lengths.sum() for lengths in steps) / (limit * processes)))
        while number <= self.step_size:
            dealt = (lengths for lengths in steps if len(lengths) >= number)
            if max((lengths[deal_to_batches(lengths, number)[0]].sum() for lengths in dealt), default=0) <= limit:
                return number
            number += processes
        raise ValueError(
            f"max_tokens_per_batch={self.max_tokens}: {self.step_size} samples of a step with up to "
            f"{longest_sample:,} tokens do not fill {number} batches, a multiple of {processes} "
            "processes; raise --max_tokens_per_batch or --global_batch_size"
        )

    def __len__(self) -> int:
        whole, left = divmod(self.num_samples, self.step_size)
        return (whole + (left >= self.batches_per_step)) * self.batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        for samples, lengths in self._steps(self.epoch(), self.num_samples):
            if len(samples) < self.batches_per_step:
                continue
            batches = deal_to_batches(lengths, self.batches_per_step)
            if (longest := int(lengths[batches[0]].sum())) > self.max_tokens and not self._warned:
                self._warned = True
                logger.warning(
                    "A batch has %s tokens, more than max_tokens_per_batch=%s: samples are longer here than where the run "
                    "measured them", longest, self.max_tokens
                )  # fmt: skip
            for batch in batches:
                yield samples[batch].tolist()

    def _steps(self, epoch: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Samples of each step, and their lengths."""
        if self.rows is not None:
            self.rows.begin(epoch)
        size = WINDOW * self.step_size
        for start, samples in windows(self.num_samples, size, self.seed, epoch, self.shuffle):
            if start >= stop:
                return
            lengths = np.array(self.lengths(samples.tolist()))
            steps, left = divmod(len(samples), self.step_size)
            whole = len(samples) - left
            if steps:
                dealt = deal_to_steps(lengths[:whole], steps)
                np.random.default_rng((self.seed, epoch, start)).shuffle(dealt)
                for step in dealt:
                    yield samples[step], lengths[step]
            if left:
                yield samples[whole:], lengths[whole:]


def token_batches(
    dataset: Dataset,
    mixture: Mixture | None,
    collator: HoneybeeDataCollator,
    step_size: int,
    max_tokens: int,
    processes: int,
    seed: int,
    rows: ElasticRows | None = None,
) -> TokenBatches:
    """The batches of a dataset of conversations, or of the draws of a mixture, which is shuffled already.

    Raises:
        ValueError: see [`TokenBatches`].
    """
    lengths = lengths_by_window(dataset, mixture, collator, step_size)
    shuffle = mixture is None
    return TokenBatches(lengths, len(dataset), step_size, max_tokens, processes, seed, shuffle, rows=rows)
