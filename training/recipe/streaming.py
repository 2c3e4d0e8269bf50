# SPDX-License-Identifier: Apache-2.0
"""Conversations that are read while training: of files by a pattern, a folder or the Hub."""

import importlib.util
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import fsspec
import pyarrow as pa
from datasets import IterableDataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from pyarrow.parquet import ParquetFile

from training.conversations import READ, UNREAD, as_messages, media_in, normalize_conversation, unread_column
from training.recipe.stream import ShuffledStream
from training.recipe.tar_stream import stream_tar
from training.samples import BUFFER_SIZE, PATTERN, TooManyBadSamplesError, is_pattern, looks_local

logger = logging.getLogger(__name__)

CHECKED = 64  # records that are looked at before a run starts
# Extension -> how a file is read; lines may be compressed.
KINDS = {"jsonl": "lines", "ndjson": "lines", "parquet": "parquet", "tar": "tar"}
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


def open_stream(
    name: str,
    split: str = "train",
    columns: dict[str, str] | None = None,
    seed: int = 0,
    buffer_size: int = BUFFER_SIZE,
) -> tuple[ShuffledStream, Callable[[Any], dict]]:
    """The records of a dataset that is not read in advance, and what makes conversations of them.

    Args:
        name: a file, a pattern of files or a URL with one, a local folder, or a Hub name. Lines of JSON, parquet and webdataset
            tars are read by their extension; of a folder or the Hub also what else `datasets` streams.
        columns: our name -> the dataset's.

    Raises:
        FileNotFoundError, ValueError: what is missing or cannot be streamed, or none of the first records is a conversation.
    """
    columns = columns or {}
    shards, parse = _open(name, split)
    stream = ShuffledStream(shards, seed, buffer_size)
    convert = partial(_conversation, parse=parse, columns=columns)
    try:
        first = list(islice(stream.one_pass(), CHECKED))
    except TooManyBadSamplesError as error:
        raise ValueError(f"dataset {name!r}: {error}") from error
    _check_first(name, first, parse, columns, convert)
    return stream, convert


def stream_root(name: str) -> str:
    """The folder of relative image paths in the files of a pattern: the one in front of the first wildcard."""
    if os.path.isfile(name):
        return os.path.dirname(os.path.abspath(name))
    if os.path.isdir(name) or "://" in name or not is_pattern(name):
        return ""
    return os.path.abspath(os.path.dirname(name[: min(name.index(sign) for sign in PATTERN if sign in name)]))


def _open(name: str, split: str) -> tuple[list, Callable[[Any], dict]]:
    """Shards, and what makes a row of a record."""
    if os.path.isfile(os.path.join(name, "dataset_dict.json")) or os.path.isfile(os.path.join(name, "state.json")):
        raise ValueError(
            f"dataset {name!r} was written by save_to_disk and stays on disk while it is read; leave streaming out"
        )
    if not os.path.isdir(name) and (looks_local(name) or "://" in name or _extension(name) in KINDS):
        if split != "train":
            raise ValueError(f"dataset {name!r} is files, which have no split {split!r}; leave it out")
        files = _matching(name)
        return _open_files(name, files, _kind_of(name, files))
    try:
        builder = load_dataset_builder(name)
        splits = builder.config.data_files or {}
        if splits and split not in splits:
            raise ValueError(f"dataset {name!r} has no split {split!r}; it has {', '.join(map(str, splits))}")
        files = [str(file) for file in splits.get(split, ())]
        kinds = {_extension(file) for file in files}
        if len(kinds) == 1 and kinds <= KINDS.keys():
            return _open_files(name, files, KINDS[kinds.pop()])
        records = builder.as_streaming_dataset(split=split)
        return [partial(_shard, records, number) for number in range(records.num_shards)], _as_it_is
    except (DatasetsError, ConnectionError) as error:
        raise ValueError(f"dataset {name!r} cannot be streamed ({error})") from error


def _matching(name: str) -> list[str]:
    """Raises a FileNotFoundError where there is none."""
    if os.path.isfile(name):
        return [os.path.abspath(name)]
    system, path = fsspec.core.url_to_fs(name)
    found = sorted(file for file in system.glob(path) if not system.isdir(file))
    if not found:
        raise FileNotFoundError(
            f"dataset {name!r}: no file matches; correct the pattern (in quotes, on a command line)"
        )
    return found if "://" not in name else [system.unstrip_protocol(file) for file in found]


def _extension(file: str) -> str:
    """The extension of a file in lower case; of compressed lines, the one in front of the compression's."""
    base, extension = os.path.splitext(file.lower())
    inner = os.path.splitext(base)[1].lstrip(".")
    return inner if extension[1:] in COMPRESSIONS and KINDS.get(inner) == "lines" else extension[1:]


def _kind_of(name: str, files: list[str]) -> str:
    extensions = sorted({_extension(file) for file in files})
    kinds = {KINDS.get(extension) for extension in extensions}
    if kinds - set(KINDS.values()):
        why = "; a .json file is read as a whole, convert it to .jsonl" if "json" in extensions else ""
        raise ValueError(
            f"dataset {name!r} has files of type {', '.join(extensions)}, and .jsonl (also .{', .'.join(COMPRESSIONS)}), "
            f".parquet and .tar can be streamed{why}"
        )
    if len(kinds) > 1:
        raise ValueError(f"dataset {name!r} has files of several types, {', '.join(extensions)}; match one of them")
    return kinds.pop()


def _open_files(name: str, files: list[str], kind: str) -> tuple[list, Callable[[Any], dict]]:
    if any(file.endswith(".zst") for file in files) and importlib.util.find_spec("zstandard") is None:
        raise ValueError(f"dataset {name!r}: .zst files need the package zstandard; pip install zstandard")
    read, parse = {"lines": (_lines, _json_row), "parquet": (_tables, _as_it_is), "tar": (_tar_samples, _tar_row)}[kind]
    return [partial(_read_file, read, file) for file in files], parse


# How a file is read. Nothing here has threads: workers are forked, and those of `pyarrow.dataset` may abort a process that ends.


def _read_file(read: Callable[[str, int], Iterator], file: str, rows: int) -> Iterator:
    """Raises an OSError that names the file."""
    try:
        yield from read(file, rows)
    except Exception as error:  # what decoders raise on broken data has no common class
        raise OSError(f"{file}: {type(error).__name__}: {error}") from error


def _lines(file: str, rows: int) -> Iterator[list[bytes]]:
    with _decompressed(file) as opened:
        while lines := list(islice(opened, rows)):
            yield lines


@contextmanager
def _decompressed(file: str) -> Iterator[Iterable[bytes]]:
    if not file.endswith(".zst"):
        with fsspec.open(file, "rb", compression="infer") as opened:
            yield opened
        return
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    # fsspec would stop behind the first frame.
    with fsspec.open(file, "rb") as raw, decompressor.stream_reader(raw, read_across_frames=True) as opened:
        yield io.BufferedReader(opened)


def _tables(file: str, rows: int) -> Iterator[pa.Table]:
    with fsspec.open(file, "rb") as opened:
        # Read in small parts: a row group may be as large as its file.
        for batch in ParquetFile(opened, buffer_size=1 << 20).iter_batches(batch_size=rows, use_threads=False):
            yield pa.Table.from_batches([batch])


def _tar_samples(file: str, rows: int) -> Iterator[list[dict]]:
    def wanted(extension: str) -> bool:
        return extension in ("json", "txt") or _is_picture(extension)

    samples = stream_tar(file, wanted)
    while found := list(islice(samples, rows)):
        yield found


def _shard(records: IterableDataset, number: int, rows: int) -> Iterator[pa.Table]:
    yield from records.shard(records.num_shards, number).with_format("arrow").iter(batch_size=rows)


def _is_picture(extension: str) -> bool:
    return extension.rpartition(".")[2] in PICTURES


# Records become conversations


def _as_it_is(record: dict) -> dict:
    return record


def _json_row(line: bytes) -> dict:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"the line {line[:80]!r} is not a JSON object")
    return row


def _tar_row(record: dict[str, tuple[str, bytes]]) -> dict:
    """`.json` is the row, or `.txt` the caption; the pictures are its images, in the order in which they stand there."""
    pictures = [{"path": name, "bytes": data} for extension, (name, data) in record.items() if _is_picture(extension)]
    row = json.loads(record["json"][1]) if "json" in record else {}
    if not isinstance(row, dict):
        raise ValueError("its .json is not an object")
    if "txt" in record and not {"messages", "prompt"} & row.keys():
        shown = {"role": "user", "content": [{"type": "image"}] * len(pictures)}
        said = {"role": "assistant", "content": record["txt"][1].decode()}
        row = {"messages": [shown, said], "chat_template": "caption"}
    elif media := next((name for name, data in record.values() if not data and media_in(name)), None):
        raise ValueError(f"the member {media} is not read by training; leave it out")
    return {**row, "images": pictures} if pictures else row


def _conversation(record: dict, parse: Callable[[Any], dict], columns: dict[str, str]) -> dict:
    """A record as `normalize_conversation` takes it.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    row = parse(record)
    if columns:
        renamed = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
        others = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
        row = {**others, **renamed}
    if unread := [name for name in UNREAD if row.get(name)]:
        raise ValueError(f"the record has {', '.join(unread)}, which training does not read; leave the columns out")
    if row.get("messages") is None:
        if row.get("prompt") is None or row.get("completion") is None:
            raise ValueError(
                f"the record has the columns {', '.join(row)}, but training reads `messages`, or `prompt` and `completion` (and "
                "`images` or `image`); rename or convert them"
            )
        row = {**row, **as_messages(row)}
        del row["prompt"], row["completion"]
    return row


def _check_first(name: str, records: list[dict], parse: Callable, columns: dict[str, str], convert: Callable) -> None:
    """Raises a ValueError where the records are of another format."""
    if not records:
        raise ValueError(f"dataset {name!r} has no records; give files that have some")
    rows, conversations, first_error = [], [], None
    for record in records:
        try:
            rows.append(parse(record))
            conversation = convert(record)
            normalize_conversation(conversation)
            conversations.append(conversation)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            first_error = first_error or error
    missing = [theirs for theirs in columns.values() if rows and not any(theirs in row for row in rows)]
    if missing:
        raise ValueError(
            f"columns={columns!r} of dataset {name!r}: its first {len(rows)} records have no {', '.join(missing)}, they have "
            f"{', '.join(rows[0])}"
        )
    if not conversations:
        raise ValueError(
            f"dataset {name!r}: none of its first {len(records)} records can be trained on, the first because "
            f"{type(first_error).__name__}: {first_error}"
        )
    ignored = sorted({column for row in conversations for column in row} - READ)
    for column in ignored:
        if held := next(filter(None, (media_in(row.get(column)) for row in conversations)), None):
            raise ValueError(unread_column(name, column, held))
    if ignored:
        logger.warning("columns of dataset %r that are not read: %s", name, ", ".join(ignored))
