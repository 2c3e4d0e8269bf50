# SPDX-License-Identifier: Apache-2.0
"""Several sources mixed by weight into one sequence of samples.

Sample `k` depends on the seed and on `k` alone. So the mixture is a map-style dataset, and the samplers of torch and
accelerate decide which process reads what. The order is the same with any number of workers, ranks share the batches, and
a resumed run goes on at the step of `trainer_state.json` without reading what it skips. A chain of
`datasets.interleave_datasets`, `shuffle` and `split_dataset_by_node` has none of this: its position runs ahead with the
workers' prefetching, its shuffle buffer is lost on saving, and its order depends on the number of workers.
"""

import hashlib
import itertools
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from PIL.Image import DecompressionBombError
from torch.utils.data import get_worker_info

from processing import open_image
from training.conversations import normalize_conversation
from training.elastic import ElasticDraw
from training.recipe.stream import ShuffledStream, Stream
from training.samples import REASONS, BadSampleError, TooManyBadSamplesError

logger = logging.getLogger(__name__)

# Raises a ValueError where messages in a chat template, with M visual tokens an image (None: the model's default), are of no
# use for training, for instance because they are too long. The images are given as the record has them, with the folder of
# relative paths: how large they are decides into how many crops they are cut.
Fits = Callable[[list[dict], str, int | None, list, str], None]

# Columns of the counts: records used, answers in them, records not used; then the reasons, also of turns.
_USED, _ANSWERS, _UNUSABLE, _REASONS = 0, 1, 2, 3

MOST_IN_A_ROW = 100  # bad records, before reading stops whatever share is allowed
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


@dataclass
class Source:
    """One dataset of a mixture.

    Args:
        name: unique in the mixture.
        task: what `per-task` balances.
        records: a sequence (`__len__`, `__getitem__`), such as a `datasets.Dataset`, or a [`Stream`].
        render: (record, random) -> `{"messages", "images"[, "chat_template"][, "skipped"]}`; `skipped` has the reason
            of each turn that is left out, one of `REASONS`. Pure: it draws from the `random.Random` that it is given.
            Raises a ValueError, best a [`BadSampleError`], where the record is of no use.
        image_root: folder of relative image paths.
        held_out: records that are not mixed but evaluated, or None.
    """

    name: str
    task: str
    records: Sequence | Stream
    render: Callable[[Any, random.Random], dict]
    image_root: str = ""
    held_out: Sequence | None = None

    @property
    def size(self) -> int | None:
        """Number of records, None for a stream."""
        return None if isinstance(self.records, Stream) else len(self.records)


def sample_random(seed: int, name: str, index: int, epoch: int) -> random.Random:
    """What a sample draws from. It depends on the record and its epoch, and not on the process that reads it."""
    return random.Random(f"{seed}/{name}/{index}/{epoch}")


def read_sample(
    source: Source, index: int, rng: random.Random, fits: Fits | None = None, num_query_tokens: int | None = None
) -> dict:
    """[`make_sample`] of record `index`, its images loaded as PIL images in RGB.

    Raises:
        BadSampleError: nothing can be learned from the record.
    """
    sample = make_sample(source, index, read_record(source, index), rng, num_query_tokens)
    if fits is not None:
        try:
            fits(sample["messages"], sample["chat_template"], num_query_tokens, sample["images"], source.image_root)
        except _DATA_ERRORS as error:
            raise bad_sample(error, "malformed conversation") from error
    try:
        sample["images"] = [open_image(image, source.image_root) for image in sample["images"]]
    except (OSError, ValueError) as error:
        raise bad_sample(error, "corrupt image") from error
    return sample


def read_record(source: Source, index: int):
    """Record `index` as its reader gives it.

    Raises:
        BadSampleError: it cannot be read.
    """
    try:
        return source.records[index]
    except _DATA_ERRORS as error:
        raise bad_sample(error, "malformed record") from error


def make_sample(source: Source, index: int, record, rng: random.Random, num_query_tokens: int | None = None) -> dict:
    """A record as a checked sample.

    Args:
        num_query_tokens: M of its images, of an elastic run.

    Returns:
        `messages` with content as items; `images` as the record has them; `chat_template`; `dataset` and `index`;
        `skipped`, the reason of each turn that is left out; and `num_query_tokens` where it is given.

    Raises:
        BadSampleError: nothing can be learned from the record.
    """
    try:
        sample = source.render(record, rng)
    except _DATA_ERRORS as error:
        raise bad_sample(error, "malformed record") from error
    try:
        messages, images = normalize_conversation(sample)
    except _DATA_ERRORS as error:
        raise bad_sample(error, "malformed conversation") from error
    return {
        "messages": messages,
        "images": images,
        "chat_template": sample.get("chat_template") or "default",
        "dataset": source.name,
        "index": index,
        "skipped": list(sample.get("skipped") or ()),
        **({} if num_query_tokens is None else {"num_query_tokens": num_query_tokens}),
    }


def bad_sample(error: Exception, otherwise: str) -> BadSampleError:
    """The error as a BadSampleError, its message behind its reason: the error's own, its kind's, or `otherwise`."""
    reason = getattr(error, "reason", None)  # a UnicodeError has one, too
    if isinstance(error.__cause__, DecompressionBombError):
        reason = "decompression bomb"
    if reason not in REASONS:
        kinds = {FileNotFoundError: "missing image", OSError: "corrupt image"}
        reason = next((reason for kind, reason in kinds.items() if isinstance(error, kind)), otherwise)
    said = str(error) if isinstance(error, BadSampleError) else f"{type(error).__name__}: {error}"
    return BadSampleError(f"{reason}: {said}", reason)


def _generator(*key) -> np.random.Generator:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class Mixture(torch.utils.data.Dataset):
    """`num_samples` samples drawn from the sources by weight.

    Sources are drawn with replacement. Of a source each record comes once an epoch, in a new order each epoch. A record
    that is of no use is counted, and the next one of its source takes its place. Read the mixture in order (with a
    `SequentialSampler`); another order gives the same samples, but is slow where there are streams.

    Args:
        sources: with unique names.
        weights: (sources,) shares, see `balancing.sampling_weights`.
        num_samples: draws in the run: steps times global batch.
        seed: of everything.
        max_bad_fraction: reading stops when more than this share of a source's records is of no use, or of the turns in
            the used ones. It is judged from 20 records or turns on, with two standard deviations of tolerance.
        fits: refuses samples that the run cannot use, see [`Fits`].
        elastic: draws the M of each sample; None leaves it to the model.

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
        fits: Fits | None = None,
        elastic: ElasticDraw | None = None,
    ):
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources {', '.join(names)}: a name is there twice; give each another")
        if empty := [source.name for source in sources if source.size == 0]:
            raise ValueError(f"no records in {', '.join(empty)}; check the files or leave the datasets out")
        self.sources, self.weights, self.num_samples, self.seed = sources, weights, num_samples, seed
        self.max_bad_fraction, self.fits, self.elastic = max_bad_fraction, fits, elastic
        self._bounds = np.cumsum(weights)
        # The last source with a weight gets what rounding leaves of the sum.
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
            # Of a stream the share of bad records decides alone: there may be good ones behind any number of them.
            if source.size is not None and position - visit > max(MOST_IN_A_ROW, source.size):
                raise TooManyBadSamplesError(
                    f"none of {position - visit} records of {source.name} in a row could be used: {self.report()}. Repair the "
                    "files, or leave the dataset out"
                )
            index, epoch = self._record_at(number, position)
            rng = sample_random(self.seed, source.name, index, epoch)
            try:
                sample = read_sample(source, index, rng, self.fits, self._query_tokens(source, index, epoch))
            except BadSampleError as error:
                self._count(number, _UNUSABLE)
                self._skip(number, index, error.reason, error)
                continue
            self._count(number, _USED)
            self._count(number, _ANSWERS, sum(message["role"] == "assistant" for message in sample["messages"]))
            for reason in sample.pop("skipped"):
                self._skip(number, index, reason, "a turn is left out")
            return sample

    def glance(self, draw: int) -> dict:
        """Sample number `draw` as [`make_sample`] gives it, images unread, nothing counted, with `image_root`, the folder of
        relative paths.

        Raises:
            BadSampleError: its record is of no use; reading the sample finds another.
        """
        number, visit = self._draw(draw)
        source = self.sources[number]
        index, epoch = self._record_at(number, visit)
        rng = sample_random(self.seed, source.name, index, epoch)
        number = self._query_tokens(source, index, epoch)
        sample = make_sample(source, index, read_record(source, index), rng, number)
        return {**sample, "image_root": source.image_root}

    def read_ahead(self, window: int) -> "Mixture":
        """The same draws, to [`glance`] at a window of them before this mixture reads it in another order.

        Its streams are its own, and the streams of this mixture keep `window` records from now on.
        """
        sources = []
        for source in self.sources:
            if isinstance(source.records, Stream):
                source.records.keep(window)
                source = replace(source, records=source.records.anew())
            sources.append(source)
        return Mixture(sources, self.weights, self.num_samples, self.seed, elastic=self.elastic)

    def held_out(self) -> dict[str, "Mixture"]:
        """What is kept from training, by source: each record once, always in the same words, and of an elastic run with the
        model's default M. The next one takes the place of a bad one."""
        return {
            source.name: Mixture(
                [replace(source, records=source.held_out, held_out=None)],
                np.ones(1),
                len(source.held_out),
                self.seed,
                1.0,  # each evaluation reads and counts the same records again
                self.fits,
            )
            for source in self.sources
            if source.held_out is not None
        }

    def schedule(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """What the draws from `start` to `stop` read if no record is bad: source numbers and record indices, (draws,)
        each."""
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
        """As a `datasets.Dataset`, which TRL's trainer asks for. It holds draw numbers; reading one makes the sample."""
        draws = datasets.Dataset.from_dict({"draw": np.arange(self.num_samples, dtype=np.uint32)})
        draws.set_transform(self._columns)
        return draws

    def _columns(self, batch: dict) -> dict[str, list]:
        samples = [self[draw] for draw in batch["draw"]]
        return {name: [sample[name] for sample in samples] for name in samples[0]}

    # Draws

    def _draw(self, draw: int) -> tuple[int, int]:
        """What a draw reads: the number of its source, and how often that was drawn before."""
        if not 0 <= draw < self.num_samples:
            raise IndexError(f"draw {draw} is outside of 0..{self.num_samples - 1}")
        sources, visits = self._drawn(draw // _BLOCK)
        return int(sources[draw % _BLOCK]), int(visits[draw % _BLOCK])

    def _drawn(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for each draw of a block, (65536,) each."""
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

    def _query_tokens(self, source: Source, index: int, epoch: int) -> int | None:
        return None if self.elastic is None else self.elastic.of(self.seed, source.name, index, epoch)

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
                    "the files, or in a recipe leave the dataset out or raise max_bad_fraction"
                )

    def skipped(self) -> dict[str, dict[str, int]]:
        """Dataset -> reason -> records and turns that this process and its workers skipped. A record counts each time
        that it is read."""
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
        files = {s.name: len(s.records.shards) for s in self.sources if isinstance(s.records, ShuffledStream)}
        return {"seed": self.seed, "sources": sources, **({"files": files} if files else {})}

    def state_dict(self) -> dict:
        """What was mixed and what was skipped. The position is not in it: the trainer keeps it."""
        return {**self._identity(), "counts": self._counts.numpy().sum(axis=0).tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on with the counts of a checkpoint.

        Raises:
            ValueError: the checkpoint is of another mixture, which gives other samples.
        """
        for key, now in self._identity().items():
            if state.get(key) != now:
                raise ValueError(
                    f"the checkpoint's mixture has {key}={state.get(key)} and this one has {now}; resume with the same "
                    "data, weights and seed, or start a new run"
                )
        self._counts.zero_()
        self._counts[0] = torch.tensor(state["counts"])
