# SPDX-License-Identifier: Apache-2.0
"""The records of a dataset of the catalogue as a `datasets.Dataset`, cached on disk; captions as a stream."""

import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List, Value

from training.recipe.catalogue import DATASETS, TURN, annotation_files

_STRING = Value("string")
_TURN = {field: List(_STRING) if field == "options" else _STRING for field in TURN}
FEATURES = Features({"dataset": _STRING, "task": _STRING, "image": _STRING, "turns": List(_TURN)})
STREAMED_FEATURES = Features({**FEATURES, "image": Image(decode=False)})

# All that decides what a cached record says.
_CODE = tuple(
    hashlib.sha256((Path(__file__).parent / name).read_bytes()).hexdigest()
    for name in ("catalogue.py", "json_stream.py", "records.py", "turns.py", "../../processing/lettered_options.py")
)

# `datasets` takes most of a minute to encode a million rows of nested values one by one, and little for columns.
_BLOCK_ROWS = 1000
_BLOCK = Features(
    {"images": List(_STRING), "lengths": List(Value("int32")), **{name: List(kind) for name, kind in _TURN.items()}}
)


def _generate_blocks(name: str, root: str, paths: tuple[str, ...], stamp: tuple) -> Iterator[dict]:
    records = DATASETS[name].read(name, root, paths)
    started = False
    # One block at least: `datasets` refuses a dataset without any row, and its message names no file.
    while (block := list(islice(records, _BLOCK_ROWS))) or not started:
        started = True
        turns = [turn for record in block for turn in record["turns"]]
        yield {
            "images": [record["image"] for record in block],
            "lengths": [len(record["turns"]) for record in block],
            **{field: [turn[field] for turn in turns] for field in TURN},
        }


def _as_records(table: pa.Table, name: str) -> pa.Table:
    columns = {column: pc.list_flatten(table[column]).combine_chunks() for column in table.column_names}
    turns = pa.StructArray.from_arrays([columns[field] for field in TURN], names=list(TURN))
    ends = pc.cumulative_sum(columns["lengths"])
    offsets = pa.concat_arrays([pa.array([0], type=ends.type), ends])
    count = len(columns["images"])
    return pa.table(
        {
            "dataset": pa.repeat(name, count),
            "task": pa.repeat(DATASETS[name].task, count),
            "image": columns["images"],
            "turns": pa.ListArray.from_arrays(offsets, turns),
        }
    )


def read(name: str, root: str) -> Dataset | IterableDataset:
    """The records of a dataset below the data root.

    Raises:
        ValueError, FileNotFoundError: as [`annotation_files`].
    """
    paths = annotation_files(name, root)
    if DATASETS[name].task == "captioning":
        arguments = {"name": name, "root": root, "paths": paths}
        return IterableDataset.from_generator(DATASETS[name].read, features=STREAMED_FEATURES, gen_kwargs=arguments)
    # The cache knows the arguments alone: with these an edited file is read again, and all files by an edited reader.
    stamp = tuple((os.path.getsize(path), os.path.getmtime(path)) for path in paths) + _CODE
    blocks = Dataset.from_generator(
        _generate_blocks,
        features=_BLOCK,
        gen_kwargs={"name": name, "root": root, "paths": tuple(paths), "stamp": stamp},
        writer_batch_size=8,  # blocks that are held in memory; 1000 by default
    )
    return (
        blocks.with_format("arrow")
        .map(
            _as_records,
            batched=True,
            batch_size=8,
            writer_batch_size=8 * _BLOCK_ROWS,
            remove_columns=blocks.column_names,
            features=FEATURES,
            fn_kwargs={"name": name},
            desc=f"Reading {name}",
        )
        .with_format(None)
    )
