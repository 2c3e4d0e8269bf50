# SPDX-License-Identifier: Apache-2.0
"""Batches of equal tokens: every sample once, steps of one size, no batch above the limit, and the training of other batches."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file

from tests.tiny import SFT, SHORT_RUN, run_script, sample, save_joined, write_dataset
from tests.training.test_sft_mixture import TWO, TWO_ON_CPU, write_mixture
from training.trainer.token_batches import TokenBatches, deal_to_batches, deal_to_steps

LENGTHS = np.clip(np.random.default_rng(0).lognormal(5.4, 0.7, 4096).astype(int), 20, 1024)


def lengths_of(samples):
    return LENGTHS[samples].tolist()


def batches_of(**settings):
    given = {"num_samples": len(LENGTHS), "step_size": 128, "max_tokens": 4096, "processes": 8, "seed": 1, **settings}
    return TokenBatches(lengths_of, **given)


def steps_of(batches: TokenBatches) -> list[list[list[int]]]:
    rows, size = list(batches), batches.batches_per_step
    assert len(rows) == len(batches) and len(rows) % size == 0
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@pytest.mark.parametrize("max_tokens", [2048, 4096, 8192])
def test_steps_of_one_size_and_batches_of_one_length(max_tokens):
    batches = batches_of(max_tokens=max_tokens)
    steps = steps_of(batches)
    assert sorted(sum(sum(steps, []), [])) == list(range(len(LENGTHS)))
    assert {sum(map(len, step)) for step in steps} == {128}
    tokens = np.array([[LENGTHS[batch].sum() for batch in step] for step in steps])
    assert tokens.max() <= max_tokens
    # Eight processes: no batch that would not be needed, but for the multiple of eight.
    assert batches.batches_per_step - 8 < tokens.sum(axis=1).max() / max_tokens
    assert (tokens.max(axis=1) / tokens.mean(axis=1)).max() < 1.03
    drawn = LENGTHS[np.random.default_rng(1).permutation(len(LENGTHS))].reshape(-1, 8, 16).sum(axis=2)
    assert (drawn.max(axis=1) / drawn.mean(axis=1)).mean() > 1.1  # as many samples for each in place of tokens


def test_the_samples_of_a_step_do_not_depend_on_the_batches():
    def sets(**settings):
        return [sorted(sum(step, [])) for step in steps_of(batches_of(**settings))]

    assert sets() == sets(max_tokens=2048, processes=3) == sets(max_tokens=100_000, processes=1)
    assert sets() != sets(seed=2) and sets() != sets(epoch=lambda: 1)


def test_processes_take_turns():
    batches = batches_of(num_samples=1000)
    whole = list(batches)
    ranks = [list(BatchSamplerShard(batches, 8, rank, even_batches=False)) for rank in range(8)]
    assert {len(rank) for rank in ranks} == {len(whole) // 8}
    assert [batch for together in zip(*ranks) for batch in together] == whole


def test_what_is_left_of_an_epoch():
    """A last step of fewer samples, and none where not every batch would get one."""
    steps = steps_of(batches_of(num_samples=3 * 128 + 50))
    assert [sum(map(len, step)) for step in steps] == [128, 128, 128, 50]
    batches = batches_of(num_samples=3 * 128 + 5)
    assert [sum(map(len, step)) for step in steps_of(batches)] == [128, 128, 128]


def test_dealing():
    lengths = np.array([9, 1, 5, 5, 2, 8, 4, 6])
    steps = deal_to_steps(lengths, 2)
    assert sorted(np.concatenate(steps)) == list(range(8)) and [lengths[step].sum() for step in steps] == [20, 20]
    batches = deal_to_batches(lengths, 3)
    assert sorted(sum(batches, [])) == list(range(8))
    assert [int(lengths[batch].sum()) for batch in batches] == [14, 13, 13]


def test_samples_that_get_longer_are_said(caplog):
    """The start measures 64 steps; what comes behind them is trained on, with a warning."""
    short = np.where(np.arange(20_000) < 16_384, 100, 150)
    batches = TokenBatches(lambda samples: short[samples].tolist(), 20_000, 256, 1600, 4, shuffle=False)
    assert sum(map(len, batches)) == 20_000 - 20_000 % 256 or sum(map(len, batches)) == 20_000
    (said,) = {record.message for record in caplog.records}
    assert "more than max_tokens_per_batch=1600" in said


def test_a_step_that_cannot_be_dealt():
    with pytest.raises(ValueError, match="max_tokens_per_batch=900: 128 samples .* up to 1,024 tokens .* raise"):
        batches_of(max_tokens=900)
    with pytest.raises(ValueError, match="multiple of 200 processes"):
        batches_of(processes=200)


def test_data_that_fills_no_step():
    with pytest.raises(ValueError, match="max_tokens_per_batch=4096: 5 samples do not fill the 8 batches .* more data"):
        batches_of(num_samples=5)


def test_a_sample_as_long_as_a_batch():
    """Where not all samples are measured, so that a part of a batch is left for longer ones."""
    batches = TokenBatches(lambda samples: [100] * len(samples), 1000, step_size=8, max_tokens=100)
    assert batches.batches_per_step == 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_joined(root)
    rows = [sample(i, image=i % 3 > 0) for i in range(30)]
    for number, row in enumerate(rows):
        row["messages"][0]["content"][-1]["text"] *= 1 + number % 7
    write_dataset(root / "data", rows)
    write_mixture(root / "mixture")
    return root


def run(world, name, *arguments, before=(), env=None):
    out = world / name
    common = [*SHORT_RUN, "--model_name_or_path", world / "model", "--global_batch_size", 8, "--adam_epsilon", 1e-5]
    common += ["--learning_rate", 1e-3, "--logging_steps", 1, "--max_length", 200]
    run_script(*before, SFT, *common, *arguments, "--output_dir", out, env=env)
    return load_file(out / "model.safetensors"), json.loads((out / "trainer_state.json").read_text())


@pytest.mark.parametrize("kind", ["dataset", "mixture"])
def test_the_same_training_in_any_batches(world, kind):
    """In one batch and in several; and in two processes."""
    data = ["--dataset", world / "data" / "data.jsonl", "--num_train_epochs", 2]
    several = {}
    if kind == "mixture":
        data = ["--mixture", world / "mixture" / "recipe.yaml", "--max_steps", 4]
        several = {"before": TWO, "env": TWO_ON_CPU}
    one, state = run(world, f"{kind}-one", *data, "--max_tokens_per_batch", 100_000)
    many, small = run(world, f"{kind}-many", *data, "--max_tokens_per_batch", 250, **several)
    rows = [[row for row in found["log_history"] if "loss" in row] for found in (state, small)]
    assert len(rows[0]) == len(rows[1]) == (4 if kind == "mixture" else 8)
    for one_row, small_row in zip(*rows):
        assert abs(one_row["loss"] - small_row["loss"]) < 1e-4
        assert one_row["padding_share"] == small_row["padding_share"] == 0
    before = load_file(world / "model" / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    assert any(not torch.equal(one[name], before[name]) for name in one)


def test_stopped_and_resumed(world):
    """In the middle of the second epoch."""
    data = [
        "--dataset",
        world / "data" / "data.jsonl",
        "--num_train_epochs",
        2,
        "--save_strategy",
        "steps",
        "--save_steps",
        5,
    ]
    data += ["--max_tokens_per_batch", 250]
    whole, _ = run(world, "whole", *data)
    shutil.copytree(world / "whole", world / "stopped")
    for path in (world / "stopped").iterdir():
        if path.name not in ("honeybee_run.json", "checkpoint-5"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed, _ = run(world, "stopped", *data, "--resume")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_dry_run(world):
    arguments = [SFT, "--dry_run", *SHORT_RUN, "--model_name_or_path", world / "model", "--global_batch_size", 8]
    arguments += ["--dataset", world / "data" / "data.jsonl", "--max_length", 200, "--max_tokens_per_batch", 250]
    said = run_script(*arguments, "--output_dir", world / "dry").stdout
    (accumulated,) = re.findall(
        r"A step: 8 samples = at most 250 tokens a device x (\d+) accumulated x 1 process", said
    )
    assert int(accumulated) >= 2
