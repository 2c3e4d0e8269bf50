# SPDX-License-Identifier: Apache-2.0
"""Training on pictures that are cut into squares: what a batch holds, what a run counts, and what it leaves behind."""

import argparse
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor, open_image
from tests.tiny import (
    IMAGE_SIZE,
    NEW_PROJECTOR,
    NUM_PATCHES,
    REPOSITORY,
    SFT,
    SHORT_RUN,
    elastic_processor,
    losses_and_gradients,
    new_model,
    picture,
    run_script,
    save_joined,
    tiny_model,
    tiny_processor,
)
from training.collator import HoneybeeDataCollator, crops_of, most_crops
from training.elastic import parse_elastic
from training.preview import load_processor
from training.preview import main as preview
from training.recipe.mixture import Mixture, Source
from training.run.checks import check_model_files, check_settings
from training.run.loading import load_config_and_processor
from training.run.settings import parse_arguments
from training.trainer.elastic_rows import ElasticRows
from training.trainer.length_grouping import dataset_lengths, mixture_lengths
from training.trainer.packed_attention import use_packed_attention
from training.trainer.token_batches import token_batches

# Width and height -> squares, overview included, of at most 4 crops of 32 pixels. By hand: twice the pixels at most.
SQUARES = {(40, 24): 1, (32, 32): 1, (64, 64): 5, (96, 33): 4, (30, 200): 5, (1, 50): 1, (128, 20): 5}
SIZES = list(SQUARES)
LARGE = (64, 64)


def row(number: int, *sizes: tuple[int, int], words: int = 1) -> dict:
    """A conversation about pictures of these sizes."""
    content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": f"What is {number}?" * words}]
    answer = [{"type": "text", "text": "a brown dog " * (1 + number % 3)}]
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        "images": [picture(10 * number + place, size) for place, size in enumerate(sizes)],
    }


# One picture, none, two of which one is cut, three of which none is, a small one.
ROWS = [row(0, LARGE), row(1), row(2, (30, 200), (40, 24)), row(3, LARGE, LARGE, LARGE), row(4, (32, 32))]


def cutting(processor: HoneybeeProcessor, **settings) -> HoneybeeProcessor:
    for name, value in {"max_crops": 4, **settings}.items():
        setattr(processor, name, value)
    return processor


PROCESSORS = {
    "one M": lambda: cutting(tiny_processor()),
    "a small overview": lambda: cutting(tiny_processor(), overview_num_query_tokens=1),
    "elastic": lambda: cutting(elastic_processor(), overview_num_query_tokens=4),
    "no overview": lambda: cutting(tiny_processor(), overview=False, min_crops=2),
    "off": tiny_processor,
}


def asked_of(processor, rows: list[dict]) -> list[dict]:
    """What the processor itself makes of each row."""
    made = []
    for each in rows:
        messages = [{**message, "content": [*message["content"]]} for message in each["messages"]]
        text = processor.apply_chat_template(messages, tokenize=False)
        number = each.get("num_query_tokens")
        images = each["images"] or None
        made.append(
            processor(images=images, text=text, num_query_tokens=number, add_special_tokens=False, return_tensors="pt")
        )
    return made


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_batch_is_what_the_processor_makes(kind, pack):
    processor = PROCESSORS[kind]()
    rows = [
        {**each, "num_query_tokens": 16} if kind == "elastic" and place % 2 else each for place, each in enumerate(ROWS)
    ]
    collator = HoneybeeDataCollator(processor, pack=pack)
    batch, expected = collator(rows), asked_of(processor, rows)
    ids = [inputs["input_ids"][0] for inputs in expected]
    assert collator.lengths(rows) == [len(row_ids) for row_ids in ids]
    for place, row_ids in enumerate(ids):
        start = sum(map(len, ids[:place]))
        found = (
            batch["input_ids"][0, start : start + len(row_ids)] if pack else batch["input_ids"][place, : len(row_ids)]
        )
        assert torch.equal(found, row_ids)
    shown = [inputs for inputs in expected if "pixel_values" in inputs]
    assert torch.equal(batch["pixel_values"], torch.cat([inputs["pixel_values"] for inputs in shown]))
    if kind == "off":
        assert "num_crops" not in batch and "num_query_tokens" not in batch
        return
    crops = torch.cat([inputs["num_crops"] for inputs in shown])
    assert torch.equal(batch["num_crops"], crops) and batch["num_crops"].dtype == torch.int64
    if kind in ("one M", "a small overview"):
        assert crops.tolist() == [5, 5, 1, 1, 1, 1, 1]
    whole = [torch.full((len(i["pixel_values"]),), processor.num_query_tokens) for i in shown]
    numbers = torch.cat([inputs.get("num_query_tokens", default) for inputs, default in zip(shown, whole)])
    has_others = kind in ("a small overview", "elastic")
    assert ("num_query_tokens" in batch) == has_others
    assert not has_others or torch.equal(batch["num_query_tokens"], numbers)
    no_images = collator([row(1)])
    assert not {"pixel_values", "num_crops", "num_query_tokens"} & no_images.keys()


def saved(folder, rows: list[dict], turned: bool = False) -> list[dict]:
    """The rows with their pictures as files, relative to the folder. Turned ones are stored lying on their side."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for number, each in enumerate(rows):
        names = [f"images/{number}-{place}.png" for place in range(len(each["images"]))]
        for name, image in zip(names, each["images"]):
            lying = image.transpose(Image.Transpose.ROTATE_90) if turned else image
            lying.save(folder / name, **({"exif": exif} if turned else {}))
        found.append({**each, "images": names})
    return found


def test_lengths_are_known_before_a_pixel_is(tmp_path, monkeypatch):
    rows = [row(place, size) for place, size in enumerate(SIZES)] + ROWS
    processor = PROCESSORS["a small overview"]()
    expected = [len(inputs["input_ids"][0]) for inputs in asked_of(processor, rows)]
    for folder, turned in ((tmp_path / "upright", False), (tmp_path / "turned", True)):
        files = saved(folder, rows, turned)
        in_memory = [
            {**each, "images": [{"bytes": (folder / name).read_bytes()} for name in each["images"]]} for each in files
        ]
        collator = HoneybeeDataCollator(processor, image_root=str(folder))
        assert torch.equal(collator(files)["pixel_values"], collator(rows)["pixel_values"])
        with monkeypatch.context() as patched:
            patched.setattr("PIL.ImageFile.ImageFile.load", None)
            assert collator.lengths(files) == collator.lengths(in_memory) == expected
            sources = [Source("own", "vqa", files, lambda record, rng: record, str(folder))]
            mixture = Mixture(sources, np.ones(1), len(files))
            draws = mixture_lengths(mixture, HoneybeeDataCollator(processor), 4)(list(range(len(files))))
            assert draws == [expected[mixture.glance(draw)["index"]] for draw in range(len(files))]
    squares = [inputs["num_crops"].tolist() for inputs in asked_of(processor, rows[: len(SIZES)])]
    assert squares == [[number] for number in SQUARES.values()]
    # Where nothing is cut, no file is opened.
    off = [{**each, "images": ["no_such.png"] * len(each["images"])} for each in rows]
    assert HoneybeeDataCollator(tiny_processor(), 500).lengths(off)
    with pytest.raises(FileNotFoundError, match="no_such.png"):
        HoneybeeDataCollator(processor).lengths(off)
    with pytest.raises(ValueError, match="max_crops=4.*give the `sizes`"):
        HoneybeeDataCollator(processor).tokenize([(rows[0]["messages"], "default")])


def test_a_small_picture_fits_and_a_large_one_does_not(tmp_path):
    processor = PROCESSORS["one M"]()
    small, large = row(0, (40, 24)), row(0, LARGE)
    (length,) = HoneybeeDataCollator(processor).lengths([small])
    collator = HoneybeeDataCollator(processor, max_length=length)
    collator.check_length(small["messages"], "default", images=small["images"])
    with pytest.raises(ValueError, match="nothing of the answer|would cut an image") as error:
        collator.check_length(large["messages"], "default", images=large["images"])
    assert error.value.reason == "too long"
    for most in (4, 1):  # as soon as the largest fits, no file is opened
        processor.max_crops = most
        HoneybeeDataCollator(processor, max_length=1000).check_length(
            large["messages"], "default", images=["no_such.png"]
        )


def test_pictures_that_cannot_be_read_keep_their_reasons(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (20000, 10000)).save(bomb, "PNG")
    images = [picture(0, LARGE), "no_such.png", {"bytes": b"not an image"}, {"bytes": bomb.getvalue()}]
    for name, processor in (("on", PROCESSORS["one M"]()), ("off", tiny_processor())):
        records = [{**row(0, LARGE, words=50), "images": [image]} for image in images]
        collator = HoneybeeDataCollator(processor, max_length=2000)
        sources = [Source("own", "vqa", records, lambda record, rng: record)]
        mixture = Mixture(sources, np.ones(1), 12, max_bad_fraction=1.0, fits=collator.check_length)
        lengths = mixture_lengths(mixture, collator, 4)(list(range(4)))
        for draw in range(4):
            assert mixture[draw]["index"] == 0
        skipped = mixture.skipped()["own"]
        assert skipped.keys() == {"missing image", "corrupt image", "decompression bomb"}, name
        assert name == "off" or sorted(lengths)[:3] == [1, 1, 1]
        # Where the sizes decide, the same is found by them.
        tight = HoneybeeDataCollator(processor, max_length=collator.lengths(records[:1])[0])
        mixture = Mixture(sources, np.ones(1), 12, max_bad_fraction=1.0, fits=tight.check_length)
        assert mixture[0]["index"] == mixture[1]["index"] == 0
        assert mixture.skipped()["own"].keys() <= skipped.keys(), name


def test_batches_of_equal_tokens_count_crops(tmp_path):
    draw = parse_elastic("4,9,16")
    rows = [row(place, SIZES[place % len(SIZES)]) for place in range(64)]
    dataset = Dataset.from_list(saved(tmp_path, rows))
    elastic = ElasticRows(dataset, draw, 0, "data")
    processor = PROCESSORS["elastic"]()
    collator = HoneybeeDataCollator(processor, image_root=str(tmp_path))
    batches = token_batches(elastic.as_dataset(), None, collator, 8, 400, 1, 0, elastic)
    read = elastic.as_dataset()
    found = list(batches)
    assert sorted(sum(found, [])) == list(range(64))
    packing = HoneybeeDataCollator(processor, image_root=str(tmp_path), pack=True)
    sizes = [packing([read[number] for number in batch])["input_ids"].shape[1] for batch in found]
    lengths = dataset_lengths(read, collator)
    assert sizes == [sum(lengths(batch)) for batch in found] and max(sizes) <= 400


@pytest.mark.parametrize("projector", ["c-abs", "d-abs", "resampler", "linear"])
def test_packed_and_padded_rows_train_as_one_by_one(projector):
    fixed = projector == "linear"
    processor = cutting(tiny_processor(NUM_PATCHES if fixed else 4), overview_num_query_tokens=None if fixed else 1)
    settings = {} if fixed else {"overview_num_query_tokens": 1, "dropout": 0.0}
    model = tiny_model(projector, config={"image_token_id": processor.image_token_id}, **settings).train()
    expected, gradients = losses_and_gradients(model, [HoneybeeDataCollator(processor)([each]) for each in ROWS])
    assert max(gradient.abs().max() for gradient in gradients.values()) > 0.01
    together = [[HoneybeeDataCollator(processor)(ROWS)], [HoneybeeDataCollator(processor, pack=True)(ROWS)]]
    for number, batches in enumerate(together):
        if number:
            assert use_packed_attention(model.model.language_model)
        loss, found = losses_and_gradients(model, batches)
        assert loss == pytest.approx(expected, abs=1e-5) and found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_box_of_the_whole_picture_is_found_in_its_crop():
    """A coordinate of the whole picture, and where the order of crops says that it is: a white spot on black is there."""
    processor, (width, height) = cutting(tiny_processor(), max_crops=6), (192, 128)
    (cut,) = processor.plan_cuts([(width, height)])
    assert (cut.columns, cut.rows, cut.overview) == (3, 2, True)
    for left, top in ((4, 4), (100, 8), (180, 60), (20, 120), (90, 100), (150, 70)):
        image = Image.new("RGB", (width, height))
        image.paste((255, 255, 255), (left - 3, top - 3, left + 3, top + 3))
        box = f"[{(left - 3) / width:.3f},{(top - 3) / height:.3f},{(left + 3) / width:.3f},{(top + 3) / height:.3f}]"
        sample = row(0, LARGE)
        sample["images"] = [image]
        sample["messages"][0]["content"][1]["text"] = f"What is in {box}?"
        sample["messages"][1]["content"][0]["text"] = box
        batch = HoneybeeDataCollator(processor)([sample])
        words = processor.tokenizer.decode(batch["input_ids"][0]).replace(" ", "")
        assert words.count(box) == 2, "a box is text, and nothing changes it"
        x0, y0, x1, y1 = map(float, re.findall(r"[\d.]+", box))
        across, down = (x0 + x1) / 2 * cut.columns, (y0 + y1) / 2 * cut.rows
        place = int(down) * cut.columns + int(across)
        bright = batch["pixel_values"].mean(dim=1)  # (squares, S, S)
        *crops, overview = bright
        assert int(torch.stack(crops).amax(dim=(1, 2)).argmax()) == place
        for square, (x, y) in ((crops[place], (across % 1, down % 1)), (overview, ((x0 + x1) / 2, (y0 + y1) / 2))):
            weight = square - square.min()
            found_y, found_x = (
                (weight.sum(dim=1 - axis) * torch.arange(IMAGE_SIZE)).sum() / weight.sum() for axis in (0, 1)
            )
            assert found_x.item() == pytest.approx(x * IMAGE_SIZE - 0.5, abs=1.5)
            assert found_y.item() == pytest.approx(y * IMAGE_SIZE - 0.5, abs=1.5)


@pytest.mark.parametrize("collator", ["ours", "theirs"])
def test_plain_trl_has_the_loss_of_ours(collator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    processor = PROCESSORS["a small overview"]()
    settings = {"overview_num_query_tokens": 1}
    tiny_model(config={"image_token_id": processor.image_token_id}, **settings).save_pretrained("model")
    processor.save_pretrained("model")
    rows = saved(tmp_path, ROWS[:3] + ROWS[4:])
    prompts = [
        {"prompt": each["messages"][:1], "completion": each["messages"][1:], "images": each["images"]} for each in rows
    ]
    model = HoneybeeForConditionalGeneration.from_pretrained("model")
    ours = HoneybeeDataCollator(HoneybeeProcessor.from_pretrained("model"))
    expected = model.train()(**ours(rows)).loss.item()
    arguments = {"data_collator": ours, "train_dataset": Dataset.from_list(rows)}
    settings = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    if collator == "theirs":
        arguments, settings = {"train_dataset": Dataset.from_list(prompts)}, {}
    args = SFTConfig(
        "out", max_steps=1, per_device_train_batch_size=len(rows), logging_steps=1, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    if collator == "ours":
        arguments |= {
            "model": HoneybeeForConditionalGeneration.from_pretrained("model"),
            "processing_class": ours.processor,
        }
    else:
        args.trust_remote_code = True
        arguments["model"] = "model"
    trainer = SFTTrainer(args=args, **arguments)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Parts, a model, and conversations of which some have no picture."""
    root = tmp_path_factory.mktemp("world")
    save_joined(root)
    rows = saved(root, [row(place, *((SIZES[place % len(SIZES)],) if place % 3 else ())) for place in range(12)])
    (root / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    own = [{"name": "own", "path": str(root / "data.jsonl")}]
    recipe = {"data_root": str(root), "datasets": [], "own": own, "balancing": "per-dataset"}
    (root / "recipe.yaml").write_text(json.dumps({"mixture": recipe}))
    return root


def visual_tokens(rows: int, crop: int, overview: int) -> int:
    """Of the first rows of the data."""
    squares = [SQUARES[SIZES[place % len(SIZES)]] for place in range(rows) if place % 3]
    return sum((number - 1) * crop + overview if number > 1 else crop for number in squares)


def logged(folder) -> list[float]:
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [each["visual_tokens_per_step"] for each in rows if "visual_tokens_per_step" in each]


CUT = ["--max_crops", 4, "--overview_num_query_tokens", 1, "--max_length", 200]


def test_the_next_stage_cuts_as_the_last_one_did(world, tmp_path):
    """A step is an epoch, so its visual tokens are known."""
    epoch = ["--dataset", world / "data.jsonl", *SHORT_RUN, "--logging_steps", 1, "--num_train_epochs", 1]
    epoch += ["--per_device_train_batch_size", 12]
    first = [*new_model(world), *CUT, "--stage", "align", "--dataloader_num_workers", 1]
    run_script(SFT, *epoch, *first, "--output_dir", tmp_path / "first")
    assert logged(tmp_path / "first") == [visual_tokens(12, 4, 1)]
    lora = ["--use_peft", "--lora_r", 2, "--merge", "--batching", "grouped", "--overview_num_query_tokens", 9]
    run_script(SFT, *epoch, *lora, "--model_name_or_path", tmp_path / "first", "--output_dir", tmp_path / "second")
    assert logged(tmp_path / "second") == [visual_tokens(12, 4, 9)]
    for folder, number in ((tmp_path / "first", 1), (tmp_path / "second" / "merged", 9)):
        processor = HoneybeeProcessor.from_pretrained(folder)
        assert (processor.max_crops, processor.overview_num_query_tokens) == (4, number)
        assert HoneybeeConfig.from_pretrained(folder).projector_config.overview_num_query_tokens == number
    summary = (tmp_path / "second" / "run_summary.md").read_text()
    assert "| max_crops | 4 |" in summary and "| overview_num_query_tokens | 9 |" in summary
    inputs = processor(images=picture(0, LARGE), text="<image> x", return_tensors="pt")
    model = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "second" / "merged")
    assert model(**inputs).image_hidden_states.shape == (4 * 4 + 9, 24)


def test_stopped_and_resumed_ends_as_if_not(world, tmp_path):
    """A mixture with an M for each sample in batches of equal tokens, and other workers after the stop."""
    words = ["--mixture", world / "recipe.yaml", "--model_name_or_path", world / "model", *CUT, *SHORT_RUN]
    words += ["--max_tokens_per_batch", 250, "--global_batch_size", 4, "--elastic", "1,4", "--logging_steps", 1]
    words += ["--max_steps", 5, "--save_strategy", "steps", "--save_steps", 4, "--output_dir"]
    for name in ("whole", "stopped"):
        run_script(SFT, *words, tmp_path / name)
    for file in ("model.safetensors", "trainer_state.json"):
        (tmp_path / "stopped" / file).unlink()
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-5", ignore_errors=True)
    run_script(SFT, *words, tmp_path / "stopped", "--resume", "--dataloader_num_workers", 1)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert logged(tmp_path / "whole") == logged(tmp_path / "stopped") and len(set(logged(tmp_path / "whole"))) > 1


def test_a_dry_run_counts_the_crops(world, tmp_path):
    words = ["--dataset", world / "data.jsonl", "--model_name_or_path", world / "model", *SHORT_RUN, "--dry_run"]
    words += ["--per_device_train_batch_size", 12, "--num_train_epochs", 1, "--output_dir", tmp_path / "out"]
    words += ["--train_vision_tower", "all"]
    said = run_script(SFT, *words, *CUT).stdout
    assert (
        "Crops: from 1 to 4 of a picture and an overview of 1 visual tokens, none in samples of more than 2 pictures"
        in said
    )
    assert "at most 5 squares and 17 visual tokens a picture" in said
    assert f"{visual_tokens(12, 4, 1)} of them visual" in said
    squares = [SQUARES[SIZES[place % len(SIZES)]] for place in range(12) if place % 3]
    assert f"({sum(squares) / len(squares):.2f} squares a picture in the samples that were read)" in said
    assert "of activations where every picture of a batch is 5 squares" in said
    off = run_script(SFT, *words).stdout
    assert "Crops" not in off and "squares" not in off and f"{8 * 4} of them visual" in off


def test_the_preview_shows_and_counts_squares(world, tmp_path, capsys):
    cutting(tiny_processor(), max_crops=1).save_pretrained(tmp_path / "processor")
    run = json.loads((world / "recipe.yaml").read_text())
    path, page = tmp_path / "run.yaml", tmp_path / "page.html"

    def mean(*words, **settings) -> float:
        path.write_text(json.dumps({**run, "max_steps": 2, **settings}))
        preview(
            [
                "--config",
                str(path),
                "--processor",
                str(tmp_path / "processor"),
                "--html",
                str(page),
                "--show",
                "3",
                *words,
            ]
        )
        return float(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("own")).split()[-1])

    whole = mean()
    assert page.read_text().count("<img") == 2 and "crops" not in page.read_text().partition("</style>")[2]
    crops = mean("--max_crops", "4")
    assert mean(max_crops=4) == crops
    assert crops - whole == pytest.approx((visual_tokens(12, 4, 4) - 8 * 4) / 12, abs=1)
    text = page.read_text()  # of rows 1 and 2: one picture stays whole, one is cut
    assert text.count("<img") == 1 + 5 and "2 x 2 crops and the whole: 5 squares, 20 visual tokens" in text
    assert "grid-template-columns:repeat(2,1fr)" in text and "cut into squares" in text
    with pytest.raises(SystemExit, match="error: max_crops=0 must be a whole number"):
        mean(max_crops=0)


def refused(*words, files: bool = True) -> str:
    """What is said before a weight is read."""
    settings = parse_arguments(list(map(str, [*words, "--use_cpu", "--bf16", "False"])))
    with pytest.raises(ValueError) as error:
        check_settings(settings)
        check_model_files(settings, *load_config_and_processor(settings))
    return str(error.value)


def test_wrong_settings(world, tmp_path):
    have = ["--dataset", "x.jsonl", "--output_dir", tmp_path, "--model_name_or_path", world / "model"]
    assert "max_crops=0 must be at least 1" in refused(*have, "--max_crops", 0)
    assert "min_crops=5 must be at least 1, and at most max_crops" in refused(*have, "--max_crops", 4, "--min_crops", 5)
    assert "overview_num_query_tokens=0 must be" in refused(*have, "--overview_num_query_tokens", 0)
    assert "max_images_cut=0 must be" in refused(*have, "--max_images_cut", 0)
    assert "min_crops=2 is more than max_crops=1" in refused(*have, "--min_crops", 2)
    assert "--overview False: no picture is cut with max_crops=1" in refused(*have, "--overview", "False")
    no_overview = ["--max_crops", 4, "--overview", "False", "--overview_num_query_tokens", 1]
    assert "no overview follows the crops" in refused(*have, *no_overview)
    assert "overview_num_query_tokens=5 is not a perfect square" in refused(
        *have, "--max_crops", 4, "--overview_num_query_tokens", 5
    )
    long = "max_length=37 leaves no room for text: an image in 10 squares (max_crops=9) is 37 visual tokens; raise it, or lower"
    assert long in refused(*have, "--max_crops", 9, "--overview_num_query_tokens", 1, "--max_length", 37)
    adapter = refused(*have, "--max_crops", 4, "--overview_num_query_tokens", 1, "--use_peft")
    assert "an adapter has no config of its own" in adapter and "--overview_num_query_tokens" in adapter
    for kind in ("d-abs", "resampler"):
        processor = tiny_processor(9)
        model = tiny_model(kind, config={"image_token_id": processor.image_token_id}, num_query_tokens=9)
        for part in (model, processor):
            part.save_pretrained(tmp_path / kind)
        words = [*have[:-1], tmp_path / kind, "--max_crops", 4]
        assert "has learned queries for 9 visual tokens, and 9 has to be the largest" in refused(
            *words, "--overview_num_query_tokens", 16
        )
    new = [*have[:4], "--vision_model", world / "vision", "--text_model", world / "text", "--max_crops", 4]
    twice = json.dumps({**NEW_PROJECTOR, "overview_num_query_tokens": 1})
    assert "give one of them" in refused(*new, "--projector", twice, "--overview_num_query_tokens", 4)
    linear = json.dumps({"projector_type": "linear"})
    assert "makes one visual token of each" in refused(*new, "--projector", linear, "--overview_num_query_tokens", 4)


def test_a_yaml_file_and_a_flag_say_the_same(world, tmp_path):
    (tmp_path / "run.yaml").write_text("{max_crops: 6, min_crops: 2, overview: false, max_images_cut: 1}")
    have = ["--dataset", "x.jsonl", "--output_dir", tmp_path, "--use_cpu", "--bf16", "False", "--model_name_or_path"]
    config = ["--config", tmp_path / "run.yaml", "--max_crops", 5]
    flags = ["--max_crops", 5, "--min_crops", 2, "--overview", "False", "--max_images_cut", 1]
    for words in (config, flags):
        settings = parse_arguments(list(map(str, [*have, world / "model", *words])))
        _, processor = load_config_and_processor(settings)
        assert (processor.max_crops, processor.min_crops) == (5, 2)
        assert (processor.overview, processor.max_images_cut) == (False, 1)
    _, processor = load_config_and_processor(parse_arguments(list(map(str, [*have, world / "model"]))))
    processor.save_pretrained(tmp_path / "again")
    again, before = (
        json.loads((f / "processor_config.json").read_text()) for f in (tmp_path / "again", world / "model")
    )
    assert again == before and "max_crops" not in again


def test_a_lower_maximum_lowers_the_minimum(world, tmp_path):
    for part in (
        cutting(tiny_processor(), min_crops=2),
        HoneybeeForConditionalGeneration.from_pretrained(world / "model"),
    ):
        part.save_pretrained(tmp_path / "model")
    have = ["--dataset", "x.jsonl", "--output_dir", tmp_path, "--use_cpu", "--bf16", "False", "--model_name_or_path"]
    for most, pair in ((1, (1, 1)), (2, (2, 2)), (6, (6, 2))):
        words = [*have, tmp_path / "model", "--max_crops", most]
        _, processor = load_config_and_processor(parse_arguments(list(map(str, words))))
        assert (processor.max_crops, processor.min_crops) == pair
        asked = argparse.Namespace(processor=str(tmp_path / "model"), max_crops=most)
        of_preview = load_processor(asked)
        assert (of_preview.max_crops, of_preview.min_crops) == pair
    # One that is asked for itself is not lowered.
    with pytest.raises(ValueError, match="min_crops=5 is more than max_crops=4"):
        load_processor(argparse.Namespace(processor=str(tmp_path / "model"), max_crops=4, min_crops=5))


def test_the_documented_command_has_room_for_its_crops():
    page = (REPOSITORY / "docs" / "crops.md").read_text()
    command = re.search(r"python training/sft.py (.*?)```", page, re.DOTALL)[1].replace("\\\n", " ").split()
    settings = parse_arguments([*command, "--use_cpu", "--bf16", "False"])
    processor = tiny_processor(144)
    processor = cutting(processor, **crops_of(processor, settings.honeybee))
    most = processor.count_image_tokens(144, most_crops(processor))
    assert most == 9 * 144 + 64 and most + 500 < settings.training.max_length


def test_a_processor_gets_the_numbers_of_its_model(world, tmp_path):
    """Also one that did not know of extra tokens, which its model makes of every square."""
    processor = tiny_processor(5)
    model = tiny_model(config={"image_token_id": processor.image_token_id}, num_eos_tokens=1)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    have = ["--dataset", "x.jsonl", "--output_dir", tmp_path, "--use_cpu", "--bf16", "False", "--max_crops", 4]
    new = [*have, "--vision_model", world / "vision", "--text_model", world / "text", "--min_crops", 2, "--projector"]
    linear = json.dumps({"projector_type": "linear"})
    own_overview = json.dumps({**NEW_PROJECTOR, "overview_num_query_tokens": 1})
    expected = {
        (*have, "--model_name_or_path", tmp_path / "model", "--overview_num_query_tokens", 1): [5, 5, 5, 5, 2],
        (*new, linear): [NUM_PATCHES] * 5,
        (*new, own_overview): [4, 4, 4, 4, 1],
    }
    for words, tokens in expected.items():
        config, processor = load_config_and_processor(parse_arguments(list(map(str, words))))
        inputs = processor(images=open_image(picture(0, LARGE)), text="<image>")
        assert inputs["input_ids"][0].count(processor.image_token_id) == sum(tokens)
        model = HoneybeeForConditionalGeneration(config).eval()
        inputs = processor(images=picture(0, LARGE), text="<image> x", return_tensors="pt")
        assert model(**inputs).image_hidden_states.reshape(-1, 24).shape[0] == sum(tokens)
