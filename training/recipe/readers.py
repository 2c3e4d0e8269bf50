# SPDX-License-Identifier: Apache-2.0
"""Annotation files become records: what a sample says, before any wording.

A record is

    {"dataset": "gqa", "task": "vqa-open", "image": path or None, "turns": [turn, ...]}

and a turn has the fields of `TURN`, None where its task has no use for them:

    question, answer   vqa-open, and the two sides of a conversation (an answer None: the user speaks again or last;
                       a question None: the assistant speaks first); a caption is an answer
    options, context   vqa-multiple-choice; there the answer is the letter of the right one in the order of `options`
    phrase, bbox       referring-expression: "[x1,y1,x2,y2]" in parts of the image's width and height; VSR
                       keeps its caption as phrase

A row that cannot be understood is a record without turns, so that whoever reads it can count it. Sources: the files
that each dataset's authors publish, at the places of `files.FILES` below the data root.
"""

import hashlib
import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List, Value

from training.recipe.config import DATASETS as TASKS
from training.recipe.files import annotation_files
from training.recipe.json_stream import stream_json

logger = logging.getLogger(__name__)

_STRING = Value("string")
TURN = {
    "question": _STRING,
    "answer": _STRING,
    "options": List(_STRING),
    "context": _STRING,
    "phrase": _STRING,
    "bbox": _STRING,
}
FEATURES = Features({"dataset": _STRING, "task": _STRING, "image": _STRING, "turns": List(TURN)})
STREAMED_FEATURES = Features({**FEATURES, "image": Image(decode=False)})

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# What converting a row raises when the row does not have the fields, types and numbers that its format promises.
_MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError)

Converter = Callable[[object], tuple[str | None, list[dict]]]


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
        yield {"dataset": name, "task": TASKS[name], "image": image, "turns": turns}


_CODE = tuple(
    hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest()
    for name in ("readers.py", "json_stream.py", "turns.py")
)

# `datasets` takes most of a minute to encode a million rows of nested values one by one, and little for columns.
_BLOCK_ROWS = 1000
_BLOCK = Features(
    {"images": List(_STRING), "lengths": List(Value("int32")), **{name: List(kind) for name, kind in TURN.items()}}
)


def _generate_blocks(name: str, root: str, paths: tuple[str, ...], stamp: tuple) -> Iterator[dict]:
    records = GENERATORS[name](name, root, paths)
    started = False
    # One block at least: `datasets` refuses a dataset without any row, and its message names no file.
    while (block := list(islice(records, _BLOCK_ROWS))) or not started:
        started = True
        turns = [turn for record in block for turn in record["turns"]]
        yield {
            "images": [record["image"] for record in block],
            "lengths": [len(record["turns"]) for record in block],
            **{name: [turn[name] for turn in turns] for name in TURN},
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
            "task": pa.repeat(TASKS[name], count),
            "image": columns["images"],
            "turns": pa.ListArray.from_arrays(offsets, turns),
        }
    )


def _generate_vqav2(name, root, paths):
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


def _generate_gqa(name, root, paths):
    def convert(entry):
        _, row = entry
        image = os.path.join(root, "GQA/images", f"{row['imageId']}.jpg")
        return image, [_turn(question=_text(row["question"]), answer=_text(row["answer"]))]

    yield from _records(name, stream_json(paths[0]), convert)


def _generate_ocrvqa(name, root, paths):
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


def _generate_vsr(name, root, paths):
    def convert(line):
        row = json.loads(line)
        split, file_name = row["image_link"].split("/")[-2:]
        caption = _text(row["caption"])
        answer = {0: "no", 1: "yes"}[row["label"]]
        image = os.path.join(root, "VSR/images", split, file_name)
        return image, [_turn(question=as_question(caption), answer=answer, phrase=caption)]

    with open(paths[0], encoding="utf-8") as file:
        yield from _records(name, (line for line in file if line.strip()), convert)


def split_options(text: str) -> list[str]:
    """ScienceQA's "(A) one (B) two" as ["one", "two"].

    Markers count in the order of the letters, each the last one before the next, so that a "(B)" that an option speaks
    of makes no option.

    Raises:
        ValueError: no marker "(A)" at the beginning.
    """
    marks = [(match.start(), match.group(1)) for match in re.finditer(r"\(([A-Z])\)(?=\s*\S)", text)]
    if not marks or text[: marks[0][0]].strip() or marks[0][1] != "A":
        raise ValueError(f"options {text[:200]!r} do not begin with '(A)'")
    known = 0
    for _, letter in marks:
        known += known < len(LETTERS) and letter == LETTERS[known]
    starts, end = [], len(marks)
    for letter in reversed(LETTERS[1:known]):
        end = max(index for index in range(end) if marks[index][1] == letter)
        starts.insert(0, marks[end][0])
    starts.insert(0, marks[0][0])
    return [text[start + 3 : stop].strip() for start, stop in zip(starts, [*starts[1:], len(text)])]


_SCIENCEQA = re.compile(r"(?P<question>.*?)\nContext: (?P<context>.*)\nOptions: (?P<options>.*)", re.DOTALL)


def _generate_sqa(name, root, paths):
    def convert(row):
        asked, told = (_text(message["value"]) for message in row["conversations"][:2])
        parts = _SCIENCEQA.fullmatch(asked.removesuffix("\n<image>"))
        options = split_options(parts["options"])
        answer = re.findall(r"ANSWER: ([A-Z])", told)[-1]
        options[LETTERS.index(answer)]
        image = os.path.join(root, "ScienceQA/images/train", row["image"]) if row.get("image") else None
        return image, [_turn(question=parts["question"], context=parts["context"], options=options, answer=answer)]

    yield from _records(name, stream_json(paths[0]), convert)


def _generate_aokvqa(name, root, paths):
    def convert(row):
        options = [_text(choice) for choice in row["choices"]]
        correct = row["correct_choice_idx"]
        if not 0 <= correct < len(options):
            raise ValueError(f"correct_choice_idx={correct} of {len(options)} choices")
        image = os.path.join(root, "opensets_coco/images/train2017", f"{int(row['image_id']):012}.jpg")
        return image, [_turn(question=_text(row["question"]), options=options, answer=LETTERS[correct])]

    yield from _records(name, stream_json(paths[0]), convert)


def _generate_refcoco(name, root, paths):
    def convert(pair):
        image, annotation = pair
        if image["id"] != annotation["image_id"]:
            raise ValueError("images and annotations are not in the same order")
        path = os.path.join(root, "opensets_coco/images/train2014", image["file_name"])
        bbox = _box(*annotation["bbox"], image["width"], image["height"])
        return path, [_turn(phrase=_text(image["caption"]), bbox=bbox)]

    rows = zip_longest(stream_json(paths[0], "images"), stream_json(paths[0], "annotations"))
    yield from _records(name, rows, convert)


def _generate_vg(name, root, paths):
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


def _generate_llava150k(name, root, paths):
    def convert(row):
        image = os.path.join(root, "opensets_coco/images/train2017", row["image"])
        return image, _dialogue((_ROLES[said["from"]], _text(said["value"])) for said in row["conversations"])

    yield from _records(name, chain.from_iterable(map(stream_json, paths)), convert)


def _generate_sharegpt(name, root, paths):
    def convert(row):
        messages = row["conversations"]
        # As the official reader: a conversation may go on from an answer, but its first message is the human's.
        if messages[0]["from"] != "human":
            messages = messages[1:]
        # "<image>" is something that people write about here.
        said = ((_ROLES[said["from"]], _text(said["value"]).replace("<image>", "image")) for said in messages)
        return None, _dialogue(said)

    yield from _records(name, stream_json(paths[0]), convert)


def _generate_pairs(name: str, root: str, paths: list[str]) -> Iterator[dict]:
    """The samples of webdataset tars: neighbouring members whose names agree up to the first dot.

    `datasets` reads them too, but an undecodable member that nobody needs (img2dataset adds a .json) ends its stream.
    """

    def pair(files: dict[str, tuple[str, bytes]]) -> dict:
        path, image = files.get("jpg", (None, None))
        try:
            caption = files["txt"][1].decode()
        except (KeyError, UnicodeDecodeError):
            caption = None
        return {
            "dataset": name,
            "task": TASKS[name],
            "image": None if image is None else {"path": path, "bytes": image},
            "turns": [] if caption is None else [_turn(answer=caption)],
        }

    for tar_path in paths:
        key, files = None, {}
        try:
            with tarfile.open(tar_path, "r|*") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, base = os.path.split(member.name)
                    base, _, extension = base.partition(".")
                    if files and (folder, base) != key:
                        yield pair(files)
                        files = {}
                    key = folder, base
                    extension = extension.lower()
                    files[extension] = (
                        member.name,
                        tar.extractfile(member).read() if extension in ("jpg", "txt") else b"",
                    )
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            logger.warning("%s: %s; what is left of it is one malformed record", tar_path, error)
            files = {"": ("", b"")}
        if files:
            yield pair(files)


# By name, each called with (name, root, paths).
GENERATORS = {
    "coyo": _generate_pairs,  # captions of web images
    "blip": _generate_pairs,  # BlipCapFilt: captions of CC3M, CC12M, SBU and LAION images
    "vqav2": _generate_vqav2,  # training split, a record for each question
    "gqa": _generate_gqa,  # balanced training questions, a record for each
    "ocrvqa": _generate_ocrvqa,  # split 1, a record for each book cover
    "vsr": _generate_vsr,  # Visual Spatial Reasoning, random split: statements as yes-no questions
    "sqa": _generate_sqa,  # ScienceQA in LLaVA's conversion, questions with and without an image
    "aokvqa": _generate_aokvqa,  # multiple choice
    "refcoco": _generate_refcoco,  # these three as prepared by MDETR
    "refcoco_plus": _generate_refcoco,
    "refcocog": _generate_refcoco,
    "vg": _generate_vg,  # Visual Genome, a record for each region
    "llava150k": _generate_llava150k,  # "<image>" in a question is where the image stands
    "sharegpt": _generate_sharegpt,  # the 40,000 conversations of LLaVA 1.5
}


def read(name: str, root: str) -> Dataset | IterableDataset:
    """The records of a dataset below the data root: a stream of captions, anything else cached on disk."""
    paths = annotation_files(name, root)
    if TASKS[name] == "captioning":
        arguments = {"name": name, "root": root, "paths": paths}
        return IterableDataset.from_generator(GENERATORS[name], features=STREAMED_FEATURES, gen_kwargs=arguments)
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
