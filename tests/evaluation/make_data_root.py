# SPDX-License-Identifier: Apache-2.0
"""Writes small benchmarks of made-up questions in the layouts of the real ones.

python tests/evaluation/make_data_root.py FOLDER

The images are the quickstart's test scenes. MME and POPE ask what the quickstart's model was trained to answer, in its
words ("is there a two ?"); the other tasks have words that it has never seen.
"""

import base64
import functools
import io
import json
import random
import sys
from pathlib import Path

from PIL import Image

from training.quickstart.digit_scenes import DIGIT_WORDS, Scene, SceneMaker

MME_FLAT = ("existence", "count", "position", "color", "OCR", "commonsense_reasoning", "code_reasoning")
MME_NESTED = ("posters", "celebrity", "scene", "landmark", "artwork")
MME_OTHER = ("numerical_calculation", "text_translation")
SEED_TYPES = {
    "Scene Understanding": 1, "Instance Identity": 2, "Instance Attribute": 3, "Instance Location": 4,
    "Instances Counting": 5, "Spatial Relation": 6, "Instance Interaction": 7, "Visual Reasoning": 8,
    "Text Recognition": 9, "Action Recognition": 10,
}  # fmt: skip
MMBENCH = (
    ("spatial_relationship", "finegrained_perception (cross-instance)", ["left", "right", "above", "below"]),
    ("object_localization", "finegrained_perception (instance-level)", ["top", "bottom", "middle"]),
    ("physical_relation", "relation_reasoning", ["friend", "parent"]),
    ("image_topic", "coarse_perception", ["a cat", "a dog", "a bird", "a car"]),
)


@functools.cache
def maker() -> SceneMaker:
    return SceneMaker("test", 0)


def scene(seed: int) -> Scene:
    """Another one for every seed."""
    maker().random = random.Random(seed)
    return maker().scene()


def picture(seed: int) -> Image.Image:
    return scene(seed).image


def digit_question(seed: int, present: bool) -> str:
    """Whether a digit is in the scene of this seed, which it is, or is not."""
    contents = scene(seed).contents
    return f"is there a {next(w for i, w in enumerate(DIGIT_WORDS) if (i in contents) == present)} ?"


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, "PNG" if path.suffix == ".png" else "JPEG")


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_mme(root: Path) -> None:
    for number, name in enumerate((*MME_FLAT, *MME_NESTED, *MME_OTHER)):
        folder = root / "MME" / name
        nested = name in MME_NESTED
        for image in range(2):
            stem = f"{image + 1:04}"
            save(folder / ("images" if nested else "") / f"{stem}{'.jpg' if image else '.png'}", number * 10 + image)
            seed = number * 10 + image
            write(
                folder / ("questions_answers_YN" if nested else "") / f"{stem}.txt",
                f"{digit_question(seed, True)}\tYes\n{digit_question(seed, False)}\tNo\n",
            )


def make_pope(root: Path) -> None:
    for number in range(3):
        save(root / "opensets_coco" / "images" / "val2014" / f"COCO_val2014_{number:012}.jpg", number)
    for category in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": number + 1,
                "image": f"COCO_val2014_{number % 3:012}.jpg",
                "text": digit_question(number % 3, present=number >= 3),
                "label": "yes" if number >= 3 else "no",
            }
            for number in range(6)
        ]
        write(root / "POPE" / "old_coco" / f"coco_pope_{category}.json", lines(rows))


def make_mmbench(root: Path) -> None:
    header = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
        "split",
    ]
    rows = []
    for number, (category, parent, options) in enumerate(MMBENCH):
        data = io.BytesIO()
        picture(100 + number).save(data, "JPEG")
        text = base64.b64encode(data.getvalue()).decode()
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            cells = (turned + [""] * 4)[:4]
            answer = "ABCD"[turned.index(options[0])]
            hint = "A hint." if number == 3 else ""
            index = 200 + number + turn * 10**6
            rows.append(
                (index, f"What about {category}?", hint, *cells, answer, category, text, "made", parent, "", "dev")
            )
    rows.sort()
    write(
        root / "MMBench" / "mmbench_dev_20230712.tsv",
        "\n".join("\t".join(map(str, row)) for row in [header, *rows]) + "\n",
    )


def make_scienceqa(root: Path) -> None:
    rows = []
    for number in range(8):
        options = ["West Virginia", "Louisiana", "vitamin B", "Oklahoma"][: 2 + number % 3]
        listed = " ".join(f"({letter}) {option}" for letter, option in zip("ABCD", options))
        row = {"id": str(number)}
        question = (
            f"Which one is number {number}?\nContext: {'N/A' if number % 3 else 'Some context.'}\nOptions: {listed}"
        )
        if number % 2:
            row["image"] = f"{number}/image.png"
            save(root / "ScienceQA" / "images" / "test" / row["image"], 200 + number)
            question += "\n<image>"
        told = f"LECTURE: L.\nSOLUTION: S.\n###\nANSWER: {'ABCD'[number % len(options)]}."
        row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": told}]
        rows.append(row)
    write(root / "ScienceQA" / "llava_test_QCM-LEPA.json", rows)


def make_seed(root: Path) -> None:
    rows = []
    for number, (name, kind) in enumerate([*SEED_TYPES.items()] * 2):
        data_id = f"{number}_made" if kind < 10 else f"{number}.mp4"
        rows.append(
            {
                "answer": "ABCD"[number % 4],
                **{f"choice_{letter}": f"{name} {letter}" for letter in "abcd"},
                "data_id": data_id,
                "data_type": "image" if kind < 10 else "video",
                "question": f"What of {name}?",
                "question_id": str(1000 + number),
                "question_type_id": kind,
                "segment": [],
            }
        )
        if kind < 10:
            save(root / "SEED-Bench" / "SEED-Bench-image" / data_id, 300 + number)
    write(root / "SEED-Bench" / "SEED-Bench.json", {"questions": rows, "question_type": SEED_TYPES})


def make_mmmu(root: Path) -> None:
    rows = []
    for number, subject in enumerate(["Math", "Art_Theory", "Basic_Medical_Science", "Math", "Accounting"]):
        key = f"validation_{subject}_{number + 1}"
        is_open = number == 4
        save(root / "mmmu" / "images" / f"{key}__image_1.png", 400 + number)
        rows.append(
            {
                "id": key,
                "question": f"<image 1> What is number {number}?",
                "options": "[]" if is_open else str(["$1$", "it's 2", "3", "4"][: 2 + number % 3]),
                "image_1": f"{key}__image_1.png",
                "answer": "8" if is_open else "B",
                "question_type": "open" if is_open else "multiple-choice",
            }
        )
    write(root / "mmmu" / "validation.json", rows)


def make_llava_w(root: Path) -> None:
    folder = root / "llava-bench-in-the-wild"
    kinds = ("conv", "detail", "complex")
    names = [f"{number + 1:03}.jpg" for number in range(3)]
    for number, name in enumerate(names):
        save(folder / "images" / name, 500 + number)
    questions = [
        {"question_id": n, "image": names[n % 3], "text": f"What is thing {n}?", "category": kinds[n % 3]}
        for n in range(6)
    ]
    write(folder / "questions.jsonl", lines(questions))
    write(
        folder / "context.jsonl",
        lines({"id": name, "image": name, "caption": f"A picture of {name}."} for name in names),
    )
    write(
        folder / "answers_gpt4.jsonl",
        lines({"question_id": n, "text": f"It is thing {n}.", "answer_id": f"a{n}"} for n in range(6)),
    )


def make_mm_vet(root: Path) -> None:
    questions = {}
    for number in range(5):
        save(root / "mm_vet" / "images" / f"v1_{number}.png", 600 + number)
        questions[f"v1_{number}"] = {
            "imagename": f"v1_{number}.png",
            "question": f"What is x in equation {number}?",
            "answer": "-1<AND>-5",
            "imagesource": "",
            "capability": ["ocr", "math"] if number % 2 else ["rec"],
        }
    write(root / "mm_vet" / "mm-vet.json", questions)


def make_owl(root: Path) -> None:
    save(root / "OwlEval" / "images" / "1.png", 700)
    write(
        root / "OwlEval" / "questions.jsonl",
        lines([{"question_id": 1, "image": "1.png", "question": "What is funny?"}]),
    )


MAKERS = {
    "mme": make_mme,
    "pope": make_pope,
    "mmbench": make_mmbench,
    "scienceqa": make_scienceqa,
    "seed": make_seed,
    "mmmu": make_mmmu,
    "llava_w": make_llava_w,
    "mm_vet": make_mm_vet,
    "owl": make_owl,
}


def make_data_root(root: Path) -> Path:
    for maker in MAKERS.values():
        maker(root)
    return root


if __name__ == "__main__":
    print(make_data_root(Path(sys.argv[1])))
