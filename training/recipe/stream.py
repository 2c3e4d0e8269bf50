# SPDX-License-Identifier: Apache-2.0
"""Records that can only be read one after the other, as if they had positions."""

import copy
import itertools
from collections import deque
from collections.abc import Iterable, Iterator

import datasets

from training.samples import TooManyBadSamplesError

LOOK_BACK = 64  # records that a stream keeps at least, for readers that are not quite in order


# These two know the records and not their stream, so that a stream that is dropped closes its iterator at once. The garbage
# collector would close it in any thread, and an iterator of `datasets` waits for threads of its own when it is closed.
def _one_pass(records: Iterable, epoch: int) -> Iterator:
    if not isinstance(records, datasets.IterableDataset):
        yield from records
        return
    # Its epoch lies in memory that workers share, and they do not reach the end of an epoch at the same time.
    records = copy.deepcopy(records)
    records.set_epoch(epoch)
    # Its __iter__ would give a worker of a DataLoader the worker's own shards; iter() gives all.
    for batch in records.iter(batch_size=1):
        yield {name: values[0] for name, values in batch.items()}


def _endless(records: Iterable) -> Iterator:
    for epoch in itertools.count():
        empty = True
        for record in _one_pass(records, epoch):
            empty = False
            yield record
        if empty:
            raise TooManyBadSamplesError(
                "the stream has no records; check the pattern of its files or leave the dataset out"
            )


class Stream:
    """Forward access by position to records that can only be read one after the other, over and over again.

    Each worker reads the whole stream, undecoded, and uses its own part of it: reading is cheap beside decoding, and the
    order stays the same with any number of workers. After a restart the records before the position are read again.

    Args:
        records: an iterable that can be started anew; a `datasets.IterableDataset` is told the epoch by `set_epoch`, so
            that its `shuffle(seed, buffer_size)` gives another order in each.
    """

    def __init__(self, records: Iterable):
        if isinstance(records, datasets.IterableDataset) and records.features:
            records = records.decode(False)  # an image that cannot be decoded would end the iteration
        self.records, self.look_back = records, LOOK_BACK
        self._restart()

    def _restart(self):
        self._iterator, self._next, self._recent = _endless(self.records), 0, deque(maxlen=self.look_back)

    def __getstate__(self):
        return self.records, self.look_back

    def __setstate__(self, state):
        self.records, self.look_back = state
        self._restart()

    def keep(self, look_back: int) -> None:
        """Keeps at least this many records from now on, undecoded."""
        self.look_back = max(self.look_back, look_back)
        self._restart()

    def anew(self) -> "Stream":
        """A stream of the same records with a position of its own."""
        return Stream(self.records)

    def one_pass(self) -> Iterator:
        """The records of the first epoch."""
        return _one_pass(self.records, epoch=0)

    def __getitem__(self, position: int):
        if position < self._next - len(self._recent):
            self._restart()
        while self._next <= position:
            self._recent.append(next(self._iterator))
            self._next += 1
        return self._recent[position - self._next]
