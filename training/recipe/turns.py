# SPDX-License-Identifier: Apache-2.0
"""The questions of one image become conversations.

This takes two steps, because the second is drawn anew in each epoch. `merge_turns` decides once which questions share a
conversation, duplicates included, and is cached. `choose_turns` keeps one of each set of duplicates when a sample is read.
"""

import random

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features

from training.recipe.config import KEEPS, KEYS

# Here each turn is a question of its own. Dialogues and captions stay as they are.
MERGEABLE_TASKS = ("vqa-open", "vqa-multiple-choice", "referring-expression")


def clusters(keys: list) -> list[list[int]]:
    """Positions with the same key together, in the order of their first; each None or "" is on its own."""
    found: dict = {}
    for position, key in enumerate(keys):
        found.setdefault((position,) if key in (None, "") else key, []).append(position)
    return list(found.values())


def choose_turns(turns: list[dict], key: str | None, keep: str, rng: random.Random) -> list[dict]:
    """Keeps one turn of each set with the same `key`, in order; without a `key` all of them.

    Args:
        key: "answer" or "bbox".
        keep: "draw" takes any turn of a set with equal chance, "first" the first.

    Raises:
        ValueError: another key or another way to keep.
    """
    if keep not in KEEPS:
        raise ValueError(f"keep={keep!r} is not one of {', '.join(KEEPS)}")
    if key is None:
        return turns
    _check_key(key)
    kept = [rng.choice(same) if keep == "draw" else same[0] for same in clusters([turn[key] for turn in turns])]
    return [turns[position] for position in kept]


def merge_turns(
    dataset: Dataset, max_turns: int | None, key: str | None = None, shuffle_seed: int | None = None
) -> Dataset:
    """Conversations of up to `max_turns` questions about one image.

    Images come in the order of their first records, and the questions of an image in the order of theirs, also with
    `max_turns=1`. A record without an image or without turns stays alone. Dialogues and captions come back as they are.

    Args:
        dataset: records of one dataset, as in `catalogue`.
        max_turns: None for no limit; 1 keeps every question on its own, duplicates included.
        key: "answer" or "bbox": turns that agree in it count as one of `max_turns`. They follow one another in one
            conversation, and `choose_turns` keeps one of them.
        shuffle_seed: shuffles the questions of each image before they are divided.

    Returns:
        A dataset of records with the columns of the given one, cached on disk.

    Raises:
        ValueError: `max_turns` below 1 or another key.
    """
    if max_turns is not None and max_turns < 1:
        raise ValueError(f"max_turns={max_turns} must be at least 1, or null for no limit")
    if key is not None:
        _check_key(key)
    if len(dataset) == 0 or dataset[0]["task"] not in MERGEABLE_TASKS:
        return dataset
    return (
        dataset.with_format("arrow")
        .map(
            _merge,
            batched=True,
            batch_size=None,
            # Made anew, because the cache hashes their pickle: it differs between a dataset just written and one loaded.
            features=Features.from_dict(dataset.features.to_dict()),
            fn_kwargs={"max_turns": max_turns, "key": key if max_turns != 1 else None, "shuffle_seed": shuffle_seed},
            desc="Merging turns",
        )
        .with_format(None)
    )


def _check_key(key: str):
    if key not in KEYS:
        raise ValueError(f"key={key!r} is not one of {', '.join(KEYS)}, or null for no de-duplication")


def _merge(table: pa.Table, max_turns: int | None, key: str | None, shuffle_seed: int | None) -> pa.Table:
    table = table.combine_chunks()
    lists, images = (_array(table[name]) for name in ("turns", "image"))
    turns = lists.flatten()
    ends = np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False))
    starts = np.concatenate([[0], ends[:-1]])
    keys = turns.field(key).to_pylist() if key else None
    # Images get codes in the order of their first appearance; records without an image share one.
    codes = images.dictionary_encode(null_encoding="encode").indices.to_numpy(zero_copy_only=False)
    by_image = np.argsort(codes, kind="stable")
    borders = np.flatnonzero(np.diff(codes[by_image])) + 1
    rng = None if shuffle_seed is None else random.Random(shuffle_seed)

    rows, order, lengths = [], [], []  # of each conversation: a record that it is made of, its turns, their number
    for group in np.split(by_image, borders):
        alone = not images[group[0]].is_valid
        pool: list[int] = []
        first = int(group[0])
        for row in group.tolist():
            positions = range(starts[row], ends[row])
            if len(positions) == 0:
                rows.append(row)
                lengths.append(0)
            elif alone:
                rows.append(row)
                order.extend(positions)
                lengths.append(len(positions))
            else:
                pool.extend(positions)
        sets = [[pool[i] for i in same] for same in clusters([keys[p] for p in pool])] if keys else [[p] for p in pool]
        if rng is not None:
            rng.shuffle(sets)
        step = max_turns or len(sets)
        for begin in range(0, len(sets), step or 1):
            together = [position for same in sets[begin : begin + step] for position in same]
            rows.append(first)
            order.extend(together)
            lengths.append(len(together))

    merged = table.take(pa.array(rows, type=pa.int64()))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), type=pa.int32())
    column = pa.ListArray.from_arrays(offsets, turns.take(pa.array(order, type=pa.int64())))
    return merged.set_column(merged.column_names.index("turns"), "turns", column)


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
