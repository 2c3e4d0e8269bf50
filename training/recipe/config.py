# SPDX-License-Identifier: Apache-2.0
"""The settings of the data recipe (paper, section 4): the `mixture:` section of a YAML file."""

import copy
import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

import yaml

from training.recipe.balancing import BALANCINGS
from training.recipe.catalogue import DATASETS, TASKS, annotation_files
from training.samples import BUFFER_SIZE, COLUMNS, is_pattern, looks_local
from training.yaml_file import is_of_type, read_yaml

# The weights of the official fine-tuning mixture.
TUNED_WEIGHTS = {name: dataset.weight for name, dataset in DATASETS.items() if dataset.weight is not None}

# Ways to de-duplicate questions: what agrees in them, and which one stays.
KEYS = ("answer", "bbox")
KEEPS = ("draw", "first")

# How the options of a multiple-choice question are marked, by the mark of the first: its letter or number is counted on.
OPTION_MARKS = ("A.", "A)", "(A)", "a.", "a)", "(a)", "1.", "1)", "(1)")

CHOICES = {
    "balancing": BALANCINGS,
    "granularity": ("fine", "coarse"),
    "diversity": ("single", "multi", "multi+flip"),
    "identifiers": ("none", "dataset-name", "task-name"),
    "marks": (*OPTION_MARKS, "random"),
    "keep": KEEPS,
    "deduplicate": KEYS,
}


class RecipeError(ValueError):
    """Everything that is wrong with a recipe.

    Args:
        problems: one sentence each.
        path: of the recipe's file.
    """

    def __init__(self, problems: list[str], path: str = "the recipe"):
        many = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        super().__init__(f"{path}: {many}\n" + "\n".join(f"  - {problem}" for problem in problems))
        self.problems = problems


@dataclass
class Turns:
    """How the questions about one image become one conversation.

    Args:
        max_turns: dataset -> questions in one conversation; a dataset that is not named has 1.
        deduplicate: dataset -> `answer` or `bbox`: where questions about one image agree in it, one of them is kept.
        keep: which one: `draw` draws it each time the sample is read, `first` takes the first.
    """

    max_turns: dict[str, int] = field(default_factory=lambda: {"vqav2": 10, "gqa": 10, "ocrvqa": 10})
    deduplicate: dict[str, str] = field(default_factory=lambda: {"gqa": "answer"})
    keep: str = "draw"


@dataclass
class Options:
    """How the options of multiple-choice questions are put.

    Args:
        shuffle: draws their order each time the sample is read; the answer is the letter of the right option there.
        marks: one of `OPTION_MARKS`, or `random` to draw one for each question.
        answer_with_text: answers "B. knife" instead of "B".
    """

    shuffle: bool = True
    marks: str = "A."
    answer_with_text: bool = False


@dataclass
class OwnDataset:
    """A dataset in TRL's conversational format that joins the mixture.

    Args:
        name: in the mixture, unique.
        path: a Hub name, or a file or folder as `load_conversations` takes it; of a stream as `open_stream` does.
        split: of a Hub dataset or a saved `DatasetDict`.
        task: the one that `per-task` counts it to.
        columns: name out of `COLUMNS` -> the dataset's name for it.
        streaming: read it while training, and not in advance.
        buffer_size: records of the stream that are shuffled together.
    """

    name: str
    path: str
    split: str = "train"
    task: str = "visual-instruction"
    columns: dict[str, str] = field(default_factory=dict)
    streaming: bool = False
    buffer_size: int = BUFFER_SIZE


@dataclass
class Recipe:
    """What is mixed, in which proportion, and how a record is worded.

    Args:
        data_root: folder of the datasets' original files; relative to the working directory.
        datasets: names out of `DATASETS`.
        exclude: names of datasets or tasks to leave out.
        one_dataset_per_task: keep the first dataset of each task.
        own: the user's own datasets.
        balancing: a name out of `BALANCINGS`.
        weights: dataset -> weight, read by `per-dataset-tuned`.
        eval: dataset -> share of its records that is evaluated while training, and never trained on.
        granularity: templates by dataset (`fine`) or by task (`coarse`).
        diversity: `single` for one wording, `multi` for several, `multi+flip` for several and one in which question and
            answer swap roles.
        identifiers: `none` for instructions, or the name that takes their place.
        templates: file that takes the place of templates.yaml, with the same keys.
        options: see [`Options`].
        turns: see [`Turns`].
        seed: of everything that is drawn.
        max_bad_fraction: training stops when more than this share of the records is of no use.

    Raises:
        RecipeError: all that is wrong with the settings; no file is looked at.
    """

    data_root: str
    datasets: list[str] = field(default_factory=lambda: list(TUNED_WEIGHTS))
    exclude: list[str] = field(default_factory=list)
    one_dataset_per_task: bool = False
    own: list[OwnDataset] = field(default_factory=list)
    balancing: str = "per-dataset-tuned"
    weights: dict[str, float] = field(default_factory=lambda: dict(TUNED_WEIGHTS))
    eval: dict[str, float] = field(default_factory=dict)
    granularity: str = "fine"
    diversity: str = "single"
    identifiers: str = "none"
    templates: str = ""
    options: Options = field(default_factory=Options)
    turns: Turns = field(default_factory=Turns)
    seed: int = 0
    max_bad_fraction: float = 0.1

    def __post_init__(self):
        if problems := list(_problems(self)):
            raise RecipeError(problems)

    def chosen(self) -> list[str]:
        """The names that `datasets`, `exclude` and `one_dataset_per_task` leave, own datasets last."""
        tasks = {name: dataset.task for name, dataset in DATASETS.items()}
        tasks |= {own.name: own.task for own in self.own}
        names = [*self.datasets, *(own.name for own in self.own)]
        names = [name for name in names if name not in self.exclude and tasks[name] not in self.exclude]
        if self.one_dataset_per_task:
            order = {name: place for place, name in enumerate(tasks)}
            first = {}
            for name in sorted(names, key=order.__getitem__):
                first.setdefault(tasks[name], name)
            names = [name for name in names if first[tasks[name]] == name]
        return names


def _unknown(setting: str, value, choices) -> str:
    return f"{setting}={value!r} is unknown; use {', '.join(map(str, choices))}"


def _problems(recipe: Recipe) -> Iterator[str]:
    yield from _choice_problems(recipe)
    yield from _dataset_problems(recipe)
    yield from _turn_problems(recipe)
    if not 0 <= recipe.max_bad_fraction < 1:
        yield f"max_bad_fraction={recipe.max_bad_fraction} is not a fraction; use 0 or more and less than 1"
    yield from _eval_problems(recipe)
    yield from _weight_problems(recipe)


def _choice_problems(recipe: Recipe) -> Iterator[str]:
    for setting in ("balancing", "granularity", "diversity", "identifiers"):
        if getattr(recipe, setting) not in CHOICES[setting]:
            yield _unknown(setting, getattr(recipe, setting), CHOICES[setting])
    if recipe.identifiers != "none" and (recipe.granularity, recipe.diversity) != ("fine", "single"):
        yield (
            f"identifiers={recipe.identifiers} takes the place of the instructions, so "
            f"granularity={recipe.granularity} and diversity={recipe.diversity} choose nothing; leave them at fine and "
            "single"
        )
    if recipe.turns.keep not in CHOICES["keep"]:
        yield _unknown("turns.keep", recipe.turns.keep, CHOICES["keep"])
    if recipe.options.marks not in CHOICES["marks"]:
        yield _unknown("options.marks", recipe.options.marks, CHOICES["marks"])


def _dataset_problems(recipe: Recipe) -> Iterator[str]:
    own_names = [own.name for own in recipe.own]
    names = [*recipe.datasets, *own_names]
    for name in dict.fromkeys(recipe.datasets):
        if name not in DATASETS:
            yield _unknown("datasets", name, DATASETS) + "; a dataset of your own goes under own"
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"dataset {name!r} is named {names.count(name)} times; name it once and give it a larger weight"
        elif name in own_names and name in DATASETS:
            yield f"own dataset {name!r} has the name of a dataset of the paper; give it another"
    excludable = {*DATASETS, *TASKS, *own_names, *(own.task for own in recipe.own)}
    for name in recipe.exclude:
        if name not in excludable:
            yield _unknown("exclude", name, sorted(excludable))
    for own in recipe.own:
        for column in own.columns:
            if column not in COLUMNS:
                yield _unknown(f"own {own.name}: columns", column, COLUMNS)
        if own.buffer_size < 1:
            yield f"own {own.name}: buffer_size={own.buffer_size} must be at least 1, which shuffles nothing but files"
        elif own.buffer_size != BUFFER_SIZE and not own.streaming:
            yield f"own {own.name}: buffer_size={own.buffer_size} is for a stream; add streaming: true, or leave it out"


def _turn_problems(recipe: Recipe) -> Iterator[str]:
    # An own dataset's conversations stay as they are.
    mergeable = [name for name in recipe.datasets if name in DATASETS]
    for name, turns in recipe.turns.max_turns.items():
        if name not in DATASETS:
            yield _unknown("turns.max_turns", name, mergeable)
        if turns < 1:
            yield f"turns.max_turns.{name}={turns}; a conversation has at least 1 turn"
    for name, key in recipe.turns.deduplicate.items():
        if name not in DATASETS:
            yield _unknown("turns.deduplicate", name, mergeable)
        if key not in CHOICES["deduplicate"]:
            yield _unknown(f"turns.deduplicate.{name}", key, CHOICES["deduplicate"])


def _eval_problems(recipe: Recipe) -> Iterator[str]:
    chosen = recipe.chosen() if DATASETS.keys() >= set(recipe.datasets) else recipe.eval
    streamed = {own.name for own in recipe.own if own.streaming}
    for name, share in recipe.eval.items():
        if name not in chosen:
            yield _unknown("eval", name, chosen)
        elif name in DATASETS and DATASETS[name].task == "captioning":
            yield f"eval.{name}={share}: captions are a stream, of which nothing can be kept; leave it out"
        elif name in streamed:
            yield f"eval.{name}={share}: nothing can be kept of a stream; leave it out, or use --eval_dataset"
        if not 0 < share < 1:
            yield f"eval.{name}={share} is not a share; use one between 0 and 1, for instance 0.01"


def _weight_problems(recipe: Recipe) -> Iterator[str]:
    known = {*DATASETS, *(own.name for own in recipe.own)}
    for name, weight in recipe.weights.items():
        if name not in known:
            yield _unknown("weights", name, sorted(known))
        if weight < 0 or not math.isfinite(weight):
            yield f"weights.{name}={weight}; a weight is a finite number of at least 0"
    if not known.issuperset(recipe.datasets):
        return
    chosen = recipe.chosen()
    if not chosen:
        yield "no dataset is left to mix; shorten exclude or name datasets"
    elif recipe.balancing == "per-dataset-tuned":
        missing = [name for name in chosen if name not in recipe.weights]
        if missing:
            yield f"balancing=per-dataset-tuned, but weights has none for {', '.join(missing)}; add them"
        elif not any(recipe.weights[name] for name in chosen):
            yield f"the weights of {', '.join(chosen)} are all 0; give one of them more"


# From YAML


def load_recipe(source: str | dict, overrides: list[str] = ()) -> Recipe:
    """The recipe in the `mixture:` section of a YAML file, whose other sections are the trainer's.

    Args:
        source: path of the file, or the section itself.
        overrides: `setting=value` with the value as YAML, e.g. `balancing=per-task` or `turns.max_turns={}`.

    Raises:
        RecipeError: all that is wrong with it, files that are missing included, with the path.
    """
    if isinstance(source, dict):
        settings, twice, path = source, [], "mixture"
    else:
        (settings, twice), path = _read_section(source), source
    if overrides:  # the mistake may be in them and not in the file
        path += f" with --set {' '.join(overrides)}"
    given = _overridden(settings, overrides, [])
    try:
        recipe = parse_recipe(settings, overrides)
    except RecipeError as error:
        raise RecipeError([*twice, *error.problems, *missing_files(given, _named(given))], path) from None
    if problems := [*twice, *missing_files(given, recipe.chosen())]:
        raise RecipeError(problems, path)
    return recipe


def _read_section(path: str) -> tuple[dict, list[str]]:
    if not os.path.isfile(path):
        raise RecipeError(["the file does not exist; give the path of a YAML file with a mixture: section"], path)
    try:
        settings, twice = read_yaml(path)
    except yaml.YAMLError as error:
        raise RecipeError([f"not a YAML file: {error}"], path) from error
    settings = settings.get("mixture") if isinstance(settings, dict) else None
    if not isinstance(settings, dict):
        raise RecipeError(["there is no mixture: section with settings"], path)
    return settings, twice


def parse_recipe(settings: dict, overrides: list[str] = ()) -> Recipe:
    """The recipe of a mapping, with overrides as in [`load_recipe`]. Looks at no file.

    Raises:
        RecipeError: all that is wrong with it.
    """
    problems = []
    given = _typed(Recipe, _overridden(settings, overrides, problems), "", problems)
    try:
        recipe = Recipe(**{"data_root": "", **given})
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems)
    return recipe


def _overridden(settings: dict, overrides: list[str], problems: list[str]) -> dict:
    settings = copy.deepcopy(settings)
    for override in overrides:
        name, equals, value = override.partition("=")
        *parents, name = name.split(".")
        place = settings
        for parent in parents:
            place = place.setdefault(parent, {}) if isinstance(place, dict) else None
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            problems.append(f"override {override!r} has a value that is not YAML: {error}")
            continue
        if equals and isinstance(place, dict):
            place[name] = value
        else:
            problems.append(f"override {override!r} is not of the form setting=value")
    return settings


def _named(settings: dict) -> list[str]:
    """The datasets that settings mean to read, as far as their mistakes let it be told."""
    names, exclude = settings.get("datasets", list(TUNED_WEIGHTS)), settings.get("exclude")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    exclude = exclude if isinstance(exclude, list) else []
    named = {name: DATASETS[name].task if name in DATASETS else None for name in names}
    return [name for name, task in named.items() if name not in exclude and task not in exclude]


def missing_files(settings: dict, datasets: list[str]) -> list[str]:
    """A sentence for each file or folder that the settings need and that is not there.

    Args:
        datasets: names of those that are to be read.
    """
    problems, root = [], settings.get("data_root")
    if isinstance(root, str) and any(name in DATASETS for name in datasets):
        if not os.path.isdir(root):
            problems.append(f"data_root {root!r} is not a folder; give the one that holds the datasets' folders")
        else:
            for name in filter(DATASETS.__contains__, datasets):
                try:
                    annotation_files(name, root)
                except FileNotFoundError as error:
                    problems.append(str(error))
    templates = settings.get("templates")
    if isinstance(templates, str) and templates and not os.path.isfile(templates):
        problems.append(f"templates {templates!r} do not exist; correct the path or leave it out")
    own_datasets = settings.get("own")
    for own in own_datasets if isinstance(own_datasets, list) else ():
        path = own.get("path") if isinstance(own, dict) and own.get("streaming") is not True else None
        if isinstance(path, str) and looks_local(path) and not os.path.exists(path):
            remedy = "add streaming: true" if is_pattern(path) else "give a file, a folder or a Hub name"
            problems.append(f"own {own.get('name')}: path {path!r} does not exist; {remedy}")
    return problems


_WORDS = {
    str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a mapping",
}  # fmt: skip


def _typed(kind: type, settings: dict, where: str, problems: list[str]) -> dict[str, Any]:
    """The settings of a dataclass that have the type they should have; what is wrong goes to `problems`."""
    if not isinstance(settings, dict):
        problems.append(f"{where.rstrip('.') or 'mixture'}={settings!r} must be a mapping of settings")
        return {}
    fields = {f.name: f for f in dataclasses.fields(kind)}
    given = {}
    for name, value in settings.items():
        if name not in fields:
            problems.append(f"unknown setting {where}{name}; known are {', '.join(where + f for f in fields)}")
            continue
        value = _value(fields[name].type, value, f"{where}{name}", problems)
        if value is not None:
            given[name] = value
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in settings:
            problems.append(f"{where}{name} is missing; add it")
    return given


def _value(kind, value, name: str, problems: list[str]):
    """The value as `kind`, or None and a problem."""
    if dataclasses.is_dataclass(kind):
        before = len(problems)
        given = _typed(kind, value, name + ".", problems)
        return kind(**given) if len(problems) == before else None
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is list and isinstance(value, list):
        values = [_value(inner[0], item, f"{name}[{i}]", problems) for i, item in enumerate(value)]
        return [item for item in values if item is not None]
    if origin is dict and isinstance(value, dict):
        values = {str(key): _value(inner[1], item, f"{name}.{key}", problems) for key, item in value.items()}
        return {key: item for key, item in values.items() if item is not None}
    if is_of_type(value, kind):
        return float(value) if kind is float else value
    problems.append(f"{name}={value!r} must be {_WORDS[origin]}")
    return None
