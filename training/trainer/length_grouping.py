# SPDX-License-Identifier: Apache-2.0
"""Batches of samples of about one length, for training with padding."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from training.collator import HoneybeeDataCollator
from training.conversations import undecoded
from training.recipe.mixture import Mixture
from training.samples import BadSampleError

WINDOW = 16  # global batches that are sorted together

Lengths = Callable[[list[int]], list[int]]  # sample numbers -> tokens of each


def windows(num_samples: int, size: int, seed: int, epoch: int, shuffle: bool) -> Iterator[tuple[int, np.ndarray]]:
    """The samples of an epoch, in random order if `shuffle`, `size` at a time, each with the place of its first."""
    order = np.arange(num_samples)
    if shuffle:
        np.random.default_rng((seed, epoch)).shuffle(order)
    for start in range(0, num_samples, size):
        yield start, order[start : start + size]


class LengthGroupedSampler(Sampler[int]):
    """Sorts a window of samples by length, cuts it into global batches, and shuffles these.

    Unlike transformers' own, it needs the lengths of one window at a time, so that samples that are made on access (a
    mixture) can be grouped, and it works the same on both of transformers' lines. The order is a function of the seed,
    the epoch and the window: a resumed run goes on with the same samples, after measuring again what it skips.

    Args:
        lengths: see [`dataset_lengths`] and [`mixture_lengths`].
        num_samples: in an epoch.
        batch_size: samples of all processes and accumulated batches that make one step.
        shuffle: draw an order of all samples for each epoch before they are cut into windows; False where samples are
            in random order already.
        window: number of global batches.
        epoch: tells the epoch whenever one begins; the trainer sets it. (`set_epoch` does not reach a sampler behind the
            batches that a resumed run skips, where there are several processes.)
    """

    def __init__(
        self,
        lengths: Lengths,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        window: int = WINDOW,
        epoch: Callable[[], int] = lambda: 0,
    ):
        self.lengths, self.num_samples, self.batch_size = lengths, num_samples, batch_size
        self.seed, self.shuffle, self.window, self.epoch = seed, shuffle, window, epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        epoch, size = self.epoch(), self.window * self.batch_size
        for start, samples in windows(self.num_samples, size, self.seed, epoch, self.shuffle):
            samples = samples[np.argsort(self.lengths(samples.tolist()), kind="stable")]
            whole = len(samples) // self.batch_size * self.batch_size
            batches = samples[:whole].reshape(-1, self.batch_size)
            np.random.default_rng((self.seed, epoch, start)).shuffle(batches)
            # A batch that is not full can only be the last one of the epoch.
            yield from np.concatenate([batches.ravel(), samples[whole:]]).tolist()


def grouped_sampler(
    dataset: Dataset, mixture: Mixture | None, collator: HoneybeeDataCollator, batch_size: int, seed: int
) -> LengthGroupedSampler:
    """The sampler for a dataset of conversations, or for the draws of a mixture, which is shuffled already."""
    lengths = lengths_by_window(dataset, mixture, collator, batch_size)
    return LengthGroupedSampler(lengths, len(dataset), batch_size, seed, shuffle=mixture is None)


def lengths_by_window(
    dataset: Dataset, mixture: Mixture | None, collator: HoneybeeDataCollator, batch_size: int
) -> Lengths:
    """Lengths of the samples of a dataset, or of a mixture's draws where `WINDOW` global batches are read together."""
    if mixture is None:
        return dataset_lengths(dataset, collator)
    return mixture_lengths(mixture, collator, WINDOW * batch_size)


def dataset_lengths(dataset: Dataset, collator: HoneybeeDataCollator) -> Lengths:
    """Lengths of the samples of a dataset with `messages`; images are not decoded."""
    dataset = undecoded(dataset)
    return lambda samples: collator.lengths([dataset[sample] for sample in samples])


def mixture_lengths(mixture: Mixture, collator: HoneybeeDataCollator, window: int) -> Lengths:
    """Lengths of a mixture's draws; images are not decoded. A draw whose record cannot be used counts as one token: which
    record takes its place is known only when it is read.

    Args:
        window: samples that are sorted together.
    """
    ahead = mixture.read_ahead(window)

    def lengths(draws: list[int]) -> list[int]:
        found = dict.fromkeys(draws, 1)
        samples = {}
        for draw in draws:
            with suppress(BadSampleError, FileNotFoundError):
                sample = ahead.glance(draw)
                sizes = collator.image_sizes(sample["images"], sample["image_root"])
                samples[draw] = {**sample, "image_sizes": sizes}
        found.update(zip(samples, collator.lengths(list(samples.values()))))
        return list(found.values())

    return lengths
