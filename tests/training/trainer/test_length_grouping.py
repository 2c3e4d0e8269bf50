# SPDX-License-Identifier: Apache-2.0
"""Batches of about one length: little padding, every sample once, the same after a restart, ranks apart."""

import json
import random
import shutil

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from tests.tiny import SFT, picture, run_script, save_clip, save_llama, tiny_processor
from training.collator import HoneybeeDataCollator
from training.conversations import load_conversations
from training.recipe.mixture import Mixture, Source
from training.recipe.stream import Stream
from training.trainer.length_grouping import LengthGroupedSampler, dataset_lengths, mixture_lengths

LENGTHS = np.random.default_rng(0).lognormal(5, 0.7, 1000).astype(int)


def lengths_of(samples):
    return LENGTHS[samples].tolist()


def padding(order, batch_size):
    batches = [LENGTHS[order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    slots = sum(len(batch) * batch.max() for batch in batches)
    return 1 - sum(batch.sum() for batch in batches) / slots


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sample_once_with_little_padding(shuffle):
    sampler = LengthGroupedSampler(lengths_of, 1000, 16, seed=1, shuffle=shuffle)
    order = list(sampler)
    assert sorted(order) == list(range(1000)) and len(sampler) == 1000
    assert padding(order, 4) < 0.08 < 0.35 < padding(np.random.default_rng(0).permutation(1000), 4)
    # Not from short to long: a run of batches of one length would bias the end of a window.
    means = [LENGTHS[order[start : start + 16]].mean() for start in range(0, 256, 16)]
    assert abs(np.corrcoef(means, np.arange(16))[0, 1]) < 0.7


def test_windows_follow_one_another():
    """Without shuffling a window holds its own samples: a mixture is read about in order."""
    order = list(LengthGroupedSampler(lengths_of, 1000, 16, seed=1, shuffle=False, window=4))
    for start in range(0, 1000, 64):
        assert sorted(order[start : start + 64]) == list(range(start, min(start + 64, 1000)))


def test_seed_and_epoch_decide_alone():
    def order(seed, epoch):
        return list(LengthGroupedSampler(lengths_of, 1000, 16, seed=seed, epoch=lambda: epoch))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_lengths_are_read_window_by_window():
    measured = []

    def lengths(samples):
        measured.extend(samples)
        return lengths_of(samples)

    order = iter(LengthGroupedSampler(lengths, 1000, 16, window=4))
    next(order)
    assert len(measured) == 64


def test_two_ranks_share_batches_of_one_length():
    sampler = LengthGroupedSampler(lengths_of, 1000, 16, seed=1, shuffle=False)
    whole = list(sampler)
    ranks = [list(BatchSamplerShard(BatchSampler(sampler, 8, False), 2, rank)) for rank in range(2)]
    together = [sample for pair in zip(*ranks) for batch in pair for sample in batch]
    assert together[:1000] == whole  # what follows makes the ranks even
    differences = [abs(LENGTHS[a].mean() - LENGTHS[b].mean()) for a, b in zip(*ranks)]
    assert np.median(differences) < 0.1 * LENGTHS.mean()


def conversation(number, images):
    return {
        "messages": [
            {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": "What " * (1 + number % 17)}]},
            {"role": "assistant", "content": "a brown dog " * (1 + number % 5)},
        ],
        "images": ["0.png"] * images,
    }  # fmt: skip


@pytest.fixture
def data(tmp_path):
    picture(0).save(tmp_path / "0.png")
    rows = [conversation(number, number % 2) for number in range(48)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data.jsonl"


def test_lengths_of_a_dataset_are_the_collators(data):
    collator = HoneybeeDataCollator(tiny_processor(), max_length=60, image_root=str(data.parent))
    dataset = load_conversations(str(data))
    found = dataset_lengths(dataset, collator)(list(range(48)))
    expected = [collator([dataset[number]])["input_ids"].shape[1] for number in range(48)]
    assert found == expected and max(found) == 60 > min(found)


class Counted:
    """Records that can only be read from the start, and how often that was."""

    def __init__(self, number):
        self.number, self.starts = number, 0

    def __iter__(self):
        self.starts += 1
        yield from (conversation(index, 0) for index in range(self.number))


def made_mixture(records):
    def render(record, rng: random.Random):
        return {"messages": record["messages"], "images": record["images"]}

    bad = [{"messages": [], "images": []}] * 5
    sources = [
        Source("stream", "captioning", Stream(records), render),
        Source("table", "vqa-open", [conversation(number, 0) for number in range(200)] + bad, render),
    ]
    return Mixture(sources, np.array([0.5, 0.5]), 600, seed=3, max_bad_fraction=0.5)


def test_a_mixture_is_grouped_without_reading_its_stream_anew():
    records = Counted(5000)
    mixture = made_mixture(records)
    collator = HoneybeeDataCollator(tiny_processor())
    lengths = mixture_lengths(mixture, collator, window=128)
    order = list(LengthGroupedSampler(lengths, 600, 8, shuffle=False, window=16))
    assert sorted(order) == list(range(600))

    straight = made_mixture(Counted(5000))
    samples = {draw: straight[draw] for draw in range(600)}
    records.starts = 0
    for draw in order:
        assert mixture[draw] == samples[draw]
    assert records.starts == 1
    found = lengths(order)
    same = [length == collator.lengths([samples[draw]])[0] for draw, length in zip(order, found)]
    assert same.count(False) <= 20  # records of no use, replaced when they are read
    assert mixture.skipped() == straight.skipped() != {}


def test_the_script_trains_and_resumes_exactly(data, tmp_path):
    """Stopped after 5 of 9 steps, in the middle of an epoch, and resumed: the same weights as without a stop."""
    save_clip(tmp_path / "vision")
    save_llama(tmp_path / "text")
    common = [
        "--stage", "instruct", "--dataset", data, "--vision_model", tmp_path / "vision", "--text_model", tmp_path / "text",
        "--projector", '{"projector_type": "c-abs", "num_query_tokens": 4, "hidden_size": 32, "depth": 1}', "--use_cpu",
        "--batching", "grouped", "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--bf16", "False",
        "--num_train_epochs", 1.5, "--logging_steps", 1, "--report_to", "none", "--learning_rate", 1e-2, "--dataloader_pin_memory", "False",
        "--save_strategy", "steps", "--save_steps", 5,
    ]  # fmt: skip
    run_script(SFT, *common, "--output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for path in (tmp_path / "stopped").iterdir():
        if path.name not in ("honeybee_run.json", "checkpoint-5"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_script(SFT, *common, "--output_dir", tmp_path / "stopped", "--resume_from_checkpoint", "true")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all((whole[name] == resumed[name]).all() for name in whole)
    state = json.loads((tmp_path / "stopped" / "trainer_state.json").read_text())
    assert state["global_step"] == 9
