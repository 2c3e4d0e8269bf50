# SPDX-License-Identifier: Apache-2.0
"""Benchmarks asked while training: their scores are those of evaluation/run.py, and training goes on as without them."""

import json
from types import SimpleNamespace

import pytest

from evaluation.json_files import read_lines
from evaluation.tasks import TASKS
from tests.evaluation.make_data_root import make_data_root
from tests.tiny import REPOSITORY, SHORT_RUN, run_script, sample, save_joined, tiny_model, write_dataset
from tests.training.run.test_evaluation import SFT, history, same
from tests.training.test_sft_mixture import RUN_SFT, TWO, TWO_ON_CPU
from training.run.plan import make_plan
from training.run.settings import parse_arguments
from training.trainer.engines import WholeCopy, shards_weights

ASKED = ("pope", "mme", "mmbench", "scienceqa")
# sft.py with the answers to the benchmarks in the file that the first argument names: a line for each task and evaluation.
RECORDING = """
import json, sys
from training import sft
from training.trainer import benchmarks

path = sys.argv.pop(1)
check = benchmarks.check_records

def recording(task, records, source):
    with open(path, "a") as file:
        file.write(json.dumps({"task": task.name, "answers": {r["id"]: r["pred"] for r in records}}) + "\\n")
    check(task, records, source)

benchmarks.check_records = recording
sft.main()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, a dataset and benchmarks, each in a folder of its own."""
    root = tmp_path_factory.mktemp("world")
    save_joined(root)
    rows = [sample(i, image=i % 4 < 3) for i in range(16)]
    for i, row in enumerate(rows):
        row["messages"][1]["content"][0]["text"] = "yes" if i % 3 else "no"
    write_dataset(root / "data", rows)
    make_data_root(root / "benchmarks")
    return root


def arguments(root, *more) -> list:
    run = ["--dataset", root / "data" / "data.jsonl", "--model_name_or_path", root / "model"]
    return [*run, "--logging_steps", 2, *SHORT_RUN, *more]


def asking(root, steps, *more, tasks=ASKED) -> list:
    data = ["--eval_tasks", *tasks, "--eval_tasks_data", root / "benchmarks"]
    return [*data, "--eval_strategy", "steps", "--eval_steps", steps, *more]


def answers(path) -> list[dict]:
    """Of each evaluation, task -> id -> answer."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    number = len({row["task"] for row in rows})
    return [{row["task"]: row["answers"] for row in rows[i : i + number]} for i in range(0, len(rows), number)]


def test_scores_are_those_of_the_checkpoint(world, tmp_path):
    out, limit = tmp_path / "out", ["--eval_limit", 20, "--per_device_eval_batch_size", 4]
    saved = ["--save_strategy", "steps", "--save_steps", 2, "--max_steps", 4, "--learning_rate", 1e-3]
    command = ["-c", RECORDING, tmp_path / "answers", *arguments(world, *saved), *asking(world, 2, *limit)]
    run_script(*command, "--output_dir", out, env={"PYTHONPATH": str(REPOSITORY)})
    asked = answers(tmp_path / "answers")
    for number, step in enumerate((2, 4)):
        there = tmp_path / f"evaluation-{step}"
        command = [REPOSITORY / "evaluation" / "run.py", "--model", out / f"checkpoint-{step}", "--dtype", "float32"]
        command += ["--tasks", ",".join(ASKED), "--data_root", world / "benchmarks", "--output", there]
        run_script(*command, "--limit", 20, "--batch_size", 4, env={"ACCELERATE_USE_CPU": "true"})
        for name in ASKED:
            records = read_lines(there / name / "predictions.jsonl")
            assert {record["id"]: record["pred"] for record in records} == asked[number][name]
            scores = json.loads((there / name / "scores.json").read_text())
            assert history(out, f"eval_{name}")[step] == scores["score"]
            assert "a subset of the questions: --limit 20" in scores["notes"]
            parts = {part: value for part, value in scores["summary"].items() if "/" not in part}
            for part in list(parts)[1:]:
                assert history(out, f"eval_{name}_{part}")[step] == parts[part]
    assert len(set(asked[1]["mme"].values())) > 1, "the model looks at what it is asked"
    page = (out / "run_summary.md").read_text()
    assert "| MME | 20 |" in page and (out / "tasks.png").read_bytes().startswith(b"\x89PNG")

    run_script(SFT, *arguments(world, *saved), "--output_dir", tmp_path / "without")
    assert same(out / "model.safetensors", tmp_path / "without" / "model.safetensors")


def test_training_and_resuming_are_those_without(world, tmp_path):
    run = [*arguments(world), "--max_steps", 12, "--use_peft", "--lora_r", 4]  # LoRA has a dropout
    loss = ["--eval_dataset", world / "data" / "data.jsonl"]
    for name, evaluation in (("without", []), ("with", [*asking(world, 3, tasks=["pope", "scienceqa"]), *loss])):
        out = ["--output_dir", tmp_path / name]
        # Both are resumed: older releases of accelerate do not go on with the random numbers of a dropout.
        run_script(RUN_SFT, "stop", 7, *run, *evaluation, *out)
        run_script(SFT, *run, *evaluation, *out, "--resume")
    assert same(*(tmp_path / name / "adapter_model.safetensors" for name in ("without", "with")))
    assert list(history(tmp_path / "with", "eval_pope")) == list(history(tmp_path / "with")) == [3, 6, 9, 12]
    rows = json.loads((tmp_path / "with" / "trainer_state.json").read_text())["log_history"]
    kept = [row for row in rows if "loss" in row]
    assert all("mean_token_accuracy" in row for row in kept), (
        "TRL's numbers of training are not those of the benchmarks"
    )


def test_two_processes_answer_a_share_each(world, tmp_path):
    run = [*arguments(world), *asking(world, 2, "--eval_on_start"), "--max_steps", 2]
    run += ["--per_device_eval_batch_size", 3, "--eval_limit", 16]
    run_script(SFT, *run, "--output_dir", tmp_path / "one")
    run += ["--per_device_train_batch_size", 1]
    run_script(*TWO, SFT, *run, "--output_dir", tmp_path / "two", env=TWO_ON_CPU)
    for task in ASKED:
        one, two = (history(tmp_path / name, f"eval_{task}") for name in ("one", "two"))
        assert list(one) == list(two) == [0, 2] and one[0] == two[0]


def test_the_best_by_a_benchmark_is_kept(world, tmp_path):
    best = ["--load_best_model_at_end", "--metric_for_best_model", "eval_mme", "--early_stopping_patience", 2]
    saved = ["--save_strategy", "steps", "--save_steps", 2, "--max_steps", 40, "--output_dir", tmp_path / "out"]
    result = run_script(SFT, *arguments(world, *saved), *asking(world, 2, *best, tasks=["mme"]))
    scores = history(tmp_path / "out", "eval_mme")
    step = max(scores, key=scores.get)
    assert max(scores) == step + 4 < 40, "two evaluations without a better one"
    assert same(tmp_path / "out" / "model.safetensors", tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors")
    assert f"The best model is that of checkpoint-{step}: eval_mme" in (tmp_path / "out" / "run_summary.md").read_text()
    assert "early stopping is disabled" not in result.stdout
    more = asking(world, 2, *best[:-1], 3, "--eval_limit", 8, tasks=["mme"])
    again = run_script(SFT, *arguments(world, *saved), *more, "--resume", check=False)
    assert again.returncode and "eval_limit was None and is 8" in again.stdout


def test_a_dry_run_counts_the_questions(world, tmp_path):
    words = [
        *arguments(world, "--max_steps", 10, "--output_dir", tmp_path / "out"),
        *asking(world, 5, "--eval_limit", 9),
    ]
    plan = make_plan(parse_arguments(list(map(str, words))))
    # Of MME two questions of an image, of MMBench all rotations of a question.
    assert {name: len(asked) for name, asked in plan.tasks.items()} == {
        "pope": 9,
        "mme": 8,
        "mmbench": 9,
        "scienceqa": 8,
    }
    text = run_script(SFT, *words, "--dry_run").stdout
    assert "Evaluation: the answers to pope (9 questions), mme (8 questions)," in text and "every 5 of 10 steps" in text


ASKING = ["--eval_tasks", "pope", "--eval_tasks_data", "{benchmarks}", "--eval_strategy", "epoch"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--eval_tasks", "pope,popo"], ["popo is no task", *ASKED]),
        (["--eval_tasks", "pope,llava_w"], ["llava_w has no score without a judge"]),
        (["--eval_tasks", "owl"], ["owl has no score"]),
        (["--eval_tasks", ","], ["nothing is no task"]),
        (["--eval_tasks_data", None], ["--eval_tasks_data DIR"]),
        (["--eval_tasks_data", "{benchmarks}/nowhere"], ["nowhere does not exist"]),
        (["--eval_tasks_data", "{data}"], ["pope", "coco_pope_adversarial.json does not exist"]),
        (["--eval_tasks", None], ["--eval_tasks_data", "is for the benchmarks of --eval_tasks"]),
        (["--eval_tasks", None, "--eval_tasks_data", None, "--eval_limit", "5"], ["--eval_limit 5", "--eval_tasks"]),
        (["--eval_limit", "0"], ["eval_limit=0", "at least 1"]),
        (["--eval_limit", "1", "--eval_tasks", "mme"], ["mme", "a limit of 1 leaves no question", "2 or more"]),
        (["--eval_strategy", "no"], ["--eval_tasks alone evaluates nothing", "--eval_strategy steps"]),
        (["--metric_for_best_model", "eval_mme"], ["'eval_mme'", "not evaluated", "eval_pope"]),
        (["--metric_for_best_model", "loss"], ["'loss'", "not evaluated", "eval_pope"]),
        (["--metric_for_best_model", "eval_pope", "--greater_is_better", "False"], ["greater_is_better=False"]),
    ],
)
def test_wrong_settings_are_said_before_a_weight_is_read(more, words, world, tmp_path):
    given = dict(zip(ASKING[::2], ASKING[1::2])) | dict(zip(more[::2], more[1::2]))
    flags = [word for name, value in given.items() if value is not None for word in (name, value)]
    flags = [str(word).format(benchmarks=world / "benchmarks", data=world / "data") for word in flags]
    run = arguments(world, "--max_steps", 4, "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError) as error:
        make_plan(parse_arguments([*map(str, run), *flags]))
    assert all(word in str(error.value) for word in words), error.value


def test_names_are_a_list_in_a_yaml_file_or_one_text(tmp_path):
    for text in ("pope,mme", "[pope, mme]", "'pope, mme,pope'"):
        (tmp_path / "run.yaml").write_text(f"eval_tasks: {text}\n")
        words = ["--config", tmp_path / "run.yaml", "--use_cpu", "--bf16", "False", "--output_dir", tmp_path]
        assert parse_arguments(list(map(str, words))).honeybee.eval_tasks == ["pope", "mme"]
    assert all(task.name == name for name, task in TASKS.items())


def test_engines_whose_model_cannot_be_asked():
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1), deepspeed_plugin=None)
    with pytest.raises(ValueError, match="FSDP1 shards; use fsdp_version 2"):
        shards_weights(state)
    for stage, sharded in ((2, False), (3, True)):
        assert shards_weights(SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))) == sharded
    model = tiny_model()
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantized model .* train it with DDP"):
        WholeCopy(model)
