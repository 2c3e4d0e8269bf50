# SPDX-License-Identifier: Apache-2.0
"""Every launcher is run: DDP, FSDP2, ZeRO-2 and ZeRO-3 in two processes, each against the same run in one process.

Every tensor is compared, not the loss: a head with a wrong gradient hides behind an equal loss. HONEYBEE_ALL_ENGINES=1 runs
the cells of the table that add least, too.
"""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.deepspeed import is_deepspeed_available

from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import processor_from_vision_text_pretrained
from tests.evaluation.make_data_root import make_data_root
from tests.tiny import (
    NEW_PROJECTOR,
    REPOSITORY,
    new_model,
    picture,
    run_script,
    sample,
    save_clip,
    save_llama,
    save_qwen2,
    write_dataset,
)
from tests.training.test_sft_mixture import write_mixture
from training.run.settings import parse_arguments

LAUNCHERS = REPOSITORY / "training" / "configs" / "accelerate"
# Name -> (file for `accelerate launch`, what accelerate makes of it); json: `--deepspeed FILE.json` under torchrun.
ENGINES = {
    "ddp": ("ddp.yaml", "MULTI_CPU"),
    "fsdp2": ("fsdp2.yaml", "FSDP"),
    "zero2": ("zero2.yaml", "DEEPSPEED"),
    "zero3": ("zero3.yaml", "DEEPSPEED"),
    "zero2-json": ("ddp.yaml", "DEEPSPEED"),
    "zero3-json": ("ddp.yaml", "DEEPSPEED"),
}
RUNS = ["align", "instruct", "lora", "mixture", "killed"]
MORE_RUNS = ["tied", "tied-lora", "grouped", "evaluated", "tokens", "tower", "tower-all", "tower-lora", "asked-lora"]
MORE_RUNS += ["elastic", "elastic-d-abs", "crops"]
CELLS = [(engine, run) for engine in ("ddp", "fsdp2", "zero2", "zero3") for run in RUNS]
CELLS += [("zero2-json", "align"), ("zero3-json", "instruct"), ("zero3-json", "lora"), ("fsdp2", "tied-lora")]
CELLS += [("fsdp2", "evaluated"), ("zero3", "evaluated")]
CELLS += [("fsdp2", "tokens"), ("zero2", "tokens"), ("ddp", "tower-all")]
CELLS += [(engine, run) for engine in ("ddp", "fsdp2", "zero3") for run in ("tower", "tower-lora")]
CELLS += [(engine, run) for engine in ("ddp", "fsdp2", "zero3") for run in ("asked-lora", "elastic", "crops")]
CELLS += [("zero3", "elastic-d-abs")]
if os.environ.get("HONEYBEE_ALL_ENGINES"):
    CELLS = [(engine, run) for engine in ENGINES for run in RUNS + MORE_RUNS]
if not is_deepspeed_available():
    without = pytest.mark.skip(reason="deepspeed is not installed")
    CELLS = [pytest.param(*cell, marks=without) if "zero" in cell[0] else cell for cell in CELLS]

SHORT = [
    "--learning_rate", 1e-3, "--adam_epsilon", 1e-6, "--logging_steps", 1, "--bf16", "False", "--report_to", "none",
    "--dataloader_pin_memory", "False", "--save_strategy", "no", "--max_steps", 3,
]  # fmt: skip
CROPS = ["--max_crops", 4, "--overview_num_query_tokens", 1]
ELASTIC_D_ABS = {"projector_type": "d-abs", "num_query_tokens": 4, "hidden_size": 32, "dropout": 0.0}
# In the last, some questions have no image.
ASKED = ("mme", "pope", "scienceqa")
LORA = ["--use_peft", "--lora_r", 4, "--lora_dropout", 0.0, "--merge", "--lora_modules_to_save", "lm_head"]


def arguments_of(run: str, root) -> list:
    data = ["--dataset", root / "data" / "data.jsonl", "--model_name_or_path"]
    new = new_model(root)
    kept = ["--set", "eval={text: 0.2, questions: 0.4}", "--metric_for_best_model", "eval_text_loss"]
    best = ["--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "steps", "--save_steps", 1]
    asked = ["--eval_tasks", *ASKED, "--eval_tasks_data", root / "benchmarks", "--eval_limit", 8]
    asked += ["--per_device_eval_batch_size", 3]
    mixture = ["--mixture", root / "mixture" / "recipe.yaml", "--model_name_or_path", root / "tied-model"]
    pictures = ["--dataset", root / "pictures" / "data.jsonl", "--elastic", "1,4,9:2"]
    rates = ["--vision_learning_rate", 5e-4, "--projector_learning_rate", 2e-3]
    return {
        "align": ["--stage", "align", *data[:2], *new],
        "instruct": [*data, root / "text-model", "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2],
        "lora": [*data, root / "text-model", *LORA],
        "mixture": mixture,
        "evaluated": [*mixture, *kept, *best, *asked, "--load_best_model_at_end", "--eval_on_start"],
        "asked-lora": [*data, root / "text-model", *LORA, *best[:4], *asked, "--eval_on_start"],
        "tied": [*data, root / "tied-model"],
        "tied-lora": [*data, root / "tied-model", *LORA],
        "tokens": [*data, root / "text-model", "--max_tokens_per_batch", 100, "--max_length", 100],
        "grouped": [*data, root / "text-model", "--batching", "grouped"],
        "tower": [*data, root / "text-model", "--train_vision_tower", 1, *rates],
        "tower-all": [*data, root / "text-model", "--train_vision_tower", "all", "--stage", "align", *rates[:2]],
        "elastic": [*pictures, "--model_name_or_path", root / "text-model"],
        "crops": ["--dataset", root / "crops" / "data.jsonl", *data[2:], root / "text-model", *CROPS],
        # A new model, since queries of a d-abs that exists are for its own M.
        "elastic-d-abs": [*pictures, *new[:-1], json.dumps(ELASTIC_D_ABS)],
        "tower-lora": [*data, root / "text-model", *LORA, "--lora_vision", *rates],
    }["instruct" if run == "killed" else run]


def job(engine: str | None, run: str, root, shards: bool = False) -> list[dict]:
    """The starts of one cell of the table, as run_engines.py takes them.

    Args:
        engine: None for one process.
        shards: with a launcher's file that saves shards, in place of a model.
    """
    file, distributed_type = ENGINES[engine] if engine else (None, "NO")
    out = root / (engine or "one") / ("shards" if shards else run)
    # Steps of four samples, two of them accumulated.
    batch = ["--global_batch_size", 4, "--per_device_train_batch_size", 1 if engine else 2]
    # Processes whose images have different numbers of M among them, or of squares.
    if run.startswith(("elastic", "crops")):
        batch = ["--global_batch_size", 8, "--per_device_train_batch_size", 4 if engine else 8]
    arguments = [*SHORT, *arguments_of(run, root), *batch, "--output_dir", out]
    if engine and engine.endswith("json"):
        arguments += ["--deepspeed", root / f"{engine}.json"]
    start = {
        "engine": file and str((root if shards else LAUNCHERS) / file),
        "distributed_type": distributed_type,
        "log": f"{out}.log",
        "die_at": None,
    }
    starts = [arguments] if run != "killed" else [arguments, [*arguments, "--resume"]]
    starts = [{**start, "arguments": list(map(str, words))} for words in starts]
    starts[0]["die_at"] = 3 if run == "killed" else None
    return starts


def write_world(root) -> None:
    vision = save_clip(root / "vision")
    for name, text in (("text", save_llama(root / "text")), ("tied", save_qwen2(root / "tied"))):
        model = HoneybeeForConditionalGeneration.from_vision_text_pretrained(vision, text, **NEW_PROJECTOR)
        model.save_pretrained(root / f"{name}-model")
        processor_from_vision_text_pretrained(vision, text, 4).save_pretrained(root / f"{name}-model")
    write_dataset(root / "data", [sample(i, image=i % 2 == 0) for i in range(16)])
    write_dataset(root / "pictures", [sample(i) for i in range(24)])
    # Some without a picture, most with a small one, so that one process has an overview, with its own M, and the other none.
    write_dataset(root / "crops", [sample(i, image=i % 3 > 0) for i in range(24)])
    for i, path in enumerate(sorted((root / "crops" / "images").iterdir())):
        picture(i, {0: (64, 64), 5: (30, 200), 10: (96, 33)}.get(i, (40, 24))).save(path)
    write_mixture(root / "mixture")
    make_data_root(root / "benchmarks")
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping"), "auto")
    zero2 = {**auto, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 2}}
    (root / "zero2-json.json").write_text(json.dumps(zero2))
    shutil.copy(REPOSITORY / "training" / "configs" / "deepspeed" / "zero3.json", root / "zero3-json.json")
    for name, setting in (("fsdp2", "FULL_STATE_DICT"), ("zero3", "save_16bit_model: true")):
        text = (LAUNCHERS / f"{name}.yaml").read_text()
        assert setting in text
        other = setting.replace("FULL", "SHARDED").replace("true", "false")
        (root / f"{name}.yaml").write_text(text.replace(setting, other))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All runs, in one family of processes, and how each ended."""
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    cells = [getattr(cell, "values", cell) for cell in CELLS if not getattr(cell, "marks", None)]
    runs = sorted({run for _, run in cells} - {"killed"})
    jobs = {f"{engine or 'one'}/{run}": job(engine, run, root) for engine, run in [(None, run) for run in runs] + cells}
    for engine in ("fsdp2", "zero3") if is_deepspeed_available() else ("fsdp2",):
        jobs[f"{engine}/shards"] = job(engine, "align", root, shards=True)
    for engine in {name.split("/")[0] for name in jobs}:
        (root / engine).mkdir(exist_ok=True)
    (root / "jobs.json").write_text(json.dumps(jobs))
    one_thread = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    script = REPOSITORY / "tests" / "training" / "trainer" / "run_engines.py"
    run_script(script, root / "jobs.json", env={**one_thread, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)})
    return root, json.loads((root / "jobs.json.done").read_text())


def files(folder) -> set[str]:
    """Of a final folder, without its checkpoints."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if not path.parts[0].startswith("checkpoint-")}


def losses(folder) -> list[float]:
    """In the order of the log, of what is evaluated as well."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "eval_text_loss", "eval_questions_loss")
    return [row[name] for row in history for name in names if name in row]


@pytest.mark.parametrize(("engine", "run"), [cell for cell in CELLS if re.search("evaluated|asked", str(cell))])
def test_an_engine_answers_as_one_process(engine, run, world):
    root, _ = world
    one, *ranks = (
        {(name, step): answers for name, step, answers in map(json.loads, path.read_text().splitlines())}
        for path in (
            root / "one" / f"{run}.log.0.answers",
            *(root / engine / f"{run}.log.{rank}.answers" for rank in range(2)),
        )
    )
    assert ranks[0] == ranks[1] and list(ranks[0]) == list(one) and len(one) == 4 * len(ASKED)
    for name in ASKED:
        assert ranks[0][name, 0] == one[name, 0]
        assert len(set(one[name, 0].values())) > 1, "the model looks at what it is asked"
    # Its weights are those of one process but for rounding, which may change an answer.
    changed = sum(one[key][question] != ranks[0][key][question] for key in one for question in one[key])
    assert changed <= sum(map(len, one.values())) / 10


def settings(file) -> dict:
    return {name: value for name, value in json.loads(file.read_text()).items() if name != "base_model_name_or_path"}


@pytest.mark.parametrize(("engine", "run"), CELLS)
def test_an_engines_run_is_that_of_one_process(engine, run, world):
    root, ended = world
    *killed, end = ended[f"{engine}/{run}"]
    assert end == [0, 0], (root / engine / f"{run}.log").read_text()[-4000:]
    assert all(-signal.SIGKILL in statuses and 0 not in statuses for statuses in killed)
    two, one = root / engine / run, root / "one" / ("instruct" if run == "killed" else run)
    assert files(two) == files(one)
    if run == "killed":
        one = root / engine / "instruct"
    weights = sorted(file for file in files(one) if file.endswith(".safetensors"))
    assert weights == (
        ["adapter_model.safetensors", "merged/model.safetensors"] if "lora" in run else ["model.safetensors"]
    )
    for file in weights:
        here, there = load_file(two / file), load_file(one / file)
        assert here.keys() == there.keys()
        for tensor in there:
            assert here[tensor].dtype == there[tensor].dtype
            if run == "killed":
                assert torch.equal(here[tensor], there[tensor]), tensor
            torch.testing.assert_close(here[tensor], there[tensor], rtol=0, atol=1e-5, msg=f"{file}: {tensor}")
    for file in sorted(files(one)):
        if file.endswith("config.json"):
            assert settings(two / file) == settings(one / file), file
    assert losses(two) == pytest.approx(losses(one), abs=1e-4) and len(losses(one)) >= 3
    assert run != "evaluated" or len(losses(one)) == 3 + 2 * 4


TOWER_CELLS = [cell for cell in CELLS if getattr(cell, "values", cell)[1].startswith("tower")]


@pytest.mark.parametrize(("engine", "run"), TOWER_CELLS)
def test_of_the_tower_the_same_tensors_change_at_their_own_rate(engine, run, world):
    root, _ = world
    start = load_file(root / "text-model" / "model.safetensors")
    file = "merged/model.safetensors" if run == "tower-lora" else "model.safetensors"
    for folder in (root / engine / run, root / "one" / run):
        end = load_file(folder / file)
        changed = {name for name in start if not torch.equal(start[name], end[name])}
        read = [name for name in start if "vision_tower" in name and "post_layernorm" not in name]
        expected = {
            "tower": [name for name in read if ".layers.1." in name],
            "tower-all": read,
            "tower-lora": [name for name in read if name.endswith(("q_proj.weight", "v_proj.weight"))],
        }[run]
        assert {name for name in changed if "vision_tower" in name} == set(expected)
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        rows = [row for row in history if "loss" in row]
        assert len(rows) == 3 and {row["learning_rate_vision"] / row["learning_rate"] for row in rows} == {0.5}
        assert run == "tower-all" or {row["learning_rate_projector"] / row["learning_rate"] for row in rows} == {2.0}


def test_a_rank_had_no_image_where_the_other_had_some(world):
    """In `instruct`, whichever the engine: all read the same samples."""
    root, ended = world
    for engine in {name.split("/")[0] for name in ended if name.endswith("/instruct")} - {"one"}:
        ranks = [json.loads((root / engine / f"instruct.log.{rank}.images").read_text()) for rank in range(2)]
        steps = list(zip(*ranks))
        assert (0, 1) in steps or (1, 0) in steps, engine


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_settings_that_would_leave_no_model_are_refused(engine, world):
    root, ended = world
    if f"{engine}/shards" not in ended:
        pytest.skip("deepspeed is not installed")
    (statuses,) = ended[f"{engine}/shards"]
    text = (root / engine / "shards.log").read_text()
    assert 1 in statuses and "saves shards and no model" in text and "Traceback" not in text
    assert "FULL_STATE_DICT" in text if engine == "fsdp2" else "zero3_save_16bit_model" in text


def refused(*words) -> str:
    with pytest.raises(ValueError) as error:
        parse_arguments([*words, "--output_dir", "unused"])
    return str(error.value)


def test_a_deepspeed_file_that_cannot_be_used(tmp_path, monkeypatch):
    file = tmp_path / "zero.json"
    missing = refused("--deepspeed", str(file))
    assert "No such file" in missing and "training/configs/deepspeed/zero3.json" in missing
    file.write_text("{'stage': 2}")
    assert "is not JSON" in refused("--deepspeed", str(file))
    assert "is not JSON" in refused("--deepspeed", "{'stage': 2}")
    file.write_text("[2]")
    assert "zero_optimization" in refused("--deepspeed", str(file))
    file.write_text('{"zero_optimization": {"stage": 2}}')
    config = tmp_path / "run.yaml"
    config.write_text(f"deepspeed: {file}\n")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_available", lambda: True)
    assert "torchrun --nproc_per_node 1" in refused("--config", str(config))
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_available", lambda: False)
    assert "pip install deepspeed" in refused("--config", str(config))
