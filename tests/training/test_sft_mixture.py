# SPDX-License-Identifier: Apache-2.0
"""`training/sft.py` on a mixture: in one process and two, killed and resumed, with files that are broken."""

import io
import itertools
import json
import random
import sys
import tarfile

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerState
from trl import SFTTrainer

from tests.tiny import REPOSITORY, SFT, new_model, picture, run_script, save_clip, save_llama
from training import sft
from training.run.checkpoints import last_whole_checkpoint

RUN_SFT = REPOSITORY / "tests" / "training" / "run_sft.py"
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
TWO_ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
SHORT = [
    "--learning_rate", 1e-2, "--logging_steps", 1, "--bf16", "False", "--report_to", "none", "--save_strategy", "no",
    "--dataloader_pin_memory", "False", "--use_cpu", "--max_length", 200, "--adam_epsilon", 1e-6,
]  # fmt: skip


def write_mixture(folder, num_questions=24, broken=0):
    """A stream of captions, text without images, and questions about images, some of them `broken`."""
    (folder / "coyo" / "coyo100m").mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / "coyo" / "coyo100m" / f"{shard:05}.tar", "w") as tar:
            for i in range(10):
                image = io.BytesIO()
                picture(i).save(image, "JPEG")
                for suffix, data in (("jpg", image.getvalue()), ("txt", f"caption {shard} {i}".encode())):
                    member = tarfile.TarInfo(f"{shard}{i:04}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (folder / "images").mkdir()
    rows = {"text": [], "questions": []}
    for i in range(num_questions):
        picture(i).save(folder / "images" / f"{i}.png")
        if i < broken:
            (folder / "images" / f"{i}.png").write_bytes(b"not an image")
        for name, images in (("text", []), ("questions", [f"images/{i}.png"])):
            messages = [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"a dog {i}"}]
            rows[name].append({"messages": messages, "images": images})
    for name, samples in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    settings = {
        "data_root": str(folder),
        "datasets": ["coyo"],
        "own": [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in rows],
        "balancing": "per-dataset",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"mixture": settings}))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_clip(root / "vision")
    save_llama(root / "text")
    write_mixture(root / "data")
    return root


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def test_two_ranks_read_the_stream_of_one_and_have_its_losses(world, tmp_path):
    arguments = [*new_model(world), *SHORT, "--mixture", world / "data" / "recipe.yaml", "--max_steps", 8]
    one = ["--per_device_train_batch_size", 4, "--output_dir", tmp_path / "one"]
    two = ["--per_device_train_batch_size", 2, "--output_dir", tmp_path / "two"]
    run_script(RUN_SFT, "record", tmp_path / "of_one", *arguments, *one)
    run_script(*TWO, RUN_SFT, "record", tmp_path / "of_two", *arguments, *two, env=TWO_ON_CPU)

    alone = json.loads((tmp_path / "of_one" / "0.json").read_text())
    ranks = [json.loads((tmp_path / "of_two" / f"{rank}.json").read_text()) for rank in range(2)]
    assert alone["world_size"] == 1 and [rank["world_size"] for rank in ranks] == [2, 2]
    # A thread of the process group that is left may abort the process while the interpreter ends.
    ends = {path.name for folder in ("of_one", "of_two") for path in (tmp_path / folder).iterdir()} - {
        "0.json",
        "1.json",
    }
    assert ends == {"0.exit_functions", "0.interpreter", "1.exit_functions"}
    assert not (tmp_path / "of_two" / "0.interpreter").exists()
    # The batches of the ranks in turn; the same record may be drawn twice, so the order is what tells them apart.
    in_turn = itertools.chain(*zip(*(rank["batches"] for rank in ranks)))
    stream = list(itertools.chain(*alone["batches"]))
    assert list(itertools.chain(*in_turn)) == stream and len(stream) == 32
    assert {dataset for dataset, *_ in stream} == {"coyo", "text", "questions"}
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    assert len(losses(tmp_path / "one")) == 8


@pytest.mark.parametrize("processes, kills", [(1, 3), (2, 2)])
def test_killed_at_random_steps_the_weights_end_bitwise_equal(processes, kills, world, tmp_path):
    steps = sorted(random.sample(range(11, 40), kills))
    print("killed after step", steps)
    arguments = [
        *new_model(world), *SHORT, "--mixture", world / "data" / "recipe.yaml", "--stage", "instruct", "--max_steps", 40,
        "--per_device_train_batch_size", 2, "--save_strategy", "steps", "--save_steps", 3, "--save_total_limit", 2,
    ]  # fmt: skip
    env = {"OMP_NUM_THREADS": "1"}
    if processes == 1:
        run_script(SFT, *arguments, "--output_dir", tmp_path / "whole", env=env)
    else:
        run_script(*TWO, SFT, *arguments, "--output_dir", tmp_path / "whole", env=TWO_ON_CPU)
    killed = [*arguments, "--output_dir", tmp_path / "killed"]
    run_script(RUN_SFT, "kill", processes, ",".join(map(str, steps)), *killed, env=env)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path):
    for step, whole in ((9, True), (10, True), (11, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        TrainerState().save_to_json(str(folder / "trainer_state.json"))
        torch.save(torch.get_rng_state(), folder / "rng_state.pth")
        if not whole:
            (folder / "trainer_state.json").write_text('{"epoch": 0.')
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    states = tmp_path / "checkpoint-10" / "rng_state.pth"
    states.write_bytes(states.read_bytes()[:-100])
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")


def test_broken_files_are_counted_and_too_many_stop_the_run(world, tmp_path):
    few, many = (write_mixture(tmp_path / str(n), num_questions=100, broken=n) for n in (3, 30))
    arguments = [
        *new_model(world), *SHORT, "--set", "datasets=[]", "--max_steps", 30, "--per_device_train_batch_size", 8,
        "--dataloader_num_workers", 2, "--output_dir",
    ]  # fmt: skip
    result = run_script(SFT, "--mixture", few, *arguments, tmp_path / "few")
    assert "questions: " in result.stdout and " corrupt image" in result.stdout and len(losses(tmp_path / "few")) == 30
    result = run_script(SFT, "--mixture", many, *arguments, tmp_path / "many", check=False)
    assert result.returncode == 1
    assert "killed by signal" not in result.stdout and "Traceback" not in result.stdout
    message = result.stdout[result.stdout.rindex("error: ") :]
    assert "of questions could not be used" in message and "max_bad_fraction=0.1: questions: " in message


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--mixture", "gone.yaml", "--max_steps", 4], ["gone.yaml", "does not exist"]),
        (["--mixture", "{recipe}"], ["max_steps=-1", "no end"]),
        (["--mixture", "{recipe}", "--max_steps", 4, "--dataset", "x.jsonl"], ["--dataset x.jsonl", "give one"]),
        (["--mixture", "{recipe}", "--max_steps", 4, "--ignore_data_skip"], ["ignore_data_skip"]),
        (["--mixture", "{recipe}", "--max_steps", 4, "--dataset_split", "val"], ["--dataset_split val", "`split`"]),
        (
            ["--mixture", "{recipe}", "--max_steps", 4, "--set", "turns.max_turns={text: 5}"],
            ["turns.max_turns='text' is unknown", "coyo"],
        ),
        (
            ["--mixture", "{recipe}", "--max_steps", 4, "--set", "balancing=fair", "seed=x"],
            ["balancing='fair'", "seed"],
        ),
        (["--set", "balancing=per-task", "--max_steps", 4, "--dataset", "x.jsonl"], ["--set", "--mixture"]),
        (
            ["--mixture", "{recipe}", "--max_steps", 4, "--set", "templates={recipe}"],
            ["recipe.yaml: a problem", "should be a dict that is not empty"],
        ),
        (
            ["--mixture", "{recipe}", "--max_steps", 4, "--stage", "align", "--set", "datasets=[sharegpt]", "own=[]"],
            ["llava_v1_5_sharegpt40k.json"],
        ),
        (
            [
                "--mixture",
                "{recipe}",
                "--max_steps",
                4,
                "--stage",
                "align",
                "--set",
                "datasets=[]",
                "exclude=[questions]",
            ],
            ["first 32 samples has an image", "captioning dataset", "--stage instruct"],
        ),
    ],
)
def test_wrong_mixtures_are_named_before_training(arguments, words, world, tmp_path, monkeypatch):
    arguments = [str(a).replace("{recipe}", str(world / "data" / "recipe.yaml")) for a in arguments]
    monkeypatch.setattr(
        sys, "argv", ["sft.py", *map(str, [*new_model(world), *SHORT, *arguments, "--output_dir", tmp_path / "out"])]
    )
    monkeypatch.setattr(SFTTrainer, "train", lambda *_, **__: pytest.fail("training started"))
    with pytest.raises(SystemExit) as exit:
        sft.main()
    assert not (tmp_path / "out").exists()
    assert all(word in str(exit.value) for word in words), str(exit.value)
