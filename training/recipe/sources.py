# SPDX-License-Identifier: Apache-2.0
"""A recipe becomes a mixture: its datasets are read, their turns merged, and each gets its wording."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError

from training.conversations import image_root, load_conversations
from training.elastic import ElasticDraw
from training.recipe.balancing import sampling_weights
from training.recipe.catalogue import DATASETS
from training.recipe.config import OwnDataset, Recipe, RecipeError
from training.recipe.instructize import Instructions, instructize
from training.recipe.mixture import Fits, Mixture, Source
from training.recipe.records import read
from training.recipe.stream import Stream
from training.recipe.streaming import CHECKED, open_stream, stream_root
from training.recipe.turns import choose_turns, merge_turns
from training.samples import BUFFER_SIZE


def render_record(
    record: dict, rng: random.Random, *, instructions: Instructions, deduplicate: str | None, keep: str
) -> dict:
    """A record in the words of the recipe. First one of each set of duplicates is drawn, then the words."""
    if deduplicate is not None and record.get("turns"):
        record = {**record, "turns": choose_turns(record["turns"], deduplicate, keep, rng)}
    return instructize(record, instructions, rng)


def render_streamed(
    record, rng: random.Random, *, convert: Callable[[Any], dict], render: Callable | None = None
) -> dict:
    """A record of a stream as a conversation, in the words of the recipe if there is one."""
    conversation = convert(record)
    return conversation if render is None else render(conversation, rng)


def open_sources(recipe: Recipe, path: str = "the recipe") -> list[Source]:
    """The datasets that the recipe chooses, in its order.

    Args:
        path: of the recipe's file, for the error.

    Raises:
        RecipeError: faults of the templates, or every dataset that cannot be opened.
    """
    problems, sources = [], []
    try:
        instructions = Instructions(recipe)
    except (ValueError, OSError) as error:
        raise RecipeError([str(error)], path) from error
    own_datasets = {own.name: own for own in recipe.own}
    for name in recipe.chosen():
        try:
            sources.append(_open(name, own_datasets.get(name), recipe, instructions))
        except (ValueError, OSError, DatasetsError) as error:
            problems.append(f"{name}: {error.__cause__ or error}")  # `datasets` wraps what a reader raises
    if problems:
        raise RecipeError(problems, path)
    return sources


def _open(name: str, own: OwnDataset | None, recipe: Recipe, instructions: Instructions) -> Source:
    deduplicate = recipe.turns.deduplicate.get(name)
    render = partial(render_record, instructions=instructions, deduplicate=deduplicate, keep=recipe.turns.keep)
    share = recipe.eval.get(name)
    if own is not None and own.streaming:
        stream, convert = open_stream(own.path, own.split, own.columns, recipe.seed, own.buffer_size)
        render = partial(render_streamed, convert=convert, render=render)
        return Source(name, own.task, stream, render, stream_root(own.path))
    if own is not None:
        dataset, held_out = keep_share(load_conversations(own.path, own.split, own.columns), share, recipe.seed)
        return Source(name, own.task, dataset, render, image_root(own.path), held_out)
    records, held_out = read(name, recipe.data_root), None
    if isinstance(records, IterableDataset):
        records = Stream(records.shuffle(seed=recipe.seed, buffer_size=BUFFER_SIZE))
    else:
        records = merge_turns(records, recipe.turns.max_turns.get(name, 1), deduplicate)
        records, held_out = keep_share(records, share, recipe.seed)
    return Source(name, DATASETS[name].task, records, render, held_out=held_out)


def keep_share(dataset: Dataset, share: float | None, seed: int) -> tuple[Dataset, Dataset | None]:
    """A dataset without a share of its rows, and these rows; the same for the same seed.

    Raises:
        ValueError: nothing is left.
    """
    if share is None:
        return dataset, None
    if math.ceil(share * len(dataset)) >= len(dataset):
        raise ValueError(f"a share of {share} to evaluate leaves none of {len(dataset)} samples to train on; lower it")
    parts = dataset.train_test_split(test_size=share, seed=seed)
    return parts["train"], parts["test"]


def open_mixture(
    recipe: Recipe,
    num_samples: int,
    path: str = "the recipe",
    fits: Fits | None = None,
    elastic: ElasticDraw | None = None,
) -> Mixture:
    """The recipe's mixture for a run of `num_samples` samples: steps times global batch.

    Args:
        fits: refuses samples that the run cannot use; they are counted and left out.
        elastic: draws the M of each sample.

    Raises:
        RecipeError: as [`open_sources`].
    """
    sources = open_sources(recipe, path)
    weights = sampling_weights(sources, recipe.balancing, recipe.weights)
    return Mixture(sources, weights, num_samples, recipe.seed, recipe.max_bad_fraction, fits, elastic)


def open_streamed(
    name: str,
    split: str,
    buffer_size: int,
    num_samples: int,
    seed: int,
    fits: Fits | None = None,
    elastic: ElasticDraw | None = None,
) -> Mixture:
    """A stream alone, as a mixture of one, its first samples read with their images.

    Args:
        name, split: as [`open_stream`].
        num_samples, fits, elastic: as [`open_mixture`].

    Raises:
        ValueError, FileNotFoundError: as [`open_stream`].
        TooManyBadSamplesError: too many of the first samples cannot be used.
    """
    stream, convert = open_stream(name, split, seed=seed, buffer_size=buffer_size)
    source = Source(name, "stream", stream, partial(render_streamed, convert=convert), stream_root(name))
    trial = Mixture([source], np.ones(1), min(CHECKED, num_samples), seed, fits=fits, elastic=elastic)
    for draw in range(len(trial)):
        trial[draw]
    sources = [replace(source, records=stream.anew())]
    return Mixture(sources, np.ones(1), num_samples, seed, fits=fits, elastic=elastic)
