# SPDX-License-Identifier: Apache-2.0
"""Benchmarks as lists of questions, read from the files that their authors distribute.

A data root has one folder for each benchmark, named as in `FOLDERS`. In a folder are the original files, or the parquet
files of its copy on the Hub (the repository that `FOLDERS` names), in any subfolder.

Every reader takes the root and returns `Question`s in the benchmark's order. Their `fields` are the ones that the
official code keeps beside a prediction.
"""

import ast
import base64
import json
import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas

from evaluation.prompts import Question, with_options
from evaluation.scorers import MME_SUBSETS, POPE_CATEGORIES

# task -> folder below the data root, repository on the Hub with the same questions as parquet files
FOLDERS = {
    "mme": ("MME", "lmms-lab/MME"),
    "pope": ("POPE", "lmms-lab/POPE"),
    "mmbench": ("MMBench", "lmms-lab/MMBench_EN"),
    "scienceqa": ("ScienceQA", "derek-thomas/ScienceQA"),
    "seed": ("SEED-Bench", "lmms-lab/SEED-Bench"),
    "mmmu": ("mmmu", "MMMU/MMMU"),
    "llava_w": ("llava-bench-in-the-wild", "lmms-lab/llava-bench-in-the-wild"),
    "mm_vet": ("mm_vet", "lmms-lab/MMVet"),
    "owl": ("OwlEval", None),
}

SEED_TYPES = {
    1: "Scene Understanding", 2: "Instance Identity", 3: "Instance Attribute", 4: "Instance Location",
    5: "Instances Counting", 6: "Spatial Relation", 7: "Instance Interaction", 8: "Visual Reasoning",
    9: "Text Recognition",
}  # fmt: skip
LAST_IMAGE_TYPE = 9  # SEED-Bench's later types are about videos
LETTERS = string.ascii_uppercase


def _json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error


def _json_lines(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}); download the file again") from error
    return rows


def _files(root: Path, task: str, *names: str) -> list[Path] | None:
    """The original files if all of them are there, None if there are parquet files instead.

    Raises:
        ValueError: neither.
    """
    folder, hub = FOLDERS[task]
    paths = [root / folder / name for name in names]
    if all(path.exists() for path in paths):
        return paths
    if hub and (root / folder).is_dir() and next((root / folder).rglob("*.parquet"), None):
        return None
    missing = next(path for path in paths if not path.exists())
    raise ValueError(
        f"{task}: {missing} does not exist; put the benchmark's own files there"
        + (f", or the parquet files of {hub} anywhere in {root / folder}" if hub else "")
    )


def _parquet_rows(root: Path, task: str, only: str = "") -> Iterator[tuple[dict, Callable | None]]:
    """(row without its images, function that decodes its image or None) of a benchmark's parquet files.

    Args:
        only: pattern of the paths to read below the folder, where any path has it.
    """
    from datasets import Dataset, List
    from datasets import Image as ImageFeature
    from datasets.exceptions import DatasetGenerationError

    folder = root / FOLDERS[task][0]
    files = sorted(folder.rglob("*.parquet"))
    chosen = [path for path in files if re.search(only, path.relative_to(folder).as_posix())] or files
    try:
        table = Dataset.from_parquet([str(path) for path in chosen])
    except (DatasetGenerationError, OSError, ValueError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"the parquet files in {folder} cannot be read ({reason}); download them again") from error
    column = "image" if "image" in table.column_names else "image_1"
    if column not in table.column_names:
        raise ValueError(f"{chosen[0]} has no column image; its columns are {', '.join(table.column_names)}")
    several = isinstance(table.features[column], (list, List))
    # The bytes of an image are read when its question is asked; here only a mask of the missing ones.
    feature = ImageFeature(decode=False)
    images = table.select_columns([column]).cast_column(column, List(feature) if several else feature)
    present = table.data.column(column).is_valid().to_pylist()

    def decoder(number: int) -> Callable:
        def decode():
            from processing import open_image  # loads for seconds, and saved answers are scored without it

            value = images[number][column]
            return open_image(value[0] if several else value)

        return decode

    questions = table.remove_columns([n for n in table.column_names if re.fullmatch(r"image(_\d+)?", n)])
    for number, row in enumerate(questions):
        yield row, decoder(number) if present[number] else None


def read_mme(root: Path) -> list[Question]:
    folder = root / FOLDERS["mme"][0]
    subsets = [name for names in MME_SUBSETS.values() for name in names]
    questions = []

    def add(subset, image_id, number, text, answer, path, image):
        fields = {"question": text, "answer": answer, "image_path": path, "image_id": image_id, "dataset_name": subset}
        questions.append(Question(f"{subset}/{image_id}/{number}", "short", text, fields, image))

    if not any((folder / name).is_dir() for name in subsets) and _files(root, "mme", subsets[0]) is None:
        counts = {}
        for row, image in _parquet_rows(root, "mme"):
            image_id = row["question_id"].split("/")[-1]
            key = (row["category"], image_id)
            counts[key] = counts.get(key, -1) + 1
            add(*key, counts[key], row["question"], row["answer"], row["question_id"], image)
        return questions
    for subset in subsets:
        texts = folder / subset
        if (texts / "questions_answers_YN").is_dir():
            texts = texts / "questions_answers_YN"
        images = folder / subset / "images" if (folder / subset / "images").is_dir() else folder / subset
        for path in sorted(texts.glob("*.txt")):
            image = next(
                (images / (path.stem + end) for end in (".jpg", ".png") if (images / (path.stem + end)).exists()), None
            )
            image = image or images / f"{path.stem}.jpg"
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            for number, line in enumerate(lines):
                text, tab, answer = line.strip().partition("\t")
                if not tab or answer.strip().lower() not in ("yes", "no"):
                    raise ValueError(
                        f"{path}: {line!r} is not a question, a tab, and Yes or No; download the file again"
                    )
                add(subset, image.name, number, text, answer.strip(), str(image), str(image))
    return questions


def read_pope(root: Path) -> list[Question]:
    folder = root / FOLDERS["pope"][0]
    questions = []

    def add(category, key, text, answer, path, image):
        fields = {"question": text, "answer": answer, "image_path": path, "category": category}
        questions.append(Question(f"{category}/{key}", "short", text, fields, image))

    home = next((d for d in ("old_coco", "coco", "output/coco") if (folder / d).is_dir()), "old_coco")
    files = _files(root, "pope", *(f"{home}/coco_pope_{category}.json" for category in POPE_CATEGORIES))
    if files is None:
        for row, image in _parquet_rows(root, "pope", only="^Full/"):
            add(row["category"], row["question_id"], row["question"], row["answer"], row["image_source"], image)
        return questions
    for category, path in zip(POPE_CATEGORIES, files):
        for row in _json_lines(path):
            image = str(root / "opensets_coco" / "images" / "val2014" / row["image"])
            add(category, row["question_id"], row["text"], row["label"], image, image)
    return questions


def _decoder_of_base64(text: str) -> Callable:
    def decode():
        from processing import open_image

        return open_image(base64.b64decode(text))

    return decode


def read_mmbench(root: Path) -> list[Question]:
    folder = root / FOLDERS["mmbench"][0]
    names = sorted(path.name for path in folder.glob("*.tsv") if re.search("dev(?!.*cn)", path.name.lower()))
    if len(names) > 1:
        raise ValueError(f"{folder} has several dev files ({', '.join(names)}); leave the one to be used")
    files = _files(root, "mmbench", *(names or ["mmbench_dev_20230712.tsv"]))
    if files is None:
        rows = list(_parquet_rows(root, "mmbench", only=r"(^|en/|data/)dev"))
    else:
        # pandas, like the official code: "N/A", "None" and the like are missing values in it.
        try:
            table = pandas.read_csv(files[0], sep="\t")
        except (pandas.errors.EmptyDataError, pandas.errors.ParserError) as error:
            raise ValueError(f"{files[0]} cannot be read ({error}); download it again") from error
        rows = [({k: None if pandas.isna(v) else v for k, v in row.items()}, None) for row in table.to_dict("records")]
        pictures = {row["index"]: str(row["image"]) for row, _ in rows}
        # Later releases give a rotation the index of its first question instead of the same picture again.
        pictures = {k: pictures.get(int(v), v) if len(v) < 20 and v.isdigit() else v for k, v in pictures.items()}
        rows = [(row, _decoder_of_base64(pictures[row["index"]])) for row, _ in rows]
    questions = []
    for row, image in rows:

        def text_of(name, row=row):
            value = row.get(name)
            return "N/A" if value is None or value == "" or value == "nan" else str(value)

        options = {letter: text_of(letter) for letter in "ABCDE"}
        fields = {
            "question": row["question"],
            "hint": text_of("hint"),
            "index": int(row["index"]),
            "answer": row["answer"],
            "category": row["category"],
            "l2_category": row.get("l2-category") or row.get("L2-category"),
            "options_dict": options,
        }
        text = with_options(fields["question"], options, fields["hint"])
        questions.append(Question(str(fields["index"]), "choice", text, fields, image))
    return questions


def _scienceqa_parts(text: str) -> tuple[str, str, list[str], list[str]]:
    """(question, context, choices, choices as the prompt shows them) of LLaVA's form.

    A letter in brackets opens a choice only when it is the next one. In the official prompt every letter in brackets
    does, so "(A) vitamin (B)" is shown as more choices than there are; the answer's letter still counts the true ones.
    """
    question, _, rest = text.removeprefix("<image>\n").partition("\nContext: ")
    context, _, tail = rest.partition("\nOptions: ")
    tail = tail.replace("<image>", "").strip()
    shown = [part.strip() for part in re.split(r"\([A-Z]\)", tail) if part.strip()]
    choices, at = [], 0
    while (start := tail.find(f"({LETTERS[len(choices)]}) ", at)) >= 0:
        if choices:
            choices[-1] = tail[at:start].strip()
        choices.append("")
        at = start + 4
    if choices:
        choices[-1] = tail[at:].strip()
    return question, context, choices, shown


def read_scienceqa(root: Path) -> list[Question]:
    folder = root / FOLDERS["scienceqa"][0]
    questions = []

    def add(key, raw, question, context, choices, shown, answer, path, image, lecture, solution):
        fields = {
            "question": raw,
            "question_id": key,
            "image_path": path,
            "lecture": lecture,
            "solution": solution,
            "answer": LETTERS[answer],
            "answer_index": answer,
            "choices": choices,
        }
        text = with_options(question, dict(zip(LETTERS, shown)), context)
        questions.append(Question(key, "choice", text, fields, image))

    def add_original(key, row, path, image):
        add(
            key, row["question"], row["question"], (row.get("hint") or "").replace("\n", " ") or "N/A", row["choices"],
            row["choices"], row["answer"], path, image, row.get("lecture") or None, row.get("solution") or None,
        )  # fmt: skip

    def path_of(key, name):
        path = folder / "images" / "test" / key / name
        return str(path if path.exists() or not (folder / "test").is_dir() else folder / "test" / key / name)

    if not (folder / "llava_test_QCM-LEPA.json").exists() and (folder / "problems.json").exists():
        problems = _json(folder / "problems.json")
        splits = folder / "pid_splits.json"
        for key in _json(splits)["test"] if splits.exists() else problems:
            row = problems[key]
            path = path_of(key, row["image"]) if row.get("image") else None
            add_original(key, row, path or "None", path)
        return questions
    files = _files(root, "scienceqa", "llava_test_QCM-LEPA.json")
    if files is None:
        for number, (row, image) in enumerate(_parquet_rows(root, "scienceqa", only="test")):
            add_original(str(number), row, f"row {number}" if image else "None", image)
        return questions
    for row in _json(files[0]):
        raw, told = (row["conversations"][i]["value"] for i in (0, 1))
        question, context, choices, shown = _scienceqa_parts(raw)
        letter = re.search(r"ANSWER: ([A-Z])", told)
        if not letter or LETTERS.index(letter[1]) >= len(choices):
            raise ValueError(f"{files[0]}, id {row['id']!r}: {told[-40:]!r} names none of its {len(choices)} choices")
        lecture = re.search(r"LECTURE: (.*?)(?=SOLUTION: |###|$)", told, re.DOTALL)
        solution = re.search(r"SOLUTION: (.*?)(?=###|$)", told, re.DOTALL)
        path = str(folder / "images" / "test" / row["image"]) if row.get("image") else None
        add(
            str(row["id"]), raw, question, context, choices, shown, LETTERS.index(letter[1]), path or "None", path,
            lecture and lecture[1], solution and solution[1],
        )  # fmt: skip
    return questions


def read_seed(root: Path) -> list[Question]:
    folder = root / FOLDERS["seed"][0]
    files = _files(root, "seed", "SEED-Bench.json")
    if files is None:
        rows = (
            (row, "", image)
            for row, image in _parquet_rows(root, "seed")
            if row["data_type"] == "image" and int(row["question_type_id"]) <= LAST_IMAGE_TYPE
        )
        names = SEED_TYPES
    else:
        data = _json(files[0])
        names = {number: name for name, number in data["question_type"].items()}
        paths = ((row, str(folder / "SEED-Bench-image" / row["data_id"])) for row in data["questions"])
        rows = ((row, path, path) for row, path in paths if row["question_type_id"] <= LAST_IMAGE_TYPE)
    questions = []
    for row, path, image in rows:
        choices = [row[f"choice_{letter}"] for letter in "abcd"]
        kind = int(row["question_type_id"])
        fields = {
            "question": row["question"],
            "answer": row["answer"],
            "choices": choices,
            "image_path": path,
            "question_id": row["question_id"],
            "question_type_id": kind,
            "question_type": names[kind],
        }
        text = with_options(row["question"], dict(zip(LETTERS, choices)))
        questions.append(Question(str(row["question_id"]), "choice", text, fields, image))
    return questions


def read_mmmu(root: Path) -> list[Question]:
    folder = root / FOLDERS["mmmu"][0]
    files = _files(root, "mmmu", "validation.json")
    if files is None:
        rows = list(_parquet_rows(root, "mmmu", only="validation|dev_?val"))
    else:
        rows = [(row, str(folder / "images" / row["image_1"])) for row in _json(files[0])]
    questions = []
    for row, image in rows:
        options = row["options"] if isinstance(row["options"], list) else ast.literal_eval(row["options"])
        several = row["question_type"] == "multiple-choice"  # an open question may have options, which are not shown
        choices = dict(zip(LETTERS, options)) if several else {}
        text = with_options(row["question"], choices) if several else row["question"]
        fields = {
            "question": text,
            "answer": row["answer"],
            "question_type": row["question_type"],
            "all_choices": list(choices),
            "num_option_images": 0,  # the official reader looks for images in the options' single characters: never any
        }
        questions.append(Question(row["id"], "choice" if several else "short", text, fields, image))
    return questions


def read_llava_w(root: Path) -> list[Question]:
    folder = root / FOLDERS["llava_w"][0]
    files = _files(root, "llava_w", "questions.jsonl")
    questions = []

    def add(row, text, image, context, reference):
        fields = {
            "index": len(questions),
            "question": text,
            "category": row["category"],
            "question_id": row["question_id"],
        }
        if context is not None and reference is not None:  # what a judge needs
            fields.update(context=context, reference=reference)
        questions.append(Question(str(row["question_id"]), "free", text, fields, image))

    if files is None:
        for row, image in _parquet_rows(root, "llava_w"):
            add(row, row["question"], image, row.get("caption"), row.get("gpt_answer"))
        return questions
    context, answers = folder / "context.jsonl", folder / "answers_gpt4.jsonl"
    captions = {row["image"]: row["caption"] for row in _json_lines(context)} if context.exists() else {}
    references = {row["question_id"]: row["text"] for row in _json_lines(answers)} if answers.exists() else {}
    for row in _json_lines(files[0]):
        image = str(folder / "images" / row["image"])
        add(row, row["text"], image, captions.get(row["image"]), references.get(row["question_id"]))
    return questions


def read_mm_vet(root: Path) -> list[Question]:
    folder = root / FOLDERS["mm_vet"][0]
    files = _files(root, "mm_vet", "mm-vet.json")
    if files is None:
        rows = [
            (row["question_id"], {**row, "capability": [c.strip() for c in row["capability"].split(",")]}, image)
            for row, image in _parquet_rows(root, "mm_vet")
        ]
    else:
        rows = [(k, row, str(folder / "images" / row["imagename"])) for k, row in _json(files[0]).items()]
    questions = []
    for number, (key, row, image) in enumerate(rows):
        fields = {
            "index": number,
            "question": row["question"],
            "question_id": key,
            "answer": row["answer"],
            "capability": row.get("capability", []),
        }
        questions.append(Question(key, "free", row["question"], fields, image))
    return questions


def read_owl(root: Path) -> list[Question]:
    folder = root / FOLDERS["owl"][0]
    questions = []
    for row in _json_lines(_files(root, "owl", "questions.jsonl")[0]):
        fields = {"question": row["question"], "question_id": row["question_id"], "image_path": row["image"]}
        image = str(folder / "images" / row["image"])
        questions.append(Question(str(row["question_id"]), "free", row["question"], fields, image))
    return questions


READERS = {
    "mme": read_mme,
    "pope": read_pope,
    "mmbench": read_mmbench,
    "scienceqa": read_scienceqa,
    "seed": read_seed,
    "mmmu": read_mmmu,
    "llava_w": read_llava_w,
    "mm_vet": read_mm_vet,
    "owl": read_owl,
}


def read_task(task: str, root: str | Path) -> list[Question]:
    """The questions of a task, checked: there are some, no id stands twice, and every image file exists.

    Raises:
        ValueError: names what is wrong and what to do.
    """
    folder = Path(root) / FOLDERS[task][0]
    try:
        questions = READERS[task](Path(root))
    except KeyError as error:
        raise ValueError(f"{task}: a record in {folder} has no field {error}; download it again") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{task}: {folder} is not in the benchmark's layout ({error}); download it again") from error
    if not questions:
        raise ValueError(f"{task}: {folder} has no questions; download the benchmark again")
    seen = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"{task}: the question id {question.id!r} stands twice in {root}; remove one of the two")
        seen.add(question.id)
    missing = [q for q in questions if isinstance(q.image, str) and not Path(q.image).is_file()]
    if missing:
        raise ValueError(
            f"{task}: the image {missing[0].image} of question {missing[0].id!r} does not exist ({len(missing)} images of "
            f"{len(questions)} questions are missing); download the benchmark's images to that folder"
        )
    return questions
