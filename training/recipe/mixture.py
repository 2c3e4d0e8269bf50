# SPDX-License-Identifier: Apache-2.0
"""Several sources mixed by weight into one sequence of samples.

The mixture is random access: sample `k` is a function of the seed and `k` alone. So it is a map-style dataset, and who
reads what is left to the samplers of torch and accelerate: any number of workers gives the same order, ranks share the
batches out, and a resumed run goes on where `trainer_state.json` stands without reading what it skips. A chain of
`datasets.interleave_datasets`, `shuffle` and `split_dataset_by_node` has none of this: its position runs ahead with the
workers' prefetching, its shuffle buffer is lost on saving, and its order depends on the number of workers.
"""

import copy
import hashlib
import itertools
import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL.Image import DecompressionBombError
from torch.utils.data import get_worker_info

from processing import open_image
from training.collator import HoneybeeDataCollator, TooLongError
from training.conversations import EmptyAnswerError, normalize_conversation

logger = logging.getLogger(__name__)

BALANCINGS = ("per-dataset", "per-task", "per-sample-100k", "per-dataset-tuned")
SAMPLE_CAP = 100_000
LOOK_BACK = 64  # records that a stream keeps at least, for readers that are not quite in order
REASONS = (
    "missing image",
    "corrupt image",
    "decompression bomb",
    "empty answer",
    "malformed record",
    "malformed conversation",
    "too long",
)
# Columns of the counts: records used, answers in them, records not used; then the reasons, also of turns.
_USED, _ANSWERS, _UNUSABLE, _REASONS = 0, 1, 2, 3

_BLOCK = 1 << 16  # draws whose sources are drawn in one go
_COUNTER_ROWS = 257  # the main process and up to 256 workers, so that no two processes write to the same row
_DATA_ERRORS = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OSError,
    SyntaxError,
    DecompressionBombError,
)


class TooManyBadSamplesError(RuntimeError):
    """More samples than allowed could not be used."""


class UnusableRecordError(ValueError):
    """A record that gives no sample.

    Args:
        reason: one of `REASONS`.
        detail: what exactly is wrong.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


# Functions of the records and not of their stream: a stream that is dropped has to close its iterator then and there. One
# that waits for the garbage collector is closed in any thread, and `datasets` waits for threads of its own when closed.
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

    Every worker reads the whole stream and uses its own part, undecoded: reading is cheap beside decoding, and only so
    the order is the same with any number of workers. After a restart the records before the position are read again.

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


@dataclass
class Source:
    """One dataset of a mixture.

    Args:
        name: unique in the mixture.
        task: what `per-task` balances.
        records: a sequence (`__len__`, `__getitem__`), such as a `datasets.Dataset`, or a [`Stream`].
        render: (record, random) -> `{"messages", "images"[, "chat_template"][, "skipped"]}`, the last the reasons of
            turns left out. Pure: what it draws, it draws from the `random.Random` given. Raises a ValueError where the
            record is of no use. Reasons, also an error's attribute `reason`, are out of `REASONS`.
        image_root: folder of relative image paths.
    """

    name: str
    task: str
    records: Sequence | Stream
    render: Callable[[Any, random.Random], dict]
    image_root: str = ""

    @property
    def size(self) -> int | None:
        """Number of records, None for a stream."""
        return None if isinstance(self.records, Stream) else len(self.records)


def sampling_weights(sources: list[Source], balancing: str, tuned: Mapping[str, float] | None = None) -> np.ndarray:
    """The share of each source in the draws, (sources,), summing to 1 (paper, section 4, "dataset balancing").

    With D sources, T tasks, D_t sources in the task t of source d, and n_d records in source d:

    - `per-dataset`: 1 / D
    - `per-task`: 1 / (T * D_t)
    - `per-sample-100k`: min(n_d, 100000) / sum over all d of min(n_d, 100000); a stream counts as 100000
    - `per-dataset-tuned`: w_d / sum over all d of w_d, with the weights `tuned`

    Raises:
        ValueError: an unknown balancing, a source without a tuned weight, or weights that do not make a distribution.
    """
    if balancing == "per-dataset":
        weights = np.ones(len(sources))
    elif balancing == "per-task":
        tasks = [source.task for source in sources]
        weights = np.array([1 / tasks.count(task) for task in tasks])
    elif balancing == "per-sample-100k":
        weights = np.array([SAMPLE_CAP if s.size is None else min(s.size, SAMPLE_CAP) for s in sources], dtype=float)
    elif balancing == "per-dataset-tuned":
        tuned = tuned or {}
        missing = [source.name for source in sources if source.name not in tuned]
        if missing:
            raise ValueError(f"balancing=per-dataset-tuned, but weights has none for {', '.join(missing)}; add them")
        weights = np.array([tuned[source.name] for source in sources], dtype=float)
    else:
        raise ValueError(f"balancing={balancing!r} is unknown; use one of {', '.join(BALANCINGS)}")
    if (weights < 0).any() or not weights.sum() > 0 or not np.isfinite(weights).all():
        named = {source.name: float(weight) for source, weight in zip(sources, weights)}
        raise ValueError(f"weights {named} make no distribution; they must not be negative, nor all zero")
    return weights / weights.sum()


def sample_random(seed: int, name: str, index: int, epoch: int) -> random.Random:
    """All that a sample may draw from: it depends on what is read and on how often it was, not on who reads it."""
    return random.Random(f"{seed}/{name}/{index}/{epoch}")


def read_sample(source: Source, index: int, rng: random.Random, collator: HoneybeeDataCollator | None = None) -> dict:
    """[`make_sample`] of record `index`, its images loaded as PIL images in RGB.

    Args:
        collator: the one that gets the sample; what does not fit into its `max_length` is of no use.

    Raises:
        UnusableRecordError: nothing can be learned from the record.
    """
    sample = make_sample(source, index, read_record(source, index), rng)
    if collator is not None:
        try:
            collator.check_length(sample["messages"], sample["chat_template"])
        except _DATA_ERRORS as error:
            raise unusable("malformed conversation", error) from error
    try:
        sample["images"] = [open_image(image, source.image_root) for image in sample["images"]]
    except (OSError, ValueError) as error:
        raise unusable("corrupt image", error) from error
    return sample


def read_record(source: Source, index: int):
    """Record `index` as its reader gives it.

    Raises:
        UnusableRecordError: it cannot be read.
    """
    try:
        return source.records[index]
    except _DATA_ERRORS as error:
        raise unusable("malformed record", error) from error


def make_sample(source: Source, index: int, record, rng: random.Random) -> dict:
    """A record as a checked sample.

    Returns:
        `messages` with content as items; `images` as the record has them; `chat_template`; `dataset` and `index`; and
        `skipped`, the reasons of turns that were left out.

    Raises:
        UnusableRecordError: nothing can be learned from the record.
    """
    try:
        sample = source.render(record, rng)
    except _DATA_ERRORS as error:
        raise unusable("malformed record", error) from error
    try:
        messages, images = normalize_conversation(sample)
    except _DATA_ERRORS as error:
        raise unusable("malformed conversation", error) from error
    return {
        "messages": messages,
        "images": images,
        "chat_template": sample.get("chat_template") or "default",
        "dataset": source.name,
        "index": index,
        "skipped": list(sample.get("skipped") or ()),
    }


def unusable(stage: str, error: Exception) -> UnusableRecordError:
    """The error with its reason: what it says itself, what its kind says, or else `stage`."""
    reason = getattr(error, "reason", None)
    if isinstance(error.__cause__, DecompressionBombError):
        reason = "decompression bomb"
    if reason not in REASONS:
        kinds = {
            FileNotFoundError: "missing image",
            EmptyAnswerError: "empty answer",
            TooLongError: "too long",
            OSError: "corrupt image",
        }
        reason = next((reason for kind, reason in kinds.items() if isinstance(error, kind)), stage)
    return UnusableRecordError(reason, f"{type(error).__name__}: {error}")


def _generator(*key) -> np.random.Generator:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class Mixture(torch.utils.data.Dataset):
    """`num_samples` samples drawn from the sources by weight.

    A source is drawn with replacement; its records come each once an epoch, in a new order each epoch. A record that
    is of no use is counted, and the next one in its source's order takes its place. Read it in order (a
    `SequentialSampler`): anything else is right too, but slow where there are streams.

    Args:
        sources: with unique names.
        weights: (sources,) shares, see [`sampling_weights`].
        num_samples: draws in the run: steps times global batch.
        seed: of everything.
        max_bad_fraction: reading stops when of the records of a source, or of the turns of those that are used, more
            than this are of no use: 20 or more of them read, and more than two standard deviations above it.
        collator: see [`read_sample`]; may be set later, before the first sample is read.

    Raises:
        ValueError: sources without records, names given twice.
        TooManyBadSamplesError: while reading.
    """

    def __init__(
        self,
        sources: list[Source],
        weights: np.ndarray,
        num_samples: int,
        seed: int = 0,
        max_bad_fraction: float = 0.1,
        collator: HoneybeeDataCollator | None = None,
    ):
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources {', '.join(names)}: a name is there twice; give each another")
        if empty := [source.name for source in sources if source.size == 0]:
            raise ValueError(f"no records in {', '.join(empty)}; check the files or leave the datasets out")
        self.sources, self.weights, self.num_samples, self.seed = sources, weights, num_samples, seed
        self.max_bad_fraction, self.collator = max_bad_fraction, collator
        self._bounds = np.cumsum(weights)
        # What rounding leaves of the sum goes to the last source that has a weight.
        self._bounds[np.flatnonzero(weights)[-1] :] = np.inf
        self._counts_before = [np.zeros(len(sources), dtype=np.int64)]  # draws of each source before each block
        self._block = (-1, None, None)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source -> (epoch, permutation)
        # Workers are processes, and the counts have to reach the one that reports.
        columns = _REASONS + len(REASONS)
        self._counts = torch.zeros(_COUNTER_ROWS, len(sources), columns, dtype=torch.int64).share_memory_()
        self._warned: set[tuple[str, str]] = set()

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, draw: int) -> dict:
        """Sample number `draw`, as [`read_sample`] gives it, without `skipped`."""
        number, visit = self._draw(draw)
        source = self.sources[number]
        for position in itertools.count(visit):
            index, epoch = self._record_at(number, position)
            rng = sample_random(self.seed, source.name, index, epoch)
            try:
                sample = read_sample(source, index, rng, self.collator)
            except UnusableRecordError as error:
                self._count(number, _UNUSABLE)
                self._skip(number, index, error.reason, error)
                continue
            self._count(number, _USED)
            self._count(number, _ANSWERS, sum(message["role"] == "assistant" for message in sample["messages"]))
            for reason in sample.pop("skipped"):
                self._skip(number, index, reason, "a turn is left out")
            return sample

    def glance(self, draw: int) -> dict:
        """Sample number `draw` as [`make_sample`] gives it, images unread, nothing counted.

        Raises:
            UnusableRecordError: its record is of no use; reading the sample finds another.
        """
        number, visit = self._draw(draw)
        source = self.sources[number]
        index, epoch = self._record_at(number, visit)
        rng = sample_random(self.seed, source.name, index, epoch)
        return make_sample(source, index, read_record(source, index), rng)

    def schedule(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """What the draws from `start` to `stop` read, without reading it: source numbers and record indices (draws,),
        bad records not replaced."""
        blocks = [np.stack(self._drawn(block)) for block in range(start // _BLOCK, -(-stop // _BLOCK))]
        sources, indices = np.concatenate(blocks, axis=1)[:, start % _BLOCK :][:, : stop - start]
        for number, source in enumerate(self.sources):
            if source.size is None:
                continue
            drawn = np.flatnonzero(sources == number)
            epochs, offsets = np.divmod(indices[drawn], source.size)
            for epoch in np.unique(epochs):
                now = epochs == epoch
                indices[drawn[now]] = self._order(number, int(epoch))[offsets[now]]
        return sources, indices

    def as_dataset(self) -> datasets.Dataset:
        """The mixture as what TRL's trainer accepts: a `datasets.Dataset` of draw numbers, made samples on access."""
        draws = datasets.Dataset.from_dict({"draw": np.arange(self.num_samples, dtype=np.uint32)})
        draws.set_transform(self._columns)
        return draws

    def _columns(self, batch: dict) -> dict[str, list]:
        samples = [self[draw] for draw in batch["draw"]]
        return {name: [sample[name] for sample in samples] for name in samples[0]}

    # Draws

    def _draw(self, draw: int) -> tuple[int, int]:
        """The number of the source of a draw, and how often that source was drawn before."""
        if not 0 <= draw < self.num_samples:
            raise IndexError(f"draw {draw} is outside of 0..{self.num_samples - 1}")
        sources, visits = self._drawn(draw // _BLOCK)
        return int(sources[draw % _BLOCK]), int(visits[draw % _BLOCK])

    def _drawn(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each draw of a block its source and how often that source was drawn before, (65536,) each."""
        if self._block[0] == block:
            return self._block[1:]
        while len(self._counts_before) <= block:
            counts = np.bincount(self._draw_sources(len(self._counts_before) - 1), minlength=len(self.sources))
            self._counts_before.append(self._counts_before[-1] + counts)
        sources = self._draw_sources(block)
        counts = np.bincount(sources, minlength=len(self.sources))
        visits = np.empty(_BLOCK, dtype=np.int64)
        visits[np.argsort(sources, kind="stable")] = np.arange(_BLOCK) - np.repeat(np.cumsum(counts) - counts, counts)
        visits += self._counts_before[block][sources]
        self._block = (block, sources, visits)
        return sources, visits

    def _draw_sources(self, block: int) -> np.ndarray:
        uniform = _generator(self.seed, "draws", block).random(_BLOCK)
        return np.searchsorted(self._bounds, uniform, side="right")

    def _order(self, number: int, epoch: int) -> np.ndarray:
        if self._orders.get(number, (-1,))[0] != epoch:
            order = np.arange(self.sources[number].size, dtype=np.uint32)
            _generator(self.seed, self.sources[number].name, epoch).shuffle(order)
            self._orders[number] = (epoch, order)
        return self._orders[number][1]

    def _record_at(self, number: int, position: int) -> tuple[int, int]:
        size = self.sources[number].size
        if size is None:
            return position, 0
        epoch, offset = divmod(position, size)
        return int(self._order(number, epoch)[offset]), epoch

    # Bad records

    def _count(self, number: int, column: int, times: int = 1):
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id % (_COUNTER_ROWS - 1)
        self._counts.numpy()[row, number, column] += times

    def _skip(self, number: int, index: int, reason: str, detail):
        name = self.sources[number].name
        self._count(number, _REASONS + REASONS.index(reason))
        if (name, reason) not in self._warned:
            self._warned.add((name, reason))
            logger.warning("%s, record %d: %s; others like it are counted", name, index, detail)
        counts = self._counts.numpy()[:, number].sum(axis=0)
        records = int(counts[_USED] + counts[_UNUSABLE]), int(counts[_UNUSABLE])
        turns_out = int(counts[_REASONS:].sum() - counts[_UNUSABLE])
        limit = self.max_bad_fraction
        for kind, (read, bad) in (("records", records), ("turns", (int(counts[_ANSWERS]) + turns_out, turns_out))):
            chance = 2 * (limit * (1 - limit) * read) ** 0.5
            if read >= 20 and bad > limit * read + chance:
                raise TooManyBadSamplesError(
                    f"{bad} of {read} {kind} of {name} could not be used ({bad / read:.1%}), more than "
                    f"max_bad_fraction={limit}: {self.report()}. The last is in record {index} of {name}: {detail}. Repair "
                    "the files, leave the dataset out, or raise max_bad_fraction"
                )

    def skipped(self) -> dict[str, dict[str, int]]:
        """How many records and turns were skipped, by dataset and reason, in this process and its workers. A record is
        counted each time that it is read."""
        counts = self._counts.numpy().sum(axis=0)
        return {
            source.name: {reason: int(n) for reason, n in zip(REASONS, row[_REASONS:]) if n}
            for source, row in zip(self.sources, counts)
            if row[_REASONS:].any()
        }

    def report(self) -> str:
        """[`skipped`] in a line."""
        return (
            "; ".join(
                f"{name}: " + ", ".join(f"{n} {reason}" for reason, n in reasons.items())
                for name, reasons in self.skipped().items()
            )
            or "nothing skipped"
        )

    # State

    def _identity(self) -> dict:
        sources = {s.name: [s.size, float(w)] for s, w in zip(self.sources, self.weights)}
        return {"seed": self.seed, "sources": sources}

    def state_dict(self) -> dict:
        """What was mixed and what was skipped; the position is the sampler's, in `trainer_state.json`."""
        return {**self._identity(), "counts": self._counts.numpy().sum(axis=0).tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Takes up the counts.

        Raises:
            ValueError: the state is of another mixture, whose samples would be others.
        """
        for key, now in self._identity().items():
            if state[key] != now:
                raise ValueError(
                    f"the checkpoint's mixture has {key}={state[key]} and this one has {now}; resume with the same "
                    "data, weights and seed, or start a new run"
                )
        self._counts.zero_()
        self._counts[0] = torch.tensor(state["counts"])
