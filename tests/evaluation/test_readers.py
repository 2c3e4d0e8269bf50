# SPDX-License-Identifier: Apache-2.0
"""Prompts of the official readers, text and token ids; the parquet form; and data that is not as it should be."""

import itertools
import json
import shutil

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from transformers import AutoTokenizer

from evaluation.prompts import Question, plain, render
from evaluation.task import read_task
from evaluation.tasks import TASKS
from processing import HoneybeeProcessor, prepare_tokenizer
from tests.evaluation.make_data_root import make_data_root
from tests.golden import GOLDEN, TOKENIZER
from tests.tiny import image_processor, tiny_processor

REFERENCE = json.loads((GOLDEN / "scorers" / "eval_prompts.json").read_text(encoding="utf-8"))
OFFICIAL_NAMES = {"llavabench": "llava_w", "mme_template_none": "mme"}
EXACT = {"image_path"}  # the official code writes it relative to its own working directory


@pytest.fixture(scope="module")
def tokenizer():
    return prepare_tokenizer(AutoTokenizer.from_pretrained(TOKENIZER))


@pytest.mark.parametrize("name", REFERENCE)
def test_official_prompts(name, tokenizer):
    reference = REFERENCE[name]
    task = OFFICIAL_NAMES.get(name, name)
    template = "none" if name.endswith("template_none") else "task"
    questions = read_task(TASKS[task], GOLDEN / "scorers" / "raw" / "data")[: len(reference["examples"])]
    assert len(questions) == len(reference["examples"])
    runs = [len(list(group)) for key, group in itertools.groupby(reference["batch"]["input_ids"][0]) if key == -1]
    processor = HoneybeeProcessor(image_processor(), tokenizer, num_image_tokens=runs[0])
    texts = [render(question, processor, template) for question in questions]
    for question, text, example in zip(questions, texts, reference["examples"]):
        assert plain(text, processor) == example["prompt"]
        assert (question.image is not None) == example["has_image"]
        fields = {"id": question.id, "prompt": plain(text, processor), **question.fields}
        for key in set(example["data"]) - EXACT:
            assert fields[key] == example["data"][key], key
    images = [q.image() if callable(q.image) else q.image for q in questions if q.image is not None]
    batch = processor(images=images, text=texts, add_special_tokens=False, padding=True, return_tensors="pt")
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, -1)
    assert ids.tolist() == reference["batch"]["input_ids"]
    assert batch["attention_mask"].tolist() == reference["batch"]["attention_mask"]
    assert batch["pixel_values"].shape[0] == reference["pixel_values_shape"][0]


def test_every_reader_has_a_reference():
    assert {OFFICIAL_NAMES.get(name, name) for name in REFERENCE} == set(TASKS)


# The parquet form ------------------------------------------------------------------------------------------------------


def opened(image) -> dict | None:
    if image is None:
        return None
    picture = image() if callable(image) else PILImage.open(image)
    return picture.convert("RGB")


def as_hub_rows(task: str, questions: list[Question], root) -> list[dict]:
    """The rows that the copy on the Hub has, made of the original files."""
    rows = []
    for number, question in enumerate(questions):
        fields = question.fields
        row = {"question": fields["question"], "image": opened(question.image)}
        if task == "mme":
            row.update(question_id=f"{fields['dataset_name']}/{fields['image_id']}", category=fields["dataset_name"])
            row["answer"] = fields["answer"]
        elif task == "pope":
            row.update(question_id=question.id.split("/")[1], category=fields["category"], answer=fields["answer"])
            row["image_source"] = fields["image_path"]
        elif task == "mmbench":
            row.update({k: v for k, v in fields.items() if k in ("index", "answer", "category")})
            row.update({k: "nan" if v == "N/A" else v for k, v in fields["options_dict"].items() if k != "E"})
            row.update(
                {"hint": "nan" if fields["hint"] == "N/A" else fields["hint"], "L2-category": fields["l2_category"]}
            )
        elif task == "scienceqa":
            question_text, context = fields["question"].split("\nOptions")[0].split("\nContext: ")
            row.update(question=question_text, hint="" if context == "N/A" else context, choices=fields["choices"])
            row.update(answer=fields["answer_index"], lecture="", solution="")
        elif task == "seed":
            row.update({f"choice_{k}": v for k, v in zip("abcd", fields["choices"])}, data_type="image", segment=None)
            row.update({k: str(fields[k]) for k in ("answer", "question_id")}, data_id=str(number))
            row.update(question_type_id=fields["question_type_id"], image=[row["image"]])
        elif task == "mmmu":
            raw = {r["id"]: r for r in json.loads((root / "mmmu" / "validation.json").read_text())}[question.id]
            row = {k: raw[k] for k in ("id", "question", "options", "answer", "question_type")}
            row.update(image_1=opened(question.image), image_2=None)
        elif task == "llava_w":
            row.update({k: fields[k] for k in ("question_id", "category")})
            row.update(caption=fields["context"], gpt_answer=fields["reference"], image_id="x")
        else:
            row.update(question_id=fields["question_id"], answer=fields["answer"], image_source="")
            row["capability"] = ",".join(fields["capability"])
        rows.append(row)
    return rows


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.hub])
def test_parquet_form_asks_the_same(task, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = make_data_root(tmp_path / "original")
    original = read_task(TASKS[task], root)
    rows = as_hub_rows(task, original, root)
    column = "image_1" if task == "mmmu" else "image"
    folder = tmp_path / "hub" / TASKS[task].folder / "data"
    folder.mkdir(parents=True)
    kinds = {int: Value("int64"), str: Value("string"), list: List(Value("string")), type(None): Value("string")}
    features = {
        key: kinds[type(next((r[key] for r in rows if r[key] is not None), None))] for key in rows[0] if key != column
    }
    features[column] = List(Image()) if task == "seed" else Image()
    half = len(rows) // 2
    split = {"mmbench": "dev", "mmmu": "validation"}.get(task, "test")
    for part, some in enumerate((rows[:half], rows[half:])):
        Dataset.from_list(some, features=Features(features)).to_parquet(
            str(folder / f"{split}-{part:05}-of-00002.parquet")
        )
    found = read_task(TASKS[task], tmp_path / "hub")
    processor = tiny_processor()
    assert [render(q, processor) for q in found] == [render(q, processor) for q in original]
    for ours, theirs in zip(found, original):
        assert (ours.image is None) == (theirs.image is None)
        if ours.image is not None:
            assert opened(ours.image).tobytes() == opened(theirs.image).tobytes()
        skip = {"image_path", "lecture", "solution", "question_id"} | ({"question"} if task == "scienceqa" else set())
        assert {k: v for k, v in ours.fields.items() if k not in skip} == {
            k: v for k, v in theirs.fields.items() if k not in skip
        }


# Other layouts ---------------------------------------------------------------------------------------------------------


def test_scienceqa_as_its_authors_distribute_it(tmp_path):
    folder = tmp_path / "ScienceQA"
    folder.mkdir()
    problems = {
        "7": {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "Two\nlines.", "image": "image.png"},
        "8": {"question": "Who?", "choices": ["x", "y", "z"], "answer": 0, "hint": "", "image": None},
        "9": {"question": "not asked", "choices": ["x"], "answer": 0, "hint": "", "image": None},
    }
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["7", "8"], "train": ["9"]}))
    first, second = TASKS["scienceqa"].read(TASKS["scienceqa"].data(tmp_path))
    assert first.text == "Which?\nContext: Two lines.\nThere are several options:\nA. a\nB. b\n"
    assert second.text == "Who?\nContext: N/A\nThere are several options:\nA. x\nB. y\nC. z\n"
    assert first.image.endswith("images/test/7/image.png") and second.image is None
    assert (first.fields["answer"], second.fields["choices"]) == ("B", ["x", "y", "z"])


def test_scienceqa_letters_inside_an_option(tmp_path):
    folder = tmp_path / "ScienceQA"
    folder.mkdir()
    question = "Q?\nContext: N/A\nOptions: (A) vitamin (B) is (D) (B) (A) again (C) last"
    row = {"id": 1, "conversations": [{"value": question}, {"value": "ANSWER: C."}]}
    (folder / "llava_test_QCM-LEPA.json").write_text(json.dumps([row]))
    (found,) = TASKS["scienceqa"].read(TASKS["scienceqa"].data(tmp_path))
    assert found.fields["choices"] == ["vitamin", "is (D) (B) (A) again", "last"]
    assert found.text.endswith("options:\nA. vitamin\nB. is\nC. again\nD. last\n")  # as the official prompt has it
    assert found.fields["lecture"] is None


def test_mmmu_open_question_with_options(tmp_path):
    folder = tmp_path / "mmmu"
    (folder / "images").mkdir(parents=True)
    row = {
        "id": "validation_Math_1",
        "question": "How many?",
        "options": "['1', '2']",
        "answer": "2",
        "image_1": "a.png",
    }
    (folder / "validation.json").write_text(json.dumps([{**row, "question_type": "open"}]))
    PILImage.new("RGB", (2, 2)).save(folder / "images" / "a.png")
    (found,) = read_task(TASKS["mmmu"], tmp_path)
    assert (found.kind, found.text, found.fields["all_choices"]) == ("short", "How many?", [])


def test_mmbench_pictures_by_reference(tmp_path):
    root = make_data_root(tmp_path)
    path = root / "MMBench" / "mmbench_dev_20230712.tsv"
    head, *rows = [line.split("\t") for line in path.read_text().splitlines()]
    before = [opened(q.image).tobytes() for q in read_task(TASKS["mmbench"], root)]
    column = head.index("image")
    for row in rows:
        if int(row[0]) > 10**6:
            row[column] = str(int(row[0]) % 10**6)
    path.write_text("\n".join("\t".join(row) for row in [head, *rows]) + "\n")
    assert [opened(q.image).tobytes() for q in read_task(TASKS["mmbench"], root)] == before


# Wrong data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data_root(tmp_path_factory.mktemp("data"))


def copy_of(data, task, tmp_path):  # with the COCO images, which POPE reads
    for name in {TASKS[task].folder, "opensets_coco"}:
        shutil.copytree(data / name, tmp_path / name, dirs_exist_ok=True)
    return tmp_path / TASKS[task].folder


@pytest.mark.parametrize("task", TASKS)
def test_missing_benchmark(task, tmp_path):
    with pytest.raises(
        ValueError, match=f"{task}: .*{TASKS[task].folder}.* does not exist; put the benchmark's own files"
    ):
        read_task(TASKS[task], tmp_path)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "mmbench"])
def test_missing_image(task, data, tmp_path):
    folder = copy_of(data, task, tmp_path)
    home = tmp_path / "opensets_coco" if task == "pope" else folder
    image = next(p for p in sorted(home.rglob("*")) if p.suffix in (".png", ".jpg") or p.name.endswith("_made"))
    image.unlink()
    with pytest.raises(
        ValueError, match=rf"{image.stem}.* of question .* does not exist .*; download the benchmark's images"
    ):
        read_task(TASKS[task], tmp_path)


def test_empty_and_broken_files(data, tmp_path):
    folder = copy_of(data, "seed", tmp_path)
    (folder / "SEED-Bench.json").write_text('{"questions": [], "question_type": {}}')
    with pytest.raises(ValueError, match="SEED-Bench has no questions; download"):
        read_task(TASKS["seed"], tmp_path)
    (folder / "SEED-Bench.json").write_text('{"questions": [')
    with pytest.raises(ValueError, match="SEED-Bench.json is not JSON"):
        read_task(TASKS["seed"], tmp_path)
    (folder / "SEED-Bench.json").write_text(
        '{"questions": [{"question_type_id": 1, "data_id": "x"}], "question_type": {"a": 1}}'
    )
    with pytest.raises(ValueError, match="has no field 'choice_a'"):
        read_task(TASKS["seed"], tmp_path)


def test_empty_tables(data, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = copy_of(data, "mmbench", tmp_path)
    (folder / "mmbench_dev_20230712.tsv").write_text("")
    with pytest.raises(ValueError, match="mmbench_dev_20230712.tsv cannot be read .*; download it again"):
        read_task(TASKS["mmbench"], tmp_path)
    (tmp_path / "mm_vet").mkdir()
    (tmp_path / "mm_vet" / "test.parquet").write_text("")
    with pytest.raises(ValueError, match="parquet files in .*mm_vet cannot be read .*; download them again"):
        read_task(TASKS["mm_vet"], tmp_path)


def test_duplicated_ids(data, tmp_path):
    folder = copy_of(data, "mm_vet", tmp_path)
    assert len(read_task(TASKS["mm_vet"], tmp_path)) == 5
    folder = copy_of(data, "llava_w", tmp_path)
    file = folder / "questions.jsonl"
    file.write_text(file.read_text() + file.read_text().splitlines()[2] + "\n")
    with pytest.raises(ValueError, match="question id '2' stands twice"):
        read_task(TASKS["llava_w"], tmp_path)
