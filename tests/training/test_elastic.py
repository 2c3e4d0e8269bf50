# SPDX-License-Identifier: Apache-2.0
"""`training/sft.py --elastic`: what each sample draws, what the run counts, and what it leaves behind."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor
from tests.tiny import (
    NEW_PROJECTOR,
    SFT,
    SHORT_RUN,
    elastic_processor,
    picture,
    run_script,
    sample,
    save_joined,
    save_tiny,
    tiny_model,
    tiny_processor,
    write_dataset,
)
from training.collator import HoneybeeDataCollator
from training.elastic import elastic_draw, parse_elastic
from training.preview import main as preview
from training.recipe.config import load_recipe
from training.recipe.mixture import Mixture, Source
from training.recipe.sources import open_mixture
from training.run.loading import load_config_and_processor
from training.run.settings import parse_arguments
from training.trainer.elastic_rows import ElasticRows
from training.trainer.length_grouping import dataset_lengths
from training.trainer.token_batches import token_batches

ELASTIC = "1,4:2,9"
DRAW = parse_elastic(ELASTIC)


def test_what_elastic_says():
    draw = parse_elastic("16:0.5, 4,9 : 2")
    assert (draw.numbers, draw.weights) == ((4, 9, 16), (1.0, 2.0, 0.5))
    assert draw.in_words() == "4 (29%), 9 (57%) or 16 (14%)" and parse_elastic("9").in_words() == "9 (100%)"
    assert elastic_draw(None, None) is None
    assert elastic_draw(None, [4, 9]) == parse_elastic("4,9")
    assert elastic_draw("4", [4, 9]) == parse_elastic("4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4,many", "'many' is no number"),
        ("4,,9", "'' is no number"),
        ("4:often", "'4:often' is no number"),
        ("0,4", "'0' must be a number of at least 1"),
        ("4:0", "its weight more than 0"),
        ("4:nan", "its weight more than 0"),
        ("4,9,4", "names 4 twice"),
    ],
)
def test_what_elastic_cannot_say(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_elastic(text)
    assert "--elastic" in str(error.value)


def test_draws_follow_the_weights_and_the_epoch():
    drawn = [DRAW.of(0, "data", index, epoch) for index in range(2000) for epoch in range(2)]
    shares = {number: count / 4000 for number, count in Counter(drawn).items()}
    assert shares == pytest.approx({1: 0.25, 4: 0.5, 9: 0.25}, abs=0.03)
    first, second = drawn[::2], drawn[1::2]
    assert 0.5 < np.mean(np.array(first) != second) < 0.75  # as two draws that know nothing of each other
    assert first != [DRAW.of(1, "data", index, 0) for index in range(2000)]
    assert first != [DRAW.of(0, "other", index, 0) for index in range(2000)]


def records(number: int) -> list[dict]:
    return [{**sample(index), "images": [picture(index)]} for index in range(number)]


def test_a_mixture_draws_the_same_whoever_reads():
    sources = [Source("some", "vqa", records(7), lambda record, rng: record)]
    mixture = Mixture(sources, np.ones(1), 20, seed=3, elastic=DRAW)
    numbers = [mixture[draw]["num_query_tokens"] for draw in range(20)]
    order = [mixture[draw]["index"] for draw in range(20)]
    assert numbers == [DRAW.of(3, "some", index, draw // 7) for draw, index in enumerate(order)]
    assert [mixture.glance(draw)["num_query_tokens"] for draw in range(20)] == numbers
    ahead = mixture.read_ahead(4)
    assert [ahead.glance(draw)["num_query_tokens"] for draw in range(20)] == numbers
    loader = DataLoader(mixture, batch_size=2, num_workers=2, collate_fn=lambda rows: rows)
    assert [row["num_query_tokens"] for rows in loader for row in rows] == numbers
    fixed = Mixture(sources, np.ones(1), 20, seed=3)
    assert "num_query_tokens" not in fixed[0] and fixed[5]["messages"] == mixture[5]["messages"]


def recipe_of(data) -> dict:
    return {
        "data_root": str(data.parent),
        "datasets": [],
        "own": [{"name": "own", "path": str(data)}],
        "balancing": "per-dataset",
    }


def test_what_is_held_out_keeps_the_default(tmp_path):
    data = write_dataset(tmp_path, [sample(index) for index in range(8)])
    mixture = open_mixture(load_recipe({**recipe_of(data), "eval": {"own": 0.25}}), 6, elastic=DRAW)
    assert "num_query_tokens" in mixture[0]
    assert "num_query_tokens" not in mixture.held_out()["own"][0]


def rows_of(numbers: list[int | None]) -> list[dict]:
    return [
        {**row, **({} if number is None else {"num_query_tokens": number})}
        for row, number in zip(records(len(numbers)), numbers)
    ]


@pytest.mark.parametrize("pack", [False, True])
def test_a_batch_of_different_m_is_what_the_processor_makes(pack):
    processor = elastic_processor()
    rows = rows_of([4, None, 16])
    collator = HoneybeeDataCollator(processor, pack=pack)
    batch = collator(rows)
    assert batch["num_query_tokens"].tolist() == [4, 9, 16] and batch["num_query_tokens"].dtype == torch.int64
    lengths = collator.lengths(rows)
    for place, (row, number) in enumerate(zip(rows, [4, 9, 16])):
        own = processor.apply_chat_template(
            [{**m, "content": [*m["content"]]} for m in row["messages"]], tokenize=False
        )
        expected = processor(images=row["images"], text=own, num_query_tokens=number, add_special_tokens=False)
        ids = expected["input_ids"][0]
        assert lengths[place] == len(ids) and ids.count(processor.image_token_id) == number + 1
        start = sum(lengths[:place])
        found = batch["input_ids"][0, start : start + len(ids)] if pack else batch["input_ids"][place, : len(ids)]
        assert found.tolist() == ids
    assert "num_query_tokens" not in collator(rows_of([None, None]))


def test_a_sample_fits_with_one_m_and_not_with_another():
    processor = elastic_processor()
    row = rows_of([16])[0]
    (length,) = HoneybeeDataCollator(processor).lengths([row])
    answer = len(processor.tokenizer.tokenize("a brown dog 0")) + 1
    collator = HoneybeeDataCollator(processor, max_length=length - answer)
    messages = row["messages"]
    for number in (None, 4, 9):
        collator.check_length(messages, "default", number)
    with pytest.raises(ValueError, match="nothing of the answer"):
        collator.check_length(messages, "default", 16)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_joined(root)
    write_dataset(root, [sample(index, images=1 + index % 2) for index in range(6)])
    return root


def words_of(root, out, *more) -> list:
    data = ["--dataset", root / "data.jsonl", "--model_name_or_path", root / "model", "--elastic", ELASTIC]
    return [*data, "--output_dir", out, *SHORT_RUN, "--logging_steps", 1, *more]


def logged(folder) -> list[float]:
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["visual_tokens_per_step"] for row in rows if "visual_tokens_per_step" in row]


@pytest.mark.parametrize(("workers", "batching"), [(0, "grouped"), (2, "packed")])
def test_a_dataset_draws_anew_each_epoch(world, tmp_path, workers, batching):
    """A step is an epoch, so its visual tokens are known."""
    more = ["--num_train_epochs", 3, "--per_device_train_batch_size", 6, "--batching", batching]
    more += ["--dataloader_num_workers", workers]
    more += ["--dataloader_persistent_workers", "--dataloader_prefetch_factor", 2] if workers else []
    run_script(SFT, *words_of(world, tmp_path / "out", *more))
    name = str(world / "data.jsonl")
    expected = [sum((1 + i % 2) * DRAW.of(42, name, i, epoch) for i in range(6)) for epoch in range(3)]
    assert len(set(expected)) > 1
    assert logged(tmp_path / "out") == expected
    config = HoneybeeConfig.from_pretrained(tmp_path / "out")
    assert config.projector_config.elastic_num_query_tokens == [1, 4, 9]
    processor = HoneybeeProcessor.from_pretrained(tmp_path / "out")
    assert processor.elastic_num_query_tokens == [1, 4, 9] and processor.num_query_tokens == 4
    model = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "out")
    inputs = processor(images=picture(), text="<image> x", num_query_tokens=9, return_tensors="pt")
    assert model(**inputs).image_hidden_states.shape == (9, 24)


@pytest.mark.parametrize("kind", ["tokens", "mixture", "stream"])
def test_stopped_and_resumed_ends_as_if_not(world, tmp_path, kind):
    """In the second epoch, and with other workers."""
    more = ["--max_steps", 5, "--save_strategy", "steps", "--save_steps", 4, "--max_length", 100]
    words = words_of(world, "OUT", *more)
    if kind == "mixture":
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({"mixture": recipe_of(world / "data.jsonl")}))
        words[:2] = ["--mixture", path]
    elif kind == "stream":
        words += ["--streaming"]
    elif kind == "tokens":
        words += ["--max_tokens_per_batch", 100, "--global_batch_size", 2]
    for name in ("whole", "stopped"):
        words[words.index("--output_dir") + 1] = tmp_path / name
        run_script(SFT, *words)
    for file in ("model.safetensors", "trainer_state.json"):
        (tmp_path / "stopped" / file).unlink()
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-5", ignore_errors=True)
    run_script(SFT, *words, "--resume", "--dataloader_num_workers", 1)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert logged(tmp_path / "whole") == logged(tmp_path / "stopped")
    assert len(set(logged(tmp_path / "whole"))) > 1


@pytest.mark.parametrize("limit", [700, 900])
def test_batches_of_equal_tokens_keep_their_limit_in_every_epoch(limit):
    draw = parse_elastic("16,64,256")
    dataset = Dataset.from_list([sample(index) for index in range(256)])
    rows = ElasticRows(dataset, draw, 0, "data")
    collator = HoneybeeDataCollator(tiny_processor(256, elastic_num_query_tokens=[16, 64, 256]))
    batches = token_batches(rows.as_dataset(), None, collator, 16, limit, 1, 0, rows)
    lengths, longest = dataset_lengths(rows.as_dataset(), collator), []
    for epoch in range(8):
        rows.begin(epoch)
        batches.epoch = lambda epoch=epoch: epoch
        found = list(batches)
        assert len(found) == len(batches) and sorted(sum(found, [])) == list(range(256))
        longest.append(max(sum(lengths(batch)) for batch in found))
    assert max(longest) <= limit and len(set(longest)) > 1


def test_the_next_stage_draws_what_the_last_one_did(world, tmp_path):
    run_script(SFT, *words_of(world, tmp_path / "first", "--max_steps", 1, "--stage", "align"))
    words = words_of(world, tmp_path / "second", "--num_train_epochs", 1, "--per_device_train_batch_size", 6)
    words = words[: words.index("--elastic")] + words[words.index("--elastic") + 2 :]
    words[words.index("--model_name_or_path") + 1] = tmp_path / "first"
    lora = ["--use_peft", "--lora_r", 2, "--merge"]
    run_script(SFT, *words, *lora)
    draw, name = parse_elastic("1,4,9"), str(world / "data.jsonl")
    assert logged(tmp_path / "second") == [sum((1 + i % 2) * draw.of(42, name, i, 0) for i in range(6))]
    merged = HoneybeeConfig.from_pretrained(tmp_path / "second" / "merged")
    assert merged.projector_config.elastic_num_query_tokens == [1, 4, 9]


def test_a_dry_run_counts_the_real_tokens(world, tmp_path):
    more = ["--dry_run", "--max_steps", 2, "--per_device_train_batch_size", 6]
    said = run_script(SFT, *words_of(world, tmp_path / "out", *more)).stdout
    assert "16 patches -> c-abs -> 1 (25%), 4 (50%) or 9 (25%) visual tokens" in said
    name = str(world / "data.jsonl")
    assert f"{sum((1 + i % 2) * DRAW.of(42, name, i, 0) for i in range(6))} of them visual" in said


def test_the_preview_counts_the_real_tokens(tmp_path, capsys):
    data = write_dataset(tmp_path, [sample(index) for index in range(6)])
    save_tiny(tmp_path / "model", elastic=True)
    path = tmp_path / "run.yaml"

    def mean(elastic: str | None, *words) -> float:
        said = {"max_steps": 2, "mixture": recipe_of(data)}
        path.write_text(json.dumps({**said, **({"elastic": elastic} if elastic else {})}))
        preview(["--config", str(path), "--processor", str(tmp_path / "model"), "--show", "0", *words])
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("own"))
        return float(row.split()[-1])

    assert mean("16") == mean("9") + 7 == mean(None, "--elastic", "16")
    assert mean("9") - 5 < mean(None) < mean("9") + 7
    with pytest.raises(SystemExit, match="error: --elastic '4,x'"):
        mean("4,x")


def refused(*words) -> str:
    """What is said of a run's model."""
    with pytest.raises(ValueError) as error:
        load_config_and_processor(parse_arguments(list(map(str, [*words, "--use_cpu", "--bf16", "False"]))))
    return str(error.value)


def test_wrong_numbers_for_a_model(world, tmp_path):
    have = ["--dataset", "x.jsonl", "--output_dir", tmp_path, "--model_name_or_path", world / "model"]
    assert "5 is not a perfect square" in refused(*have, "--elastic", "4,5")
    assert "4, has to be among the numbers" in refused(*have, "--elastic", "9,16")
    assert "an adapter has no config of its own" in refused(*have, "--elastic", "4,9", "--use_peft")
    for kind in ("d-abs", "resampler"):
        processor = tiny_processor(9)
        model = tiny_model(kind, config={"image_token_id": processor.image_token_id}, num_query_tokens=9)
        for part in (model, processor):
            part.save_pretrained(tmp_path / kind)
        words = ["--dataset", "x.jsonl", "--output_dir", tmp_path, "--model_name_or_path", tmp_path / kind]
        for numbers in ("9,16", "4,9,16", "1,9,25"):
            assert "has learned queries for 9 visual tokens, and 9 has to be the largest" in refused(
                *words, "--elastic", numbers
            )
    new = ["--dataset", "x.jsonl", "--output_dir", tmp_path]
    new += ["--vision_model", world / "vision", "--text_model", world / "text", "--projector"]
    twice = json.dumps({**NEW_PROJECTOR, "elastic_num_query_tokens": [4, 9]})
    assert "give one of them" in refused(*new, twice, "--elastic", "4,9")
    linear = json.dumps({"projector_type": "linear"})
    assert "makes one visual token of each patch" in refused(*new, linear, "--elastic", "4,9")
