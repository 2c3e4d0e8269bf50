# SPDX-License-Identifier: Apache-2.0
"""Records become conversations: each gets the words of templates.yaml around it."""

import random
import re
from pathlib import Path

import yaml

from training.recipe.catalogue import DATASETS, LETTERS, TASKS, TURN
from training.recipe.config import OPTION_MARKS, Recipe
from training.samples import BadSampleError

TEMPLATES = Path(__file__).with_name("templates.yaml")
DIALOGUE_TASKS = ("visual-instruction", "text-instruction")

_FIELD = re.compile(r"\{(\w+)\}")


class Instructions:
    """The words of a recipe: its templates, and its settings that choose among them.

    Raises:
        FileNotFoundError, ValueError: as [`load_templates`].
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._templates = load_templates(recipe.templates)

    def wordings(self, dataset: str) -> list[list[tuple[str, str]]]:
        """(question, answer) templates of a dataset: a list of wordings for each direction.

        Raises:
            ValueError: the templates do not have the dataset.
        """
        if dataset not in self._templates["datasets"]:
            known = ", ".join(self._templates["datasets"])
            raise ValueError(f"dataset {dataset!r} has no templates; there are some for {known}")
        own = self._templates["datasets"][dataset]
        task = self._templates["tasks"][DATASETS[dataset].task]
        if self.recipe.identifiers != "none":
            name = own["name"] if self.recipe.identifiers == "dataset-name" else task["name"]
            return [
                [(direction["single"].replace("{identifier}", name), direction["answer"])]
                for direction in task["identified"]
            ]
        directions = own["fine"] if self.recipe.granularity == "fine" else task["coarse"]
        if self.recipe.diversity == "single":
            return [[(direction["single"], direction["answer"])] for direction in directions]
        worded = [
            [(wording, direction["answer"]) for wording in (direction["single"], *direction["multi"])]
            for direction in directions
        ]
        if self.recipe.diversity == "multi+flip":
            worded[0].append((task["flip"]["single"], task["flip"]["answer"]))
        return worded

    def system(self, task: str) -> str:
        """The first line of a conversation."""
        return self._templates["system"]["dialogue" if task in DIALOGUE_TASKS else "question"]


def load_templates(path: str = "") -> dict:
    """Reads and checks a file of templates; ours without a path. The head of templates.yaml says what is in it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: all that is missing or unknown in it.
    """
    path = Path(path) if path else TEMPLATES
    if not path.is_file():
        raise FileNotFoundError(f"templates {str(path)!r} do not exist; correct the path or leave it out")
    with open(path, encoding="utf-8") as file:
        templates = yaml.safe_load(file)
    faults: list[str] = []

    def part(parent, name: str, kind: type, where: str):
        value = parent.get(name) if isinstance(parent, dict) else None
        if not isinstance(value, kind) or not value:
            faults.append(f"{where}.{name} should be a {kind.__name__} that is not empty")
            return kind()
        return value

    def check_text(text: str, where: str, extra: tuple = ()):
        unknown = [name for name in _FIELD.findall(text) if name not in (*TURN, *extra)]
        faults.extend(f"{where} has the unknown field {{{name}}}; there are {', '.join(TURN)}" for name in unknown)

    def check_direction(direction, where: str, multi: bool = False, extra: tuple = ()):
        for name in ("single", "answer"):
            check_text(part(direction, name, str, where), f"{where}.{name}", extra)
        for text in part(direction, "multi", list, where) if multi else ():
            check_text(str(text), f"{where}.multi")

    for name in ("question", "dialogue"):
        part(part(templates, "system", dict, "file"), name, str, "system")
    for name in sorted(task for task in TASKS if task != "captioning" and task not in DIALOGUE_TASKS):
        where = f"tasks.{name}"
        task = part(part(templates, "tasks", dict, "file"), name, dict, "tasks")
        part(task, "name", str, where)
        for direction in part(task, "coarse", list, where):
            check_direction(direction, f"{where}.coarse", multi=True)
        check_direction(part(task, "flip", dict, where), f"{where}.flip")
        for direction in part(task, "identified", list, where):
            check_direction(direction, f"{where}.identified", extra=("identifier",))
        for dataset in (dataset for dataset, entry in DATASETS.items() if entry.task == name):
            own = part(part(templates, "datasets", dict, "file"), dataset, dict, "datasets")
            part(own, "name", str, f"datasets.{dataset}")
            for direction in part(own, "fine", list, f"datasets.{dataset}"):
                check_direction(direction, f"datasets.{dataset}.fine", multi=True)
    if faults:
        raise ValueError(f"templates {str(path)!r}: " + "; ".join(dict.fromkeys(faults)))
    return templates


def instructize(record: dict, instructions: Instructions, rng: random.Random) -> dict:
    """A record as a sample for the collator.

    Args:
        record: as in `catalogue`, its turns chosen; or a sample with `messages`, which stays as it is.
        rng: for all that is drawn.

    Returns:
        `messages`; `images`, a list with the record's image or nothing; `chat_template`, "default" or "caption";
        `dataset`; and `skipped`, the reason of each turn that is left out.

    Raises:
        BadSampleError: nothing is left to learn.
    """
    if record.get("messages") is not None:
        images = record.get("images")
        return {
            **record,
            "images": [] if images is None else images,
            "chat_template": record.get("chat_template") or "default",
            "dataset": record.get("dataset"),
            "skipped": [],
        }
    task, image, turns = record["task"], record["image"], record["turns"]
    if not turns:
        raise BadSampleError(f"a record of {record['dataset']} has no turns", "malformed record")
    images = [] if image is None else [image]
    sample = {"images": images, "chat_template": "default", "dataset": record["dataset"], "skipped": []}
    if task == "captioning":
        caption = turns[0]["answer"]
        if image is None or caption is None:
            raise BadSampleError(f"a record of {record['dataset']} lacks its image or its caption", "malformed record")
        if not caption.strip():
            raise BadSampleError(f"a caption of {record['dataset']} is empty", "empty answer")
        messages = [_message("user", {"type": "image"}), _message("assistant", _words(caption))]
        return {**sample, "messages": messages, "chat_template": "caption"}

    build = _dialogue if task in DIALOGUE_TASKS else _questions
    messages, skipped = build(record, instructions, rng)
    if not messages:
        raise BadSampleError(
            f"no turn of a record of {record['dataset']} is left", skipped[0] if skipped else "malformed record"
        )
    system = _message("system", _words(instructions.system(task)))
    return {**sample, "messages": [system, *messages], "skipped": skipped}


def _words(text: str) -> dict:
    return {"type": "text", "text": text}


def _message(role: str, *content: dict) -> dict:
    return {"role": role, "content": list(content)}


def _questions(record: dict, instructions: Instructions, rng: random.Random) -> tuple[list[dict], list[str]]:
    # One wording for all turns, as in the paper's training.
    question, answer = rng.choice(rng.choice(instructions.wordings(record["dataset"])))
    messages, skipped = [], []
    for turn in record["turns"]:
        try:
            values = _values(turn, instructions, rng)
            asked, told = _fill(question, values), _fill(answer, values)
            if not told.strip():
                raise BadSampleError("the answer is empty", "empty answer")
        except BadSampleError as bad:
            skipped.append(bad.reason)
            continue
        messages += [_message("user", _words(asked)), _message("assistant", _words(told))]
    if messages and record["image"] is not None:
        messages[0]["content"].insert(0, {"type": "image"})
    return messages, skipped


def _values(turn: dict, instructions: Instructions, rng: random.Random) -> dict[str, str | None]:
    """The values of a template's fields. Options get their letters, in an order that is drawn if the recipe shuffles."""
    options = turn["options"]
    if options is None:
        return turn
    if not turn["answer"]:
        raise BadSampleError("the answer is empty", "empty answer")
    correct = LETTERS.find(turn["answer"]) if len(turn["answer"]) == 1 else -1
    if not 0 <= correct < len(options) <= len(LETTERS):
        raise BadSampleError(f"the answer {turn['answer']!r} is none of {len(options)} options", "malformed record")
    order = list(range(len(options)))
    if instructions.recipe.options.shuffle:
        rng.shuffle(order)
    style = instructions.recipe.options.marks
    if style == "random":
        style = rng.choice(OPTION_MARKS)
    lines = [f"{_mark(style, place)} {options[index]}" for place, index in enumerate(order)]
    place = order.index(correct)
    letter = _mark(style, place).strip("().")
    return {
        **turn,
        "options": "\n".join(lines),
        "answer": lines[place] if instructions.recipe.options.answer_with_text else letter,
    }


def _mark(style: str, place: int) -> str:
    return re.sub(
        "[Aa1]",
        lambda first: str(place + 1) if first[0] == "1" else chr(ord(first[0]) + place),
        style,
    )


def _fill(template: str, values: dict[str, str | None]) -> str:
    if values["context"] is None:
        template = "\n".join(line for line in template.split("\n") if "{context}" not in line)

    def value(match: re.Match) -> str:
        if values[match[1]] is None:
            raise BadSampleError(f"{match[1]} is missing", "malformed record")
        return values[match[1]]

    # In one pass: braces inside the values are text.
    return _FIELD.sub(value, template)


def _dialogue(record: dict, instructions: Instructions, rng: random.Random) -> tuple[list[dict], list[str]]:
    turns, skipped = [], []
    for turn in record["turns"]:
        # None as the answer means that the user speaks again, or last. An empty answer would teach to say nothing.
        if turn["answer"] is not None and not turn["answer"].strip():
            skipped.append("empty answer")
        else:
            turns.append(turn)
    if all(turn["answer"] is None for turn in turns):
        return [], skipped
    messages = []
    for turn in turns:
        if turn["question"] is not None:
            has_image = record["task"] == "visual-instruction" and "<image>" in turn["question"]
            content = _place_image(turn["question"]) if has_image else [_words(turn["question"])]
            if messages and messages[-1]["role"] == "user":
                messages[-1]["content"] += content
            else:
                messages.append(_message("user", *content))
        if turn["answer"] is not None:
            messages.append(_message("assistant", _words(turn["answer"])))
    if messages[-1]["role"] == "user":
        messages[-1]["unanswered"] = True  # nothing is learned from it; the official code leaves it in
    placed = sum(item["type"] == "image" for message in messages for item in message["content"])
    images = int(record["image"] is not None)
    if placed > images:
        raise BadSampleError(f"{placed} image placeholders for {images} images", "malformed record")
    # No placeholder, or it went with a question whose answer is empty: the other questions still need the image.
    if placed < images:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise BadSampleError("nobody asks about the image", "malformed record")
        first["content"].insert(0, {"type": "image"})
    return messages, skipped


def _place_image(question: str) -> list[dict]:
    """The items of a question with "<image>" in it, as the official code reads it.

    One line break between image and text is dropped. If the image opens the question, the text behind it gets a role
    marker of its own. Otherwise the text continues the image's, and keeps its line break.
    """
    before, *others = question.split("<image>")
    content = [_words(before.removesuffix("\n"))] if before.removesuffix("\n") else []
    for text in others:
        content.append({"type": "image"})
        if before:
            content += [{**_words(text), "continues": True}] if text else []
        else:
            content += [_words(text.removeprefix("\n"))] if text.removeprefix("\n") else []
    return content
