# SPDX-License-Identifier: Apache-2.0
import json
import tarfile
from io import BytesIO

import pytest
import yaml
from datasets import Dataset, Image, IterableDataset, load_from_disk

from processing.lettered_options import split_options
from tests.tiny import picture
from training.conversations import load_conversations, normalize_conversation
from training.recipe.catalogue import DATASETS, TURN, Entry, annotation_files
from training.recipe.catalogue import as_question as question
from training.recipe.config import parse_recipe
from training.recipe.instructize import TEMPLATES
from training.recipe.json_stream import stream_json
from training.recipe.records import FEATURES, read
from training.recipe.sources import open_mixture
from training.recipe.turns import merge_turns

FILES = {name: dataset.files for name, dataset in DATASETS.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(root, name, document):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def turns(record) -> list[dict]:
    return [{field: value for field, value in turn.items() if value is not None} for turn in record["turns"]]


def test_every_dataset_has_a_reader_a_task_and_files():
    assert all(dataset.read and dataset.task and dataset.files for dataset in DATASETS.values())
    assert len(DATASETS) == 14


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("The cat is behind the laptop.", "Is the cat behind the laptop?"),
        ("This dish is near an island that is small.", "Is this dish near an island that is small?"),
        ("The dog is in the U.S. van", "Is the dog in the u?s? van?"),
    ],
)
def test_statements_become_questions(caption, expected):
    assert question(caption) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(A) one (B) two", ["one", "two"]),
        ("(A) vitamin (B) helps (B) no (C) neither", ["vitamin (B) helps", "no", "neither"]),
        ("(A) x (B) like (A) (C) z", ["x", "like (A)", "z"]),
        ("(A) x (B) y (D) z", ["x", "y (D) z"]),
        ("(A) only", ["only"]),
        ("(A) f(X) (B) g(X)", ["f(X)", "g(X)"]),
    ],
)
def test_options_follow_the_letters(text, expected):
    assert split_options(text) == expected


@pytest.mark.parametrize("text", ["", "one", "(B) x (A) y", "x (A) y"])
def test_options_without_a_beginning(text):
    with pytest.raises(ValueError):
        split_options(text)


def test_missing_files_are_all_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="questions.json, .*annotations.json; put the files there"):
        read("vqav2", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"blip_laion/\*\.tar"):
        read("blip", str(tmp_path))
    with pytest.raises(ValueError, match="'vqa' has no reader; there are coyo, blip"):
        annotation_files("vqa", str(tmp_path))


BROKEN = {
    "gqa": {"a": None, "b": {"imageId": 1, "question": "q"}, "c": {"imageId": 2, "question": "q", "answer": "a"}},
    "ocrvqa": {
        "a": {"imageURL": "x.jpg", "questions": ["q", "r"], "answers": ["a"], "split": 1},
        "b": 7,
        "c": {"imageURL": "x.jpg", "questions": ["q"], "answers": ["a"], "split": 1},
        "other split": {"imageURL": "x.jpg", "questions": ["q"], "answers": ["a"], "split": 3},
    },
    "vsr": '{"image_link": "u/train2017/1.jpg", "caption": "c", "label": 5}\n{"image\n\n'
    '{"image_link": "u/train2017/1.jpg", "caption": "A is b", "label": 1}\n',
    "sqa": [
        {"conversations": [{"value": "q\nContext: c\nOptions: (A) x"}, {"value": "ANSWER: B."}]},
        {"conversations": []},
        {"conversations": [{"value": "q\nContext: c\nOptions: (A) x (B) y"}, {"value": "ANSWER: B."}]},
    ],
    "aokvqa": [
        {"image_id": 1, "question": "q", "choices": ["a"], "correct_choice_idx": -1},
        {"image_id": 1, "question": "q", "choices": None, "correct_choice_idx": 0},
        {"image_id": 1, "question": "q", "choices": ["a"], "correct_choice_idx": 0},
    ],
    "refcocog": {
        "images": [
            {"file_name": "a", "height": 0, "width": 9, "id": 1, "caption": "c"},
            {"file_name": "a", "height": 9, "width": 9, "id": 5, "caption": "c"},
            {"file_name": "a", "height": 9, "width": 9, "id": 3, "caption": "c"},
        ],
        "annotations": [{"image_id": i, "bbox": [1, 2, 3, 4]} for i in (1, 2, 3)],
    },
    "llava150k": [
        {"conversations": [{"from": "human", "value": "q"}]},
        {"image": "a.jpg", "conversations": [{"from": "martian", "value": "q"}]},
        {"image": "a.jpg", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
    "sharegpt": [
        {"conversations": []},
        {"conversations": [{"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
}


@pytest.mark.parametrize("name", BROKEN)
def test_rows_that_cannot_be_understood_stay_as_records_without_turns(name, tmp_path):
    for file in FILES[name]:
        write(tmp_path, file, BROKEN[name] if file == FILES[name][0] else [])
    dataset = read(name, str(tmp_path))
    assert isinstance(dataset, Dataset) and dataset.features == FEATURES
    assert [len(record["turns"]) for record in dataset] == [0, 0, 1]
    assert {(record["dataset"], record["task"]) for record in dataset} == {(name, DATASETS[name].task)}


def test_vg_rows_that_cannot_be_understood(tmp_path):
    write(tmp_path, FILES["vg"][0], [{"image_id": 1, "width": 10, "height": 10}, {"image_id": 2}])
    region = {"x": 1, "y": 2, "width": 3, "height": 4, "phrase": "p"}
    rows = [{"regions": None}, 5, {"regions": [{**region, "image_id": 2}, {**region, "image_id": 1}, "x"]}]
    write(tmp_path, FILES["vg"][1], rows)
    found = [turns(record) for record in read("vg", str(tmp_path))]
    assert found == [[], [], [], [{"phrase": "p", "bbox": "[0.100,0.200,0.400,0.600]"}], []]


def test_questions_and_annotations_of_unequal_length(tmp_path):
    questions, annotations = FILES["vqav2"]
    asked = [{"image_id": 1, "question": "q", "question_id": i} for i in range(3)]
    told = [{"question_id": i, "multiple_choice_answer": "a"} for i in (0, 7)]
    write(tmp_path, questions, {"questions": asked})
    write(tmp_path, annotations, {"info": {"annotations": [0]}, "annotations": told})
    assert [len(record["turns"]) for record in read("vqav2", str(tmp_path))] == [1, 0, 0]


@pytest.mark.parametrize("count", [0, 999, 1000, 2001])
def test_any_number_of_rows(tmp_path, count):
    rows = [
        {"imageURL": ".jpg", "questions": [f"{row}"] * (row % 3), "answers": ["a"] * (row % 3)} for row in range(count)
    ]
    write(tmp_path, FILES["ocrvqa"][0], {f"key{row}": entry for row, entry in enumerate(rows)})
    dataset = read("ocrvqa", str(tmp_path))
    assert dataset.features == FEATURES
    assert [[turn["question"] for turn in record["turns"]] for record in dataset] == [row["questions"] for row in rows]
    assert len(merge_turns(dataset, 10)) == count


def test_dialogues_as_turns(tmp_path):
    said = [("human", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d"), ("human", "unanswered")]
    rows = [{"conversations": [{"from": role, "value": text} for role, text in said]}]
    write(tmp_path, FILES["sharegpt"][0], rows)
    (record,) = read("sharegpt", str(tmp_path))
    assert turns(record) == [
        {"question": "a"},
        {"question": "b", "answer": "c"},
        {"answer": "d"},
        {"question": "unanswered"},
    ]


def test_the_second_start_reads_the_cache_and_an_edited_file_is_read_again(tmp_path):
    path = write(tmp_path, FILES["gqa"][0], {"a": {"imageId": 1, "question": "old", "answer": "a"}})
    first = read("gqa", str(tmp_path))
    assert read("gqa", str(tmp_path)).cache_files == first.cache_files
    path.write_text(json.dumps({"a": {"imageId": 1, "question": "a new one", "answer": "a"}}))
    assert read("gqa", str(tmp_path))[0]["turns"][0]["question"] == "a new one"


def test_a_new_dataset_is_a_row_with_its_reader_and_its_words(tmp_path, monkeypatch):
    def read_tallies(name, root, paths):
        for row in stream_json(paths[0]):
            turn = {**dict.fromkeys(TURN), "question": row["asked"], "answer": str(row["count"])}
            yield {"dataset": name, "task": "vqa-open", "image": row["image"], "turns": [turn]}

    monkeypatch.setitem(DATASETS, "tallies", Entry("vqa-open", ("Tallies/train.json",), read_tallies))
    write(tmp_path, "Tallies/train.json", [{"asked": "How many dogs?", "count": 3, "image": "a.jpg"}])
    templates = yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))
    templates["datasets"]["tallies"] = {"name": "Tallies", "fine": templates["datasets"]["vqav2"]["fine"]}
    write(tmp_path, "templates.yaml", yaml.safe_dump(templates))
    recipe = parse_recipe(
        {
            "data_root": str(tmp_path),
            "datasets": ["tallies"],
            "templates": str(tmp_path / "templates.yaml"),
            "balancing": "per-task",
        }
    )
    sample = open_mixture(recipe, 1).glance(0)
    assert sample["images"] == ["a.jpg"] and sample["messages"][-1]["content"][0]["text"] == "3"
    assert "How many dogs?" in sample["messages"][1]["content"][1]["text"]


def test_tars_stream(tmp_path):
    for shard in ("00000", "00001"):
        folder = tmp_path / "coyo" / "coyo100m"
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for sample in range(3):
                jpeg = BytesIO()
                picture(sample).save(jpeg, "JPEG")
                members = {"jpg": jpeg.getvalue() if sample else b"no image", "json": b"no json", "txt": b" words\n"}
                if sample == 2:
                    del members["txt"]
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{sample}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
    dataset = read("coyo", str(tmp_path))
    assert isinstance(dataset, IterableDataset) and dataset.num_shards == 2
    records = list(dataset)
    assert [turns(record) for record in records] == [[{"answer": " words\n"}], [{"answer": " words\n"}], []] * 2
    assert records[0]["image"] == {"path": "0.jpg", "bytes": b"no image"}, "it is decoded by whoever counts"

    whole = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(whole.replace(b" words\n", b" w\xffrds\n", 1))
    (folder / "00001.tar").write_bytes(whole[: whole.index(b"1.txt") + 600])
    records = list(read("coyo", str(tmp_path)))
    assert [len(record["turns"]) for record in records] == [0, 1, 0, 1, 0], "text that is none, and a tar cut short"
    assert records[-1]["image"] is None


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "image": "a.jpg"},
        {"messages": TALK, "image": "a.jpg", "images": None},
        {"prompt": "q", "completion": "a", "image": "a.jpg"},
        {"prompt": TALK[:1], "completion": TALK[1:], "image": ["a.jpg"]},
        {"prompt": "q", "completion": "a", "images": ["a.jpg"]},
    ],
)
def test_pictures_are_read_under_either_name(row, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    _, images = normalize_conversation(load_conversations(str(tmp_path / "one.jsonl"))[0])
    assert images == ["a.jpg"]


@pytest.mark.parametrize("images", [["a.jpg"], "a.jpg"])
@pytest.mark.parametrize("name", ["image", "images"])
def test_an_own_dataset_of_a_recipe_has_its_pictures(name, images, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": TALK, name: images, "system": "Be brief."}))
    own = [{"name": "mine", "path": str(tmp_path / "one.jsonl")}]
    settings = {"data_root": str(tmp_path), "datasets": [], "own": own, "balancing": "per-dataset"}
    sample = open_mixture(parse_recipe(settings), 1).glance(0)
    assert sample["images"] == ["a.jpg"] and sample["messages"][0]["role"] == "system"


def test_pictures_of_datasets_stay_undecoded(tmp_path):
    content = {"bytes": b"no picture", "path": None}
    rows = Dataset.from_list([{"prompt": "q", "completion": "a", "image": content}])
    rows.cast_column("image", Image()).save_to_disk(tmp_path / "one")
    assert load_conversations(str(tmp_path / "one"))[0]["image"] == content


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("video", "a.mp4"),
        ("videos", ["a"]),
        ("audio", "b"),
        ("tools", [{"name": "search"}]),
        ("documents", ["text"]),
        ("photo", "folder/a.JPG"),
        ("pictures", ["a.png", "b.webp"]),
        ("clip", "a.webm"),
        ("photos", [{"path": "a.png", "title": "a"}]),
        ("address", "https://somewhere/a.jpg?width=3"),
        ("inline", "data:image/png;base64,iVBORw0KGgo="),
        ("inline", "/9j/4AAQSkZJRgABAQAAAQABAAD"),
    ],
)
def test_columns_that_would_be_missed_are_refused(column, value, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": TALK, column: value}))
    with pytest.raises(ValueError, match=f"one.jsonl' has a column {column!r} with .* not read"):
        load_conversations(str(tmp_path / "one.jsonl"))


def test_pictures_in_a_column_of_another_name_are_refused(tmp_path):
    content = {"bytes": b"any", "path": None}
    rows = Dataset.from_list([{"messages": TALK, "scan": content}]).cast_column("scan", Image())
    rows.save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="a column 'scan' with pictures.*`images`"):
        load_conversations(str(tmp_path / "one"))
    assert "images" in load_conversations(str(tmp_path / "one"), columns={"images": "scan"}).column_names


@pytest.mark.parametrize("value", [b"any", {"shot": {"bytes": b"any", "path": None}}])
def test_pictures_in_bytes_are_refused_wherever_they_begin(value, tmp_path):
    rows = [{"messages": TALK, "scan": None}] * 1_100 + [{"messages": TALK, "scan": value}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="a column 'scan' with bytes.*`images`"):
        load_conversations(str(tmp_path / "one"))


def test_harmless_columns_are_named_once(tmp_path, caplog):
    row = {"messages": TALK, "id": "7", "source": "coco", "image_id": 3, "tools": [], "video": None}
    (tmp_path / "one.jsonl").write_text((json.dumps(row) + "\n") * 3)
    load_conversations(str(tmp_path / "one.jsonl"))
    (record,) = [record for record in caplog.records if "not read" in record.message]
    assert record.message.endswith("not read: id, source, image_id, tools")


def test_conversational_datasets_by_their_columns(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    Dataset.from_list([{"talk": messages, "pictures": ["a.jpg"], "messages": "noise"}]).save_to_disk(tmp_path / "one")
    columns = {"messages": "talk", "images": "pictures"}
    (sample,) = load_conversations(str(tmp_path / "one"), columns=columns)
    assert sample == {"messages": messages, "images": ["a.jpg"]}

    plain = [{"ask": "q", "completion": "a"}]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, plain)))
    (sample,) = load_conversations(str(tmp_path / "two.jsonl"), columns={"prompt": "ask"})
    assert sample["messages"] == messages

    Dataset.from_list([{"prompt": messages[:1], "completion": messages[1:]}]).save_to_disk(tmp_path / "three")
    assert load_conversations(str(tmp_path / "three"))[0]["messages"] == messages
    assert "messages" not in load_from_disk(tmp_path / "three").column_names

    with pytest.raises(ValueError, match="'speech' is not one of messages.*no column 'words', it has prompt"):
        load_conversations(str(tmp_path / "three"), columns={"speech": "words"})
