# SPDX-License-Identifier: Apache-2.0
"""From a YAML file and annotation files to samples."""

import io
import json
import tarfile

import numpy as np
import pytest
import yaml
from torch.utils.data import DataLoader

from tests.tiny import picture, tiny_processor
from training import preview
from training.collator import HoneybeeDataCollator
from training.recipe.config import RecipeError, load_recipe
from training.recipe.sources import open_mixture, open_sources
from training.samples import BadSampleError


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """VSR, COYO tars with one corrupt image, and an own dataset with columns of its own."""
    root = tmp_path_factory.mktemp("data")
    link = "http://images.cocodataset.org/train2017/{}.jpg"
    rows = [{"image_link": link.format(i), "caption": f"The cat is on mat {i}.", "label": i % 2} for i in range(12)]
    write_jsonl(root / "VSR" / "random" / "train.jsonl", rows)
    (root / "VSR" / "images" / "train2017").mkdir(parents=True)
    for i in range(12):
        picture(i).save(root / "VSR" / "images" / "train2017" / f"{i}.jpg")
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG")
    (root / "coyo" / "coyo100m").mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(root / "coyo" / "coyo100m" / f"{shard:05}.tar", "w") as tar:
            for i in range(20):
                for suffix, data in (("jpg", buffer.getvalue()), ("txt", f"caption {shard} {i}".encode())):
                    if (shard, i, suffix) == (1, 3, "jpg"):
                        data = data[:-100]
                    member = tarfile.TarInfo(f"{shard}{i:04}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    picture().save(root / "mine.png")
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    write_jsonl(root / "mine.jsonl", [{"chat": chat, "pictures": ["mine.png"]}] * 5)
    settings = {
        "data_root": str(root),
        "datasets": ["vsr", "coyo"],
        "own": [
            {"name": "mine", "path": str(root / "mine.jsonl"), "columns": {"messages": "chat", "images": "pictures"}}
        ],
        "balancing": "per-dataset",
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump({"mixture": settings}))
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def texts(loader):
    return [(s["dataset"], s["index"], str(s["messages"]), len(s["images"])) for batch in loader for s in batch]


def test_samples_do_not_depend_on_workers_however_they_start(config):
    def read(**loading):
        mixture = open_mixture(load_recipe(config), 300)
        return texts(DataLoader(mixture.as_dataset(), batch_size=4, collate_fn=list, **loading)), mixture.skipped()

    samples, skipped = read()
    assert {name for name, *_ in samples} == {"vsr", "coyo", "mine"}
    assert all(images == 1 for *_, images in samples)
    assert skipped.keys() == {"coyo"} and skipped["coyo"]["corrupt image"] >= 2
    for start in ("fork", "spawn"):
        assert read(num_workers=2, multiprocessing_context=start) == (samples, skipped)


def test_samples_are_what_the_collator_takes(config):
    mixture = open_mixture(load_recipe(config), 12)
    collator = HoneybeeDataCollator(tiny_processor())
    (batch,) = DataLoader(mixture.as_dataset(), batch_size=12, collate_fn=collator)
    assert len(batch["pixel_values"]) == 12 and (batch["labels"] != -100).any(1).all()


def test_the_preview_of_a_file(config, tmp_path, capsys):
    preview.main(["--config", config, "--jsonl", str(tmp_path / "out.jsonl"), "--html", str(tmp_path / "out.html")])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {n: sum(line["dataset"] == n for line in lines) for n in ("vsr", "coyo", "mine")} == {
        "vsr": 12, "coyo": 40, "mine": 5,
    }  # fmt: skip
    assert "Is the cat on mat 0? Please answer yes or no.\nAI: «no»" in capsys.readouterr().out


def test_all_broken_files_are_said_at_once(config, tmp_path):
    for path in ("GQA/annotations/train_balanced_questions_minimal.json", "ScienceQA/llava_train_QCM-LEPA.json"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text("[3, ")
    recipe = load_recipe(config, ["datasets=[gqa, sqa]", f"data_root={tmp_path}"])
    with pytest.raises(RecipeError) as error:
        open_sources(recipe, config)
    assert len(error.value.problems) == 2 and str(error.value).startswith(f"{config}: 2 problems")
    assert "gqa: " in str(error.value) and "llava_train_QCM-LEPA.json' is not valid JSON" in str(error.value)


def test_weights_follow_the_recipe(config):
    recipe = load_recipe(config, ["balancing=per-dataset-tuned", "weights={vsr: 1, coyo: 3, mine: 0}"])
    np.testing.assert_allclose(open_mixture(recipe, 10).weights, [0.25, 0.75, 0])


def test_bad_files_are_counted_by_dataset_and_reason(tmp_path, monkeypatch):
    """From annotation files and images on disk: everything that can be wrong with a sample, once."""
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10_000)
    images = tmp_path / "VSR" / "images" / "train2017"
    images.mkdir(parents=True)
    for i in range(40):
        picture(i).save(images / f"{i}.jpg")
    (images / "1.jpg").write_bytes((images / "1.jpg").read_bytes()[:-200])
    (images / "2.jpg").write_text("<html>not found</html>")
    (images / "3.jpg").write_bytes(b"")
    picture(4, (200, 150)).save(images / "4.jpg")
    (images / "5.jpg").unlink()
    rows = [{"image_link": f"http://x/train2017/{i}.jpg", "caption": f"The cat is {i}.", "label": 1} for i in range(40)]
    rows[6]["label"] = None
    rows[7] = {"caption": "The cat is black."}
    rows[8]["caption"] = "The cat is " + "very " * 400 + "long."
    write_jsonl(tmp_path / "VSR" / "random" / "train.jsonl", [*rows, "no row"])
    said = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": " "}]
    (tmp_path / "Vicuna").mkdir()
    (tmp_path / "Vicuna" / "llava_v1_5_sharegpt40k.json").write_text(
        json.dumps([{"conversations": said}] + [{"conversations": [said[0], {"from": "gpt", "value": "I."}]}] * 20)
    )
    settings = {
        "data_root": str(tmp_path),
        "datasets": ["vsr", "sharegpt"],
        "balancing": "per-dataset",
        "max_bad_fraction": 0.4,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"mixture": settings}))
    collator = HoneybeeDataCollator(tiny_processor(), max_length=512)
    mixture = open_mixture(load_recipe(str(path)), 160, str(path), collator.check_length)
    samples = list(map(mixture.__getitem__, range(160)))
    good = {f"Is the cat {i}?" for i in [0, *range(9, 40)]}
    asked = [s["messages"][1]["content"][-1]["text"] for s in samples if s["dataset"] == "vsr"]
    assert {text.split(". ")[1].partition("?")[0] + "?" for text in asked} == good
    skipped = mixture.skipped()
    assert skipped["vsr"].keys() == {
        "corrupt image",
        "decompression bomb",
        "missing image",
        "malformed record",
        "too long",
    }
    assert skipped["vsr"]["corrupt image"] >= 3 and skipped["vsr"]["malformed record"] >= 3
    assert skipped["sharegpt"].keys() == {"empty answer"}
    collator(samples[:8])


def test_what_does_not_fit_is_named():
    processor = tiny_processor(num_image_tokens=16)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it? " * 3}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
    ]
    (row,) = HoneybeeDataCollator(processor).tokenize([(messages, "default")])
    answer = [label != -100 for label in row["labels"]].index(True)
    image = row["input_ids"].index(processor.image_token_id) + processor.num_image_tokens
    HoneybeeDataCollator(processor, max_length=answer + 1).check_length(messages, "default")
    with pytest.raises(BadSampleError, match="nothing of the answer is left"):
        HoneybeeDataCollator(processor, max_length=answer).check_length(messages, "default")
    with pytest.raises(BadSampleError, match="cut an image"):
        HoneybeeDataCollator(processor, max_length=image - 1).check_length(messages, "default")
