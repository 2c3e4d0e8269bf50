# SPDX-License-Identifier: Apache-2.0
"""A recipe becomes a mixture: its datasets are read, their turns merged, and each gets its wording."""

import random
from functools import partial

from datasets import IterableDataset
from datasets.exceptions import DatasetsError

from training.conversations import image_root, load_conversations
from training.recipe.balancing import sampling_weights
from training.recipe.catalogue import DATASETS
from training.recipe.config import OwnDataset, Recipe, RecipeError
from training.recipe.instructize import Instructions, instructize
from training.recipe.mixture import Fits, Mixture, Source
from training.recipe.records import read
from training.recipe.stream import Stream
from training.recipe.turns import choose_turns, merge_turns

SHUFFLE_BUFFER = 1000  # records of a stream, undecoded, in each worker


def render_record(
    record: dict, rng: random.Random, *, instructions: Instructions, deduplicate: str | None, keep: str
) -> dict:
    """A record in the words of the recipe. First one of each set of duplicates is drawn, then the words."""
    if deduplicate is not None and record.get("turns"):
        record = {**record, "turns": choose_turns(record["turns"], deduplicate, keep, rng)}
    return instructize(record, instructions, rng)


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
    if own is not None:
        dataset = load_conversations(own.path, own.split, own.columns)
        return Source(name, own.task, dataset, render, image_root(own.path))
    records = read(name, recipe.data_root)
    if isinstance(records, IterableDataset):
        records = Stream(records.shuffle(seed=recipe.seed, buffer_size=SHUFFLE_BUFFER))
    else:
        records = merge_turns(records, recipe.turns.max_turns.get(name, 1), deduplicate)
    return Source(name, DATASETS[name].task, records, render)


def open_mixture(recipe: Recipe, num_samples: int, path: str = "the recipe", fits: Fits | None = None) -> Mixture:
    """The recipe's mixture for a run of `num_samples` samples: steps times global batch.

    Args:
        fits: refuses samples that the run cannot use; they are counted and left out.

    Raises:
        RecipeError: as [`open_sources`].
    """
    sources = open_sources(recipe, path)
    weights = sampling_weights(sources, recipe.balancing, recipe.weights)
    return Mixture(sources, weights, num_samples, recipe.seed, recipe.max_bad_fraction, fits)
