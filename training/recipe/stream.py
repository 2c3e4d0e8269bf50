# SPDX-License-Identifier: Apache-2.0
"""Records that can only be read one after the other, as if they had positions."""

import copy
import itertools
import os
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import datasets
import pyarrow as pa

from training.samples import BUFFER_SIZE, TooManyBadSamplesError

LOOK_BACK = 64  # records that a stream keeps at least, for readers that are not quite in order
READERS = 10  # shards that share a buffer

# Records that are read in one go; a table's are converted one by one, when they are used.
Piece = pa.Table | Sequence
# Reads a shard from its start, in pieces of at most so many records.
Shard = Callable[[int], Iterator[Piece]]


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
        self._process = os.getpid()

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
        # A forked worker would share the place in an open file with the others.
        if position < self._next - len(self._recent) or self._process != os.getpid():
            self._restart()
        while self._next <= position:
            self._recent.append(next(self._iterator))
            self._next += 1
        return self._recent[position - self._next]


def _pieces(shards: Sequence[Shard], order: Iterable[int], rows: int) -> Iterator[Piece]:
    """Of several shards in turn, as long as there are some."""
    waiting = iter(order)
    reading = deque(shards[number](rows) for number in itertools.islice(waiting, READERS))
    while reading:
        shard = reading.popleft()
        piece = next(shard, None)
        if piece is not None:
            reading.append(shard)
            yield piece
        else:
            reading.extend(shards[number](rows) for number in itertools.islice(waiting, 1))


class _Block:
    """Records in random order."""

    def __init__(self, pieces: list[Piece], key: str):
        self.pieces, self.key, self.order = pieces, key, None

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def __getitem__(self, place: int):
        if self.order is None:
            self.order = [(piece, row) for piece in self.pieces for row in range(len(piece))]
            random.Random(self.key).shuffle(self.order)
        piece, row = self.order[place]
        return piece.slice(row, 1).to_pylist()[0] if isinstance(piece, pa.Table) else piece[row]


def _blocks(shards: Sequence[Shard], seed: int, buffer_size: int, epoch: int) -> Iterator[_Block]:
    """All records of an epoch, `buffer_size` at a time.

    Raises:
        TooManyBadSamplesError: a file cannot be read any further.
    """
    order = list(range(len(shards)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    pieces, held, read = [], 0, 0
    try:
        for piece in _pieces(shards, order, max(1, buffer_size // READERS)):
            if held + len(piece) > buffer_size:
                yield _Block(pieces, f"{seed}/{epoch}/{read}")
                pieces, held = [], 0
            pieces.append(piece)
            held, read = held + len(piece), read + len(piece)
    except Exception as error:  # what decoders raise on broken data has no common class
        raise TooManyBadSamplesError(
            f"the stream cannot be read on behind its first {read:,} records ({type(error).__name__}: {error}); repair the "
            "file, or leave it out"
        ) from error
    if pieces:
        yield _Block(pieces, f"{seed}/{epoch}/{read}")


def _endless_blocks(shards: Sequence[Shard], seed: int, buffer_size: int) -> Iterator[_Block]:
    for epoch in itertools.count():
        empty = True
        for block in _blocks(shards, seed, buffer_size, epoch):
            empty = False
            yield block
        if empty:
            raise TooManyBadSamplesError("the stream has no records; give files that have some")


class ShuffledStream(Stream):
    """A stream of files whose records are shuffled a buffer at a time.

    The order is a function of the seed: each epoch draws an order of the shards, reads several of them in turn, and
    shuffles each `buffer_size` records by themselves. So a restart converts none of the records that it skips, which the
    rolling buffer of `datasets` needs, and a release of `datasets` with another buffer changes nothing.

    Args:
        shards: files, or what else can be read by itself.
        buffer_size: records that are shuffled together and held in memory; with 1 they keep their order in a shard.
    """

    def __init__(self, shards: Sequence[Shard], seed: int = 0, buffer_size: int = BUFFER_SIZE):
        self.shards, self.seed, self.buffer_size, self.look_back = shards, seed, buffer_size, LOOK_BACK
        self._restart()

    def _restart(self):
        if "_close" in vars(self):
            self._close()
        self._iterator = _endless_blocks(self.shards, self.seed, self.buffer_size)
        # Also before the interpreter ends: an iterator of `datasets` closes with what is gone then.
        self._close = weakref.finalize(self, self._iterator.close)
        self._next, self._kept = 0, deque()  # position of the next block; (position, block) of those before
        self._process = os.getpid()

    def __getstate__(self):
        return self.shards, self.seed, self.buffer_size, self.look_back

    def __setstate__(self, state):
        self.shards, self.seed, self.buffer_size, self.look_back = state
        self._restart()

    def keep(self, look_back: int) -> None:
        self.look_back = max(self.look_back, look_back)

    def anew(self) -> "ShuffledStream":
        return ShuffledStream(self.shards, self.seed, self.buffer_size)

    def one_pass(self) -> Iterator:
        for block in _blocks(self.shards, self.seed, self.buffer_size, epoch=0):
            yield from (block[place] for place in range(len(block)))

    def __getitem__(self, position: int):
        start = self._kept[0][0] if self._kept else 0
        if position < start or self._process != os.getpid():
            self._restart()
        while self._next <= position:
            block = next(self._iterator)
            self._kept.append((self._next, block))
            self._next += len(block)
            while len(self._kept) > 1 and self._kept[1][0] <= min(position, self._next - 1) - self.look_back:
                self._kept.popleft()
        first, block = next(kept for kept in reversed(self._kept) if kept[0] <= position)
        return block[position - first]
