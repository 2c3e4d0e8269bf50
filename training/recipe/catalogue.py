# SPDX-License-Identifier: Apache-2.0
"""The datasets of the recipe: for each its task, files, reader and weight. A new one is a reader and a row of `DATASETS`.

A reader makes records of annotation files: what a sample says, before any wording. A record is

    {"dataset": "gqa", "task": "vqa-open", "image": path or None, "turns": [turn, ...]}

and a turn has the fields of `TURN`, None where its task has no use for them:

    question, answer   vqa-open, and the two sides of a conversation (an answer None: the user speaks again or last;
                       a question None: the assistant speaks first); a caption is an answer
    options, context   vqa-multiple-choice; there the answer is the letter of the right one in the order of `options`
    phrase, bbox       referring-expression: "[x1,y1,x2,y2]" in parts of the image's width and height; VSR
                       keeps its caption as phrase

A row that cannot be understood is a record without turns, so that whoever reads it can count it. A captioning dataset is
a stream, and its image is {"path", "bytes"}. The words around a question are in templates.yaml.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import escape, glob
from itertools import chain, zip_longest

from training.recipe.json_stream import stream_json
from training.recipe.tar_stream import stream_tar
from training.samples import is_pattern

TURN = ("question", "answer", "options", "context", "phrase", "bbox")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# What converting a row raises when the row does not have the fields, types and numbers that its format promises.
_MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError)

Converter = Callable[[object], tuple[str | None, list[dict]]]  # a row as (image, turns)


def _text(value) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise TypeError(f"expected text, got {type(value).__name__}")


def _turn(**fields) -> dict:
    return {**dict.fromkeys(TURN), **fields}


def _box(x: float, y: float, width: float, height: float, image_width: float, image_height: float) -> str:
    corners = x / image_width, y / image_height, (x + width) / image_width, (y + height) / image_height
    return "[" + ",".join(f"{corner:.3f}" for corner in corners) + "]"


def _records(name: str, rows: Iterable, convert: Converter) -> Iterator[dict]:
    for row in rows:
        try:
            image, turns = convert(row)
        except _MALFORMED:
            image, turns = None, []
        yield {"dataset": name, "task": DATASETS[name].task, "image": image, "turns": turns}


def _read_vqav2(name, root, paths):
    questions, annotations = paths
    folder = os.path.join(root, "VQAv2/images")
    # Both files name the split that the image names carry, and list the same questions in the same order.
    split = re.search(r"mscoco_(\w+)_questions", questions).group(1)

    def convert(pair):
        question, annotation = pair
        if question["question_id"] != annotation["question_id"]:
            raise ValueError("the two files are not in the same order")
        image = os.path.join(folder, f"COCO_{split}_{int(question['image_id']):012}.jpg")
        return image, [_turn(question=_text(question["question"]), answer=_text(annotation["multiple_choice_answer"]))]

    rows = zip_longest(stream_json(questions, "questions"), stream_json(annotations, "annotations"))
    yield from _records(name, rows, convert)


def _read_gqa(name, root, paths):
    def convert(entry):
        _, row = entry
        image = os.path.join(root, "GQA/images", f"{row['imageId']}.jpg")
        return image, [_turn(question=_text(row["question"]), answer=_text(row["answer"]))]

    yield from _records(name, stream_json(paths[0]), convert)


def _read_ocrvqa(name, root, paths):
    def convert(entry):
        key, row = entry
        image = os.path.join(root, "OCRVQA/images", key + os.path.splitext(row["imageURL"])[1])
        return image, [
            _turn(question=_text(question), answer=_text(answer))
            for question, answer in zip(row["questions"], row["answers"], strict=True)
        ]

    def is_training(entry):
        # A row without a split is let through, to be counted as malformed.
        return not isinstance(entry[1], dict) or entry[1].get("split", 1) == 1

    yield from _records(name, filter(is_training, stream_json(paths[0])), convert)


def as_question(caption: str) -> str:
    """VSR's statement as a question: "The cat is on the mat." becomes "Is the cat on the mat?".

    As in the official code every dot becomes a question mark; one is added where there is none at the end.
    """
    parts = [part.strip() for part in re.split(r"\bis\b", caption, maxsplit=1)]
    question = "Is " + " ".join(parts).lower().strip().replace(".", "?")
    return question if question.endswith("?") else question + "?"


def _read_vsr(name, root, paths):
    def convert(line):
        row = json.loads(line)
        split, file_name = row["image_link"].split("/")[-2:]
        caption = _text(row["caption"])
        answer = {0: "no", 1: "yes"}[row["label"]]
        image = os.path.join(root, "VSR/images", split, file_name)
        return image, [_turn(question=as_question(caption), answer=answer, phrase=caption)]

    with open(paths[0], encoding="utf-8") as file:
        yield from _records(name, (line for line in file if line.strip()), convert)


_SCIENCEQA = re.compile(r"(?P<question>.*?)\nContext: (?P<context>.*)\nOptions: (?P<options>.*)", re.DOTALL)


def _read_sqa(name, root, paths):
    from processing.lettered_options import split_options  # its package loads torch, which the settings do without

    def convert(row):
        asked, told = (_text(message["value"]) for message in row["conversations"][:2])
        parts = _SCIENCEQA.fullmatch(asked.removesuffix("\n<image>"))
        options = split_options(parts["options"])
        answer = re.findall(r"ANSWER: ([A-Z])", told)[-1]
        options[LETTERS.index(answer)]
        image = os.path.join(root, "ScienceQA/images/train", row["image"]) if row.get("image") else None
        return image, [_turn(question=parts["question"], context=parts["context"], options=options, answer=answer)]

    yield from _records(name, stream_json(paths[0]), convert)


def _read_aokvqa(name, root, paths):
    def convert(row):
        options = [_text(choice) for choice in row["choices"]]
        correct = row["correct_choice_idx"]
        if not 0 <= correct < len(options):
            raise ValueError(f"correct_choice_idx={correct} of {len(options)} choices")
        image = os.path.join(root, "opensets_coco/images/train2017", f"{int(row['image_id']):012}.jpg")
        return image, [_turn(question=_text(row["question"]), options=options, answer=LETTERS[correct])]

    yield from _records(name, stream_json(paths[0]), convert)


def _read_refcoco(name, root, paths):
    def convert(pair):
        image, annotation = pair
        if image["id"] != annotation["image_id"]:
            raise ValueError("images and annotations are not in the same order")
        path = os.path.join(root, "opensets_coco/images/train2014", image["file_name"])
        bbox = _box(*annotation["bbox"], image["width"], image["height"])
        return path, [_turn(phrase=_text(image["caption"]), bbox=bbox)]

    rows = zip_longest(stream_json(paths[0], "images"), stream_json(paths[0], "annotations"))
    yield from _records(name, rows, convert)


def _read_vg(name, root, paths):
    sizes = {row.get("image_id"): (row.get("width"), row.get("height")) for row in stream_json(paths[0])}

    def convert(region):
        image = os.path.join(root, "VisualGenome/images", f"{region['image_id']}.jpg")
        box = (region[side] for side in ("x", "y", "width", "height"))
        return image, [_turn(phrase=_text(region["phrase"]), bbox=_box(*box, *sizes[region["image_id"]]))]

    def regions():
        for row in stream_json(paths[1]):
            found = row.get("regions") if isinstance(row, dict) else None
            # A row without the list goes on as it is, to be counted as malformed.
            yield from found if isinstance(found, list) else [row]

    yield from _records(name, regions(), convert)


def _dialogue(messages: Iterable[tuple[str, str]]) -> list[dict]:
    """Turns of (role, text) pairs."""
    turns = []
    for role, text in messages:
        if role == "human":
            turns.append(_turn(question=text))
        elif turns and turns[-1]["answer"] is None:
            turns[-1]["answer"] = text
        else:
            turns.append(_turn(answer=text))
    return turns


_ROLES = {"human": "human", "user": "human", "gpt": "gpt"}


def _read_llava150k(name, root, paths):
    def convert(row):
        image = os.path.join(root, "opensets_coco/images/train2017", row["image"])
        return image, _dialogue((_ROLES[said["from"]], _text(said["value"])) for said in row["conversations"])

    yield from _records(name, chain.from_iterable(map(stream_json, paths)), convert)


def _read_sharegpt(name, root, paths):
    def convert(row):
        messages = row["conversations"]
        # As in the official reader: an answer may follow an answer, but the first message is the human's.
        if messages[0]["from"] != "human":
            messages = messages[1:]
        # Here "<image>" is a word that people write about.
        said = ((_ROLES[said["from"]], _text(said["value"]).replace("<image>", "image")) for said in messages)
        return None, _dialogue(said)

    yield from _records(name, stream_json(paths[0]), convert)


def _read_pairs(name: str, root: str, paths: list[str]) -> Iterator[dict]:
    """The samples of webdataset tars."""

    def pair(files: dict[str, tuple[str, bytes]]) -> dict:
        path, image = files.get("jpg", (None, None))
        try:
            caption = files["txt"][1].decode()
        except (KeyError, UnicodeDecodeError):
            caption = None
        return {
            "dataset": name,
            "task": DATASETS[name].task,
            "image": None if image is None else {"path": path, "bytes": image},
            "turns": [] if caption is None else [_turn(answer=caption)],
        }

    for path in paths:
        yield from map(pair, stream_tar(path, ("jpg", "txt").__contains__))


@dataclass(frozen=True)
class Entry:
    """A dataset of the catalogue.

    Args:
        task: what `per-task` balances, and by what a question is worded.
        files: that its authors publish, below the data root, in the order in which `read` wants them; a pattern for shards.
        read: (name, root, paths of the files) -> records.
        weight: in the official fine-tuning mixture (short schedule); None for a dataset that is not in it.
    """

    task: str
    files: tuple[str, ...]
    read: Callable[[str, str, list[str]], Iterator[dict]]
    weight: float | None = None


# The tables list the datasets in this order, and one_dataset_per_task takes the first of each task. The weights sum to
# 1.003 and are normalised when they are used.
DATASETS = {
    # Captions of web images.
    "coyo": Entry("captioning", ("coyo/coyo100m/*.tar",), _read_pairs, 0.077),
    # BlipCapFilt: captions of CC3M, CC12M, SBU and LAION images.
    "blip": Entry("captioning", ("BLIP/blip_cc_sbu/*.tar", "BLIP/blip_laion/*.tar"), _read_pairs),
    # Training split, a record for each question.
    "vqav2": Entry(
        "vqa-open",
        ("VQAv2/v2_OpenEnded_mscoco_train2014_questions.json", "VQAv2/v2_mscoco_train2014_annotations.json"),
        _read_vqav2,
        0.103,
    ),
    # Balanced training questions, a record for each.
    "gqa": Entry("vqa-open", ("GQA/annotations/train_balanced_questions_minimal.json",), _read_gqa, 0.103),
    # Split 1, a record for each book cover.
    "ocrvqa": Entry("vqa-open", ("OCRVQA/dataset.json",), _read_ocrvqa, 0.051),
    # Visual Spatial Reasoning, random split: statements as yes-no questions.
    "vsr": Entry("vqa-open", ("VSR/random/train.jsonl",), _read_vsr, 0.026),
    # ScienceQA in LLaVA's conversion, questions with and without an image.
    "sqa": Entry("vqa-multiple-choice", ("ScienceQA/llava_train_QCM-LEPA.json",), _read_sqa, 0.051),
    "aokvqa": Entry("vqa-multiple-choice", ("A-OKVQA/aokvqa_v1p0_train.json",), _read_aokvqa, 0.103),
    # These three as MDETR prepared them.
    "refcoco": Entry(
        "referring-expression", ("refcoco/annotations/finetune_refcoco_train.json",), _read_refcoco, 0.103
    ),
    "refcoco_plus": Entry(
        "referring-expression", ("refcoco/annotations/finetune_refcoco+_train.json",), _read_refcoco, 0.103
    ),
    "refcocog": Entry(
        "referring-expression", ("refcoco/annotations/finetune_refcocog_train.json",), _read_refcoco, 0.103
    ),
    # Visual Genome, a record for each region.
    "vg": Entry(
        "referring-expression",
        ("VisualGenome/metadata/image_data.json", "VisualGenome/metadata/region_descriptions.json"),
        _read_vg,
        0.051,
    ),
    # "<image>" in a question is where the image stands.
    "llava150k": Entry(
        "visual-instruction",
        (
            "llava_instruct_150k/complex_reasoning_77k.json",
            "llava_instruct_150k/conversation_58k.json",
            "llava_instruct_150k/detail_23k.json",
        ),
        _read_llava150k,
        0.103,
    ),
    # The 40,000 conversations of LLaVA 1.5.
    "sharegpt": Entry("text-instruction", ("Vicuna/llava_v1_5_sharegpt40k.json",), _read_sharegpt, 0.026),
}
TASKS = tuple(dict.fromkeys(dataset.task for dataset in DATASETS.values()))


def annotation_files(name: str, root: str) -> list[str]:
    """Paths of the files that a dataset is read from, shards expanded, in reading order.

    Raises:
        ValueError: no such dataset.
        FileNotFoundError: every path that is missing, at once.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} has no reader; there are {', '.join(DATASETS)}")
    paths, missing = [], []
    for pattern in DATASETS[name].files:
        path = os.path.join(root, pattern)
        if is_pattern(pattern):
            found = sorted(glob(os.path.join(escape(root), pattern)))
        else:
            found = [path] if os.path.isfile(path) else []
        paths += found
        if not found:
            missing.append(path)
    if missing:
        raise FileNotFoundError(
            f"dataset {name!r} lacks {', '.join(missing)}; put the files there, correct the data root {root!r}, or leave "
            "the dataset out"
        )
    return paths
