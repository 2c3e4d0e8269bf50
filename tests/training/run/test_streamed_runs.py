# SPDX-License-Identifier: Apache-2.0
"""`training/sft.py` on a stream: in one process and two, killed and resumed, with wrong settings."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import SFT, SHORT_RUN, picture, run_script, sample, save_joined, write_dataset
from tests.training.test_sft_mixture import RUN_SFT, TWO, TWO_ON_CPU
from training.run.checkpoints import changes_since, mark_run
from training.run.dry_run import dry_run
from training.run.plan import make_plan
from training.run.settings import parse_arguments

ROWS = 150


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_joined(root)
    (root / "data").mkdir()
    picture().save(root / "data" / "p.png")
    for number in range(3):
        rows = [conversation(index) for index in range(number * 50, number * 50 + 50)]
        (root / "data" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_dataset(root / "val", [sample(i) for i in range(4)])
    write_dataset(root / "text_only", [sample(i, image=False) for i in range(30)])
    return root


def conversation(index):
    said = [{"role": "user", "content": f"What is {index}?"}, {"role": "assistant", "content": f"a brown dog {index}"}]
    return {"messages": said, "images": ["p.png"] * (index % 4 < 3)}


def arguments(world, *more):
    stream = ["--dataset", world / "data" / "*.jsonl", "--streaming", "--buffer_size", 30]
    return [*map(str, [*SHORT_RUN, "--logging_steps", 1, "--model_name_or_path", world / "model", *stream, *more])]


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_two_ranks_with_two_workers_each_read_what_one_process_reads(batching, world, tmp_path):
    shared = arguments(world, "--max_steps", 12, "--batching", batching)
    one = ["--per_device_train_batch_size", 12, "--output_dir", tmp_path / "one"]
    two = ["--per_device_train_batch_size", 6, "--dataloader_num_workers", 2, "--output_dir", tmp_path / "two"]
    run_script(RUN_SFT, "record", tmp_path / "of_one", *shared, *one)
    run_script(*TWO, SFT, *shared, *two, env=TWO_ON_CPU)

    batches = json.loads((tmp_path / "of_one" / "0.json").read_text())["batches"]
    read = [text for batch in batches for _, _, text in batch]
    assert len(read) == len(set(read)) == 144 <= ROWS, "no record twice"
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-5)


def test_ranks_are_disjoint(world, tmp_path):
    shared = arguments(world, "--max_steps", 12, "--per_device_train_batch_size", 6)
    run_script(*TWO, RUN_SFT, "record", tmp_path / "ranks", *shared, "--output_dir", tmp_path / "out", env=TWO_ON_CPU)
    ranks = [json.loads((tmp_path / "ranks" / f"{rank}.json").read_text())["batches"] for rank in range(2)]
    first, second = ([index for batch in rank for _, index, _ in batch] for rank in ranks)
    assert sorted(first + second) == list(range(144))
    in_turn = itertools.chain(*zip(*ranks))
    assert [index for batch in in_turn for _, index, _ in batch] == list(range(144))


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_the_weights_end_bitwise_equal(processes, world, tmp_path):
    saving = ["--save_strategy", "steps", "--save_steps", 3, "--save_total_limit", 2, "--dataloader_num_workers", 2]
    shared = arguments(world, "--max_steps", 20, "--per_device_train_batch_size", 4, *saving)
    launch = [*TWO, SFT] if processes == 2 else [SFT]
    env = TWO_ON_CPU if processes == 2 else {"OMP_NUM_THREADS": "1"}
    run_script(*launch, *shared, "--output_dir", tmp_path / "whole", env=env)
    run_script(RUN_SFT, "kill", processes, "7,14", *shared, "--output_dir", tmp_path / "killed", env=env)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    summary = (tmp_path / "killed" / "run_summary.md").read_text()
    assert "| stream |" in summary and "Skipped by the first process: nothing skipped" in summary


def test_a_dry_run_and_a_plan_name_the_stream(world, tmp_path):
    more = ["--max_steps", 5, "--output_dir", tmp_path / "out", "--eval_dataset", world / "val" / "data.jsonl"]
    more += ["--eval_strategy", "steps", "--eval_steps", 2]
    text = dry_run(parse_arguments(arguments(world, *more, "--dry_run")))
    assert "a stream of 3 files, 30 records shuffled together" in text and "(10 samples read: " in text
    for stage, data in (("align", "data/*.jsonl"), ("instruct", "text_only/data.jsonl")):
        plan = make_plan(parse_arguments(arguments(world, *more, "--stage", stage, "--dataset", world / data)))
        assert len(plan.dataset) == 10 and len(plan.evaluation) == 4


def test_runs_go_on_with_the_same_stream_alone(tmp_path):
    training = parse_arguments(
        ["--dataset", "x", "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False"]
    ).training
    own = {"name": "mine", "path": "x"}
    mark_run({"dataset": "x", "mixture": {"own": [own]}}, training)  # of a release without streams
    young = {**own, "streaming": False, "buffer_size": 1000}
    now = {"dataset": "x", "streaming": False, "buffer_size": 1000, "mixture": {"eval": {}, "own": [young]}}
    assert changes_since(now, training) == []
    assert changes_since({**now, "streaming": True}, training) == ["streaming was False and is True"]
    assert changes_since({**now, "mixture": {"eval": {}, "own": [{**young, "streaming": True}]}}, training)
    mark_run({**now, "streaming": True}, training)
    (changed,) = changes_since({**now, "streaming": True, "buffer_size": 10}, training)
    assert changed == "buffer_size was 1000 and is 10"


WRONG = [
    ([], "max_steps=-1: a stream has no end"),
    (["--max_steps", 4, "--eval_split_size", 0.1], "eval_split_size 0.1: nothing can be kept of a stream"),
    (["--max_steps", 4, "--ignore_data_skip"], "ignore_data_skip would read the stream from its start"),
    (["--max_steps", 4, "--buffer_size", 0], "buffer_size=0 must be at least 1"),
    (["--max_steps", 4, "--streaming", "False"], "--buffer_size 30 shuffles a stream; give --streaming"),
    (["--max_steps", 4, "--streaming", "False", "--buffer_size", 1000], "a pattern of files is for --streaming"),
    (["--max_steps", 4, "--dataset", "{world}/data/*.tar"], "no file matches"),
    (["--max_steps", 4, "--dataset_split", "val"], "no split 'val'"),
    (["--max_steps", 4, "--dataset", "{world}/data/*"], "several types|files of type jsonl, png"),
    (
        ["--max_steps", 4, "--stage", "align", "--dataset", "{world}/text_only/*.jsonl"],
        "none of the first 8 samples has an image",
    ),
    (["--max_steps", 4, "--max_length", 5], "leaves no room|could not be used"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_settings_are_said_before_weights_are_read(case, world, tmp_path):
    more, words = WRONG[case]
    more = [str(argument).replace("{world}", str(world)) for argument in more]
    with pytest.raises((ValueError, OSError, RuntimeError), match=words):
        make_plan(parse_arguments(arguments(world, "--output_dir", tmp_path / "out", *more)))


def test_a_stream_and_a_mixture_exclude_each_other(world, tmp_path):
    given = [str(part) for part in ("--mixture", world / "r.yaml", "--streaming", "--max_steps", 4)]
    with pytest.raises(ValueError, match="--streaming and --buffer_size are for --dataset"):
        make_plan(
            parse_arguments([*map(str, SHORT_RUN), *given, "--model_name_or_path", "x", "--output_dir", str(tmp_path)])
        )
