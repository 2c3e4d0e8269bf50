# SPDX-License-Identifier: Apache-2.0
"""Evaluation while training: its loss, what it must not change, the best model, and early stopping."""

import json
import random

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerState

from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor
from tests.tiny import SFT, SHORT_RUN, picture, run_script, sample, save_joined, write_dataset
from tests.training.test_sft_mixture import RUN_SFT, TWO, TWO_ON_CPU
from training.collator import HoneybeeDataCollator
from training.run.checkpoints import changes_since, copy_model, mark_run
from training.run.plan import make_plan
from training.run.settings import parse_arguments
from training.trainer.trainer import learned_of_first

SHORT = ["--logging_steps", 2, *SHORT_RUN]


def answered(index: int, answer: str) -> dict:
    row = sample(index, image=index % 4 < 3)
    row["messages"][1]["content"][0]["text"] = answer
    return row


def long_answer(index: int) -> dict:
    return answered(index, " ".join(["a brown dog", *["in the picture"] * (index % 5), str(index)]))


def chance(index: int) -> dict:
    """What can be learned by heart alone, but for its form."""
    return answered(index, f"a brown dog {random.Random(index).randrange(10**6)}")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model and datasets, each in a folder of its own."""
    root = tmp_path_factory.mktemp("world")
    save_joined(root)
    write_dataset(root / "data", [sample(i, image=i % 4 < 3) for i in range(16)])
    write_dataset(root / "val", [long_answer(i) for i in range(20, 27)])
    write_dataset(root / "other", [long_answer(i) for i in range(30, 33)])
    write_dataset(root / "chance", [chance(i) for i in range(16)])
    write_dataset(root / "other_chance", [chance(i) for i in range(20, 27)])
    return root


def arguments(root, *more) -> list:
    return ["--dataset", root / "data" / "data.jsonl", "--model_name_or_path", root / "model", *SHORT, *more]


def evaluating(root, steps, *more, name="val") -> list:
    return ["--eval_dataset", root / name / "data.jsonl", "--eval_strategy", "steps", "--eval_steps", steps, *more]


def history(folder, key="eval_loss") -> dict[int, float]:
    """Step -> a number of the log."""
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row[key] for row in rows if key in row}


def same(one, other) -> bool:
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def loss_from_logits(model_folder, data) -> float:
    """The mean over all answers' tokens, sample by sample, from the model's logits."""
    model = HoneybeeForConditionalGeneration.from_pretrained(model_folder).eval()
    collate = HoneybeeDataCollator(HoneybeeProcessor.from_pretrained(model_folder), image_root=str(data.parent))
    total, number = 0.0, 0
    for line in data.read_text().splitlines():
        inputs = collate([json.loads(line)])
        labels = inputs.pop("labels")[0, 1:]
        with torch.no_grad():
            logs = model(**inputs).logits[0, :-1].double().log_softmax(dim=-1)
        learned = labels != -100
        total -= logs[learned].gather(1, labels[learned][:, None]).sum().item()
        number += int(learned.sum())
    return total / number


def test_the_loss_is_the_mean_over_learned_tokens_however_batched(world, tmp_path):
    data = world / "val" / "data.jsonl"
    # 7 samples: the last batches of two processes are filled with samples that have been there.
    run = [
        *arguments(world),
        *evaluating(world, 2),
        "--max_steps",
        2,
        "--eval_on_start",
        "--per_device_eval_batch_size",
    ]
    run_script(SFT, *run, 3, "--dataloader_num_workers", 1, "--output_dir", tmp_path / "packed")
    run_script(SFT, *run, 2, "--batching", "padded", "--output_dir", tmp_path / "padded")
    losses = history(tmp_path / "packed")
    assert list(losses) == [0, 2] and losses[0] > losses[2]
    assert losses[0] == pytest.approx(loss_from_logits(world / "model", data), abs=1e-5)
    assert losses[2] == pytest.approx(loss_from_logits(tmp_path / "packed", data), abs=1e-5)
    assert history(tmp_path / "padded") == pytest.approx(losses, abs=1e-5)
    for batch in (2, 3):
        out = tmp_path / f"two_{batch}"
        two = [SFT, *run, batch, "--per_device_train_batch_size", 1, "--output_dir", out]
        run_script(*TWO, *two, env=TWO_ON_CPU)
        assert history(out) == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_labels_behind_a_number_of_samples_are_left_out(packed):
    samples = [[-100, 5, 6], [-100, 7], [-100, 8]]
    if packed:
        inputs = {"labels": torch.tensor([sum(samples, [])]), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]])}
    else:
        inputs = {"labels": torch.tensor([row + [-100] * (3 - len(row)) for row in samples])}
    for number in (-1, 0, 1, 2, 3, 9):
        labels = learned_of_first(inputs, number)["labels"]
        assert labels[labels != -100].tolist() == [5, 6, 7, 8][: {-1: 0, 0: 0, 1: 2, 2: 3}.get(number, 4)]


def test_evaluation_changes_nothing_in_training_also_when_resumed_with_another(world, tmp_path):
    run = [*arguments(world), "--max_steps", 20, "--use_peft", "--lora_r", 4]  # LoRA has a dropout
    # Both are resumed: older releases of accelerate do not go on with the random numbers of a dropout.
    for name, before, after in (
        ("without", [], []),
        ("with", evaluating(world, 3), evaluating(world, 3, name="other")),
    ):
        out = ["--output_dir", tmp_path / name]
        run_script(RUN_SFT, "stop", 10, *run, *before, *out)
        run_script(SFT, *run, *after, *out, "--resume")
    assert same(*(tmp_path / name / "adapter_model.safetensors" for name in ("without", "with")))
    assert list(history(tmp_path / "with"))[:6] == [3, 6, 9, 12, 15, 18]  # and 20 on transformers 5
    page = (tmp_path / "with" / "run_summary.md").read_text()
    assert "| evaluation | 3 |" in page
    # Evaluating costs no throughput in the log.
    assert (
        history(tmp_path / "with", "samples_per_second").keys()
        == history(tmp_path / "without", "samples_per_second").keys()
    )


@pytest.fixture(scope="module")
def overfitted(world, tmp_path_factory):
    """A run on few samples, whose answers teach little about others, until that shows."""
    root = tmp_path_factory.mktemp("overfitted")
    config = root / "run.yaml"
    sets = {name: str(world / folder / "data.jsonl") for name, folder in (("val", "other_chance"), ("other", "other"))}
    settings = {
        "eval_dataset": sets,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "metric_for_best_model": "eval_val_loss",
    }
    settings |= {"load_best_model_at_end": True, "early_stopping_patience": 2}
    config.write_text(yaml.safe_dump(settings))
    run = [
        "--config",
        config,
        *arguments(world),
        "--dataset",
        world / "chance" / "data.jsonl",
        "--max_steps",
        80,
        "--save_strategy",
        "steps",
        "--save_steps",
        4,
    ]
    run_script(SFT, *run, "--output_dir", root / "out")
    return root, run


def test_overfitting_is_seen_and_the_best_model_kept(overfitted):
    root, _ = overfitted
    losses, last = history(root / "out", "eval_val_loss"), max(history(root / "out", "loss"))
    best = min(losses, key=losses.get)
    assert last == best + 8 < 80, "two evaluations without a better one"
    assert losses[best] < losses[4] and losses[best] < losses[last]
    assert list(history(root / "out", "eval_other_loss")) == list(losses)
    assert same(root / "out" / "model.safetensors", root / "out" / f"checkpoint-{best}" / "model.safetensors")
    assert not same(root / "out" / "model.safetensors", root / "out" / f"checkpoint-{last}" / "model.safetensors")
    page = (root / "out" / "run_summary.md").read_text()
    for words in (
        f"finished after {last} steps of 80, because the evaluation did not get better",
        f"| val | 7 | {losses[4]:.4f} | {losses[best]:.4f} | {best} | {losses[last]:.4f} |",
        "| other | 3 |",
        f"The best model is that of checkpoint-{best}: eval_val_loss {losses[best]:.4f}",
    ):
        assert words in page, words


def test_a_run_that_is_to_stop_early_is_killed_and_resumed(overfitted, tmp_path):
    root, run = overfitted
    losses = history(root / "out", "eval_val_loss")
    worse = min(losses, key=losses.get) + 5  # one evaluation without a better one has been counted then
    run_script(RUN_SFT, "kill", 1, worse, *run, "--output_dir", tmp_path / "out")
    assert history(tmp_path / "out", "eval_val_loss") == losses
    assert same(tmp_path / "out" / "model.safetensors", root / "out" / "model.safetensors")

    again = run_script(SFT, *run, "--output_dir", tmp_path / "out", "--resume", check=False)
    assert again.returncode and "raise --early_stopping_patience (now 2)" in again.stdout
    more = ["--early_stopping_patience", 3, "--resume"]
    run_script(SFT, *run, "--output_dir", tmp_path / "out", *more)
    assert len(history(tmp_path / "out", "eval_val_loss")) > len(losses)


def test_the_best_adapter_is_kept_and_merged(world, tmp_path):
    best = ["--load_best_model_at_end", "--greater_is_better", "False", "--save_strategy", "steps", "--save_steps", 2]
    run = [*arguments(world), "--max_steps", 12, *evaluating(world, 2), *best, "--use_peft", "--merge"]
    run += ["--learning_rate", 0.2, "--lr_scheduler_type", "constant", "--output_dir", tmp_path / "out"]
    run_script(SFT, *run)
    losses = history(tmp_path / "out")
    step = min(losses, key=losses.get)
    assert losses[step] < losses[12]
    name = "adapter_model.safetensors"
    assert same(tmp_path / "out" / name, tmp_path / "out" / f"checkpoint-{step}" / name)
    merged = loss_from_logits(tmp_path / "out" / "merged", world / "val" / "data.jsonl")
    assert merged == pytest.approx(losses[step], abs=1e-4)

    # Killed after the last checkpoint: the best is saved, and not the last.
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "trainer_state.json").unlink()
    run_script(SFT, *run, "--resume")
    assert same(tmp_path / "out" / name, tmp_path / "out" / f"checkpoint-{step}" / name)


def test_early_stopping_may_be_added_on_resuming(world, tmp_path):
    best = ["--load_best_model_at_end", "--save_strategy", "steps", "--save_steps", 2, "--output_dir", tmp_path / "run"]
    run = [*arguments(world), *evaluating(world, 2), *best]
    run_script(SFT, *run, "--max_steps", 2)
    run_script(SFT, *run, "--max_steps", 6, "--early_stopping_patience", 2, "--resume")
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    assert state["stateful_callbacks"]["EarlyStopping"]["args"]["early_stopping_patience"] == 2
    again = run_script(
        SFT, *run, "--max_steps", 6, "--resume", "--metric_for_best_model", "mean_token_accuracy", check=False
    )
    assert "metric_for_best_model was 'loss' and is 'mean_token_accuracy'" in again.stdout


def test_the_best_model_of_a_run_that_was_moved_is_the_one_beside(tmp_path, caplog):
    def checkpoint(step, best):
        folder = tmp_path / "here" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(str(step))
        TrainerState(global_step=step, best_model_checkpoint=f"there/checkpoint-{best}").save_to_json(
            str(folder / "trainer_state.json")
        )
        return str(folder)

    checkpoint(5, 5), checkpoint(6, 4)
    copy_model(checkpoint(10, 5), str(tmp_path / "here"), best=True)
    assert (tmp_path / "here" / "model.safetensors").read_text() == "5" and not caplog.records
    copy_model(str(tmp_path / "here" / "checkpoint-6"), str(tmp_path / "here"), best=True)
    assert (tmp_path / "here" / "model.safetensors").read_text() == "6"
    assert "checkpoint-4, is gone" in caplog.text


def test_a_smoothed_loss_of_no_label_counts_nothing(world, tmp_path):
    # 3 samples in batches of 3: the second process has nothing but filling.
    run = [*arguments(world), *evaluating(world, 2, name="other"), "--max_steps", 2, "--label_smoothing_factor", 0.1]
    run_script(SFT, *run, "--output_dir", tmp_path / "one")
    two = [
        SFT,
        *run,
        "--per_device_train_batch_size",
        1,
        "--per_device_eval_batch_size",
        3,
        "--output_dir",
        tmp_path / "two",
    ]
    run_script(*TWO, *two, env=TWO_ON_CPU)
    losses = history(tmp_path / "one")
    assert losses[2] > 0 and history(tmp_path / "two") == pytest.approx(losses, abs=1e-5)


def test_a_share_is_kept_from_training(world, tmp_path):
    words = arguments(world, "--eval_split_size", 0.2, "--eval_strategy", "epoch", "--output_dir", tmp_path / "out")
    plans = [make_plan(parse_arguments(list(map(str, words)))) for _ in range(2)]
    parts = [[[row["messages"] for row in part] for part in (plan.dataset, plan.evaluation)] for plan in plans]
    assert parts[0] == parts[1], "the same in each start"
    trained, kept = parts[0]
    assert (len(trained), len(kept)) == (12, 4) and not any(row in trained for row in kept)
    other = make_plan(parse_arguments([*map(str, words), "--seed", "1"]))
    assert [row["messages"] for row in other.evaluation] != kept


def test_a_mixture_keeps_a_share_of_each_dataset(world, tmp_path):
    recipe = {"data_root": "", "datasets": [], "balancing": "per-dataset", "eval": {"data": 0.2, "chance": 0.3}}
    recipe["own"] = [{"name": name, "path": str(world / name / "data.jsonl")} for name in ("data", "chance", "other")]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"mixture": recipe}))
    model = ["--model_name_or_path", world / "model", *SHORT, "--max_steps", 100, "--output_dir", tmp_path / "out"]
    run = [*model, "--mixture", tmp_path / "recipe.yaml", "--eval_strategy", "steps", "--eval_steps", 50]

    def texts(rows):
        return [
            str([item["text"] for turn in row["messages"] for item in turn["content"] if item.get("text")])
            for row in rows
        ]

    plan = make_plan(parse_arguments(list(map(str, run))))
    kept = {name: texts(part) for name, part in plan.evaluation.items()}
    assert {name: len(rows) for name, rows in kept.items()} == {"data": 4, "chance": 5}
    trained = set(texts(plan.dataset))
    rows = {name: (world / name / "data.jsonl").read_text().splitlines() for name in ("data", "chance", "other")}
    every = {name: texts(map(json.loads, lines)) for name, lines in rows.items()}
    assert trained == set(sum(every.values(), [])) - set(sum(kept.values(), [])), "over several epochs"
    assert {name: texts(part) for name, part in plan.evaluation.items()} == kept, "the same each time"

    run_script(SFT, *run, "--dataloader_num_workers", 1)
    for name, chosen in kept.items():
        path = world / name / "kept.jsonl"
        path.write_text("".join(f"{line}\n" for line, text in zip(rows[name], every[name]) if text in chosen))
        found = history(tmp_path / "out", f"eval_{name}_loss")
        assert list(found) == [50, 100] and found[100] == pytest.approx(
            loss_from_logits(tmp_path / "out", path), abs=1e-5
        )
    assert "| chance | 5 |" in (tmp_path / "out" / "run_summary.md").read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["eval={data: 0}"], ["eval.data=0", "between 0 and 1"]),
        (["eval={date: 0.1}"], ["eval='date'", "data, other"]),
        (["eval={other: 0.9}"], ["other: a share of 0.9", "3 samples", "lower it"]),
        (["eval={data: 0.2}"], ["the recipe's eval alone evaluates nothing", "--eval_strategy"]),
        (["eval={coyo: 0.1}", "datasets=[coyo]"], ["eval.coyo=0.1", "stream"]),
    ],
)
def test_wrong_shares_of_a_mixture(settings, words, world, tmp_path):
    own = [{"name": name, "path": str(world / name / "data.jsonl")} for name in ("data", "other")]
    recipe = {"data_root": "", "datasets": [], "balancing": "per-dataset", "own": own}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"mixture": recipe}))
    run = ["--model_name_or_path", world / "model", "--mixture", tmp_path / "recipe.yaml", *SHORT, "--max_steps", 4]
    run += [] if "alone" in words[0] else ["--eval_strategy", "epoch"]
    with pytest.raises(ValueError) as error:
        make_plan(parse_arguments([*map(str, run), "--output_dir", str(tmp_path / "out"), "--set", *settings]))
    assert all(word in str(error.value) for word in words), error.value


def test_a_dry_run_says_what_is_evaluated_when(world, tmp_path):
    best = ["--load_best_model_at_end", "--save_strategy", "steps", "--save_steps", 5, "--early_stopping_patience", 3]
    run = [*arguments(world), "--max_steps", 22, *best, "--output_dir", tmp_path / "out", "--dry_run"]
    text = run_script(SFT, *run, *evaluating(world, 5)).stdout
    data = world / "val" / "data.jsonl"
    assert (
        f"Evaluation: the loss on {data}, 7 samples, every 5 of 22 steps; the model with the best loss is saved" in text
    )
    assert "stops after 3 in a row without a better one" in text


def test_pictures_are_read_from_the_folder_of_each_file(world, tmp_path):
    picture(9).save(world / "other" / "images" / "only_here.png")
    row = {**sample(1), "images": ["images/only_here.png"]}
    path = world / "other" / "one.jsonl"
    path.write_text(json.dumps(row) + "\n")
    words = [*arguments(world), "--eval_dataset", path, "--eval_strategy", "epoch", "--output_dir", tmp_path / "out"]
    plan = make_plan(parse_arguments(list(map(str, words))))
    batch = plan.collator([plan.evaluation[0]])
    expected = HoneybeeDataCollator(plan.collator.processor, image_root=str(path.parent), pack=True)([row])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_runs_marked_before_there_was_evaluation_go_on(tmp_path):
    arguments = parse_arguments(
        ["--dataset", "data", "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False"]
    ).training
    mixture = {"data_root": "data", "eval": {}}
    marked = {"dataset": "data", "mixture": {"data_root": "data"}}
    mark_run(marked, arguments)
    now = {"dataset": "data", "mixture": mixture, "eval_split_size": None}
    assert changes_since(now, arguments) == []
    (changed,) = changes_since({**now, "eval_split_size": 0.1}, arguments)
    assert changed == "eval_split_size was None and is 0.1"
    assert changes_since({**now, "mixture": {**mixture, "eval": {"vqav2": 0.1}}}, arguments)
