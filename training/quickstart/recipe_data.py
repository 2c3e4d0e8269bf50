# SPDX-License-Identifier: Apache-2.0
"""Digit scenes in the formats of the paper's datasets: small files to try a recipe on, without a download."""

import io
import json
import tarfile
from pathlib import Path

import yaml
from PIL import Image

from training.quickstart.digit_scenes import CELL_NAMES, DIGIT_WORDS, GRID, SceneMaker, caption

SIDE = 256  # pixels of a saved scene
DATASETS = ["coyo", "vqav2", "gqa", "vsr", "aokvqa", "refcoco", "llava150k", "sharegpt"]


def write_recipe_data(folder: str, scenes: int = 48, seed: int = 0) -> str:
    """Writes images, annotations and a `recipe.yaml` for them, the same every time; returns the path of the recipe."""
    root = Path(folder)
    maker = SceneMaker("train", seed)
    drawn = [maker.scene() for _ in range(scenes)]
    images = [scene.image.resize((SIDE, SIDE), Image.Resampling.NEAREST) for scene in drawn]
    contents = [scene.contents for scene in drawn]
    for path, names in {
        "VQAv2/images": [f"COCO_train2014_{i:012}.jpg" for i in range(scenes)],
        "GQA/images": [f"{i}.jpg" for i in range(scenes)],
        "VSR/images/train2017": [f"{i:012}.jpg" for i in range(scenes)],
        "opensets_coco/images/train2017": [f"{i:012}.jpg" for i in range(scenes)],
        "opensets_coco/images/train2014": [f"COCO_train2014_{i:012}.jpg" for i in range(scenes)],
    }.items():
        (root / path).mkdir(parents=True, exist_ok=True)
        for name, image in zip(names, images):
            image.save(root / path / name, quality=90)

    _write_tar(root / "coyo/coyo100m/00000.tar", images, list(map(caption, contents)))
    asked = [(i, *maker.question(scene)[1:]) for i, scene in enumerate(contents) for _ in range(3)]
    ids = [{"image_id": i, "question_id": key} for key, (i, _, _) in enumerate(asked)]
    questions = [{**own, "question": question} for own, (_, question, _) in zip(ids, asked)]
    answers = [{**own, "multiple_choice_answer": answer} for own, (_, _, answer) in zip(ids, asked)]
    _write(root / "VQAv2/v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions})
    _write(root / "VQAv2/v2_mscoco_train2014_annotations.json", {"annotations": answers})
    exist = [(i, *maker.question(scene, "exist")[1:]) for i, scene in enumerate(contents) for _ in range(4)]
    rows = {str(key): {"imageId": str(i), "question": q, "answer": a} for key, (i, q, a) in enumerate(exist)}
    _write(root / "GQA/annotations/train_balanced_questions_minimal.json", rows)
    _write(root / "VSR/random/train.jsonl", *map(_statement, range(scenes), contents))
    _write(root / "A-OKVQA/aokvqa_v1p0_train.json", [_choice(i, scene, maker) for i, scene in enumerate(contents)])
    boxes = [_region(i, scene) for i, scene in enumerate(contents)]
    regions = {"images": [image for image, _ in boxes], "annotations": [annotation for _, annotation in boxes]}
    _write(root / "refcoco/annotations/finetune_refcoco_train.json", regions)
    chats = [_chat(i, scene, maker) for i, scene in enumerate(contents)]
    for name, part in (
        ("complex_reasoning_77k", chats[::3]),
        ("conversation_58k", chats[1::3]),
        ("detail_23k", chats[2::3]),
    ):
        _write(root / f"llava_instruct_150k/{name}.json", part)
    _write(root / "Vicuna/llava_v1_5_sharegpt40k.json", [_sum(i) for i in range(scenes)])

    settings = {"data_root": str(root), "datasets": DATASETS, "turns": {"max_turns": {"vqav2": 10, "gqa": 10}}}
    run = {"max_steps": 100, "per_device_train_batch_size": 16, "mixture": settings}
    (root / "recipe.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    return str(root / "recipe.yaml")


def _write(path: Path, *rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def _write_tar(path: Path, images: list[Image.Image], captions: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, (image, text) in enumerate(zip(images, captions)):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=90)
            for extension, data in (("jpg", buffer.getvalue()), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{number:06}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _digits(contents: list[int | None]) -> list[tuple[int, str]]:
    """(cell, word) of the digits that a scene has once, or of all where none is unique."""
    filled = [(cell, digit) for cell, digit in enumerate(contents) if digit is not None]
    unique = [(cell, digit) for cell, digit in filled if contents.count(digit) == 1] or filled
    return [(cell, DIGIT_WORDS[digit]) for cell, digit in unique]


def _statement(i: int, contents: list[int | None]) -> dict:
    (first, one), (second, other) = (_digits(contents) * 2)[:2]
    relation = ("left of", "above")[i % 2]
    place = [cell % GRID if relation == "left of" else cell // GRID for cell in (first, second)]
    return {
        "image_link": f"http://images.cocodataset.org/train2017/{i:012}.jpg",
        "caption": f"The {one} is {relation} the {other}.",
        "label": int(place[0] < place[1]),
    }


def _choice(i: int, contents: list[int | None], maker: SceneMaker) -> dict:
    cell, word = maker.random.choice(_digits(contents))
    choices = maker.random.sample([name for name in CELL_NAMES if name != CELL_NAMES[cell]], 3)
    correct = maker.random.randrange(4)
    choices.insert(correct, CELL_NAMES[cell])
    return {"image_id": i, "question": f"Where is the {word}?", "choices": choices, "correct_choice_idx": correct}


def _region(i: int, contents: list[int | None]) -> tuple[dict, dict]:
    cell, word = _digits(contents)[0]
    side = SIDE / GRID
    name = f"COCO_train2014_{i:012}.jpg"
    image = {"id": i, "original_id": i, "file_name": name, "width": SIDE, "height": SIDE, "caption": f"the {word}"}
    return image, {"image_id": i, "bbox": [cell % GRID * side, cell // GRID * side, side, side]}


def _chat(i: int, contents: list[int | None], maker: SceneMaker) -> dict:
    _, question, answer = maker.question(contents)
    said = [
        ("human", "<image>\nDescribe what you see."),
        ("gpt", f"A black picture with handwritten digits: {caption(contents).replace(' ,', ',')}."),
        ("human", question),
        ("gpt", answer),
    ]
    return {
        "id": str(i),
        "image": f"{i:012}.jpg",
        "conversations": [{"from": who, "value": text} for who, text in said],
    }


def _sum(i: int) -> dict:
    first, second = i % 7, i % 3
    said = [
        ("human", f"What is {DIGIT_WORDS[first]} plus {DIGIT_WORDS[second]}?"),
        ("gpt", f"{DIGIT_WORDS[first]} plus {DIGIT_WORDS[second]} is {DIGIT_WORDS[first + second]}."),
    ]
    return {"id": str(i), "conversations": [{"from": who, "value": text} for who, text in said]}
