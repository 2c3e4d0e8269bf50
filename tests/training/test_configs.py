# SPDX-License-Identifier: Apache-2.0
"""The shipped configs and the documented commands: each is read, built and dry-run, on models small enough."""

import json
import math
import os
import re
import shlex
import shutil

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from transformers import CLIPVisionConfig, LlamaConfig, get_scheduler

from modeling_honeybee import HoneybeeProjectorConfig
from tests.tiny import (
    REPOSITORY,
    image_processor,
    new_model,
    sample,
    save_joined,
    tiny_model,
    word_tokenizer,
    write_dataset,
)
from tests.training.test_sft_mixture import write_mixture
from training.run.checks import check_settings
from training.run.dry_run import dry_run
from training.run.settings import Settings, parse_arguments

CONFIGS = REPOSITORY / "training" / "configs"
TRAINING = sorted(CONFIGS.glob("*.yaml"))
LAUNCHERS = sorted((CONFIGS / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_joined(root)
    write_dataset(root / "data", [sample(i) for i in range(8)])
    write_mixture(root / "mixture")
    return root


def stand_ins(world, stage):
    parts = new_model(world) if stage == "align" else ["--model_name_or_path", world / "model"]
    return [*parts, "--output_dir", world / "out", "--dry_run"]


def run_dry(*arguments) -> str:
    return dry_run(parse_arguments([str(argument) for argument in arguments]))


def test_a_dry_run_may_be_asked_for_in_any_way(world, tmp_path):
    """bf16 is refused on a CPU, and a dry run reads the settings of a GPU's run there."""
    yaml_file = tmp_path / "run.yaml"
    yaml_file.write_text("dry_run: true\nbf16: true\n")
    ways = [["--config", yaml_file], ["--dry_run=True", "--bf16", "True"], ["--bf16", "True", "--dry_run"]]
    for way in ways:
        settings = parse_arguments([*map(str, way), "--output_dir", str(world / "out")])
        assert settings.honeybee.dry_run and settings.training.bf16


def test_several_levels_of_the_tower(world):
    projector = {"projector_type": "d-abs", "num_query_tokens": 4, "hidden_size": 32, "pooled_v_target": "none"}
    parts = ["--vision_model", world / "vision", "--text_model", world / "text", "--projector", json.dumps(projector)]
    common = [
        "--stage",
        "align",
        "--dataset",
        world / "data" / "data.jsonl",
        "--output_dir",
        world / "out",
        "--dry_run",
    ]
    report = run_dry(*parts, *common, "--vision_feature_layer", "-3", "-2")
    assert "d-abs -> 4 visual tokens" in report


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
@pytest.mark.parametrize("data", ["dataset", "captions.yaml", "recipe.yaml"])
def test_shipped_configs_pass_a_dry_run(path, data, world):
    settings = yaml.safe_load(path.read_text())
    if data == "dataset":
        source = ["--dataset", world / "data" / "data.jsonl"]
    else:
        folder = world / "mixture"
        own = json.dumps([{"name": "questions", "path": str(folder / "questions.jsonl")}])
        changed = [f"data_root={folder}", "datasets=[coyo]", "balancing=per-dataset", f"own={own}"]
        source = ["--mixture", CONFIGS / "recipes" / data, "--set", *changed]
    text = run_dry("--config", path, *source, *stand_ins(world, settings["stage"]))
    assert f"Stage {settings['stage']}" in text and "8,064 trained" in text or "8,064 parameters, trained" in text
    assert f"A step: {settings['global_batch_size']} samples" in text
    assert f"{settings['max_steps']:,} steps" in text
    assert ("the run's start compares them" in text) == (settings["stage"] == "align")
    assert not (world / "out").exists()


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_shipped_configs_become_what_they_say(path):
    settings = yaml.safe_load(path.read_text())
    found = parse_arguments(["--config", str(path), "--output_dir", "unused", "--use_cpu", "True"])
    for name, value in settings.items():
        holders = [holder for holder in vars(found).values() if hasattr(holder, name)]
        assert [getattr(holder, name) for holder in holders] == [value], name


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_the_learning_rate_goes_to_its_floor_and_no_further(path):
    args = parse_arguments(["--config", str(path), "--output_dir", "unused", "--use_cpu", "True"]).training
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        args.get_warmup_steps(args.max_steps),
        args.max_steps,
        args.lr_scheduler_kwargs,
    )
    # A schedule is a function of the step.
    rate = [schedule.lr_lambdas[0](step) * args.learning_rate for step in range(0, args.max_steps + 1, 10)]
    top = rate.index(max(rate))
    assert math.isclose(rate[top], args.learning_rate) and abs(top * 10 - args.warmup_steps) <= 10
    assert all(later <= earlier for earlier, later in zip(rate[top:], rate[top + 1 :]))
    assert math.isclose(rate[-1], args.lr_scheduler_kwargs["min_lr"])
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.max_grad_norm) == (0.9, 0.98, 1e-6, 1.0)


def commands(path) -> list[list[str]]:
    """The words of each `python training/sft.py` or `accelerate launch` in the code blocks of a Markdown file."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if "training/sft.py" in line]


def parsed(words) -> Settings:
    arguments = words[words.index("training/sft.py") + 1 :]
    if "--deepspeed" in arguments:  # which would start its processes; test_engines.py does
        place = arguments.index("--deepspeed")
        assert (REPOSITORY / arguments[place + 1]).is_file()
        del arguments[place : place + 2]
    settings = parse_arguments([*arguments, "--use_cpu", "True"])
    check_settings(settings)
    return settings


def test_documented_commands_parse():
    found = commands(CONFIGS / "README.md")
    assert len(found) >= 15
    for words in found:
        if "launch" in words:
            launcher = words[words.index("--config_file") + 1]
            assert (REPOSITORY / launcher).is_file(), launcher
        if "--load_in_4bit" not in words:  # needs bitsandbytes
            parsed(words)


# The published models, and the learning rates of their stage 1.
PUBLISHED = {
    "7b-c-abs-m144": ("7b", None, "c-abs", 144, 3e-4),
    "7b-d-abs-m144": ("7b", None, "d-abs", 144, 1e-4),
    "7b-c-abs-m256": ("7b", None, "c-abs", 256, 3e-4),
    "13b-c-abs-m256": ("13b", 336, "c-abs", 256, 3e-4),
    "13b-d-abs-m256": ("13b", 336, "d-abs", 256, 1e-4),
    "13b-c-abs-m576": ("13b", 336, "c-abs", 576, 3e-4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_commands_of_the_published_models(name):
    size, image, projector_type, tokens, rate = PUBLISHED[name]
    mine = [words for words in commands(CONFIGS / "README.md") if f"outputs/{name}" in " ".join(words)]
    align, instruct = (
        next(w for w in mine if f"training/configs/{stage}.yaml" in w) for stage in ("align", "instruct")
    )
    for long in (False, True):
        settings = parsed([*align, *(["--max_steps", "200000"] if long else [])])
        args, training_args = settings.honeybee, settings.training
        projector = HoneybeeProjectorConfig.from_settings(args.projector)
        assert (projector.projector_type, projector.num_query_tokens) == (projector_type, tokens)
        assert args.text_model.endswith(f"vicuna-{size}-v1.5")
        assert args.vision_model.endswith("-336" if image else "patch14")
        assert (args.stage, training_args.learning_rate, training_args.weight_decay) == ("align", rate, 0.01)
        assert (args.global_batch_size, training_args.warmup_steps) == (256, 2000)
        assert training_args.max_steps == (200_000 if long else 50_000)
        assert args.mixture.endswith("captions.yaml")
        settings = parsed([*instruct, *(["--max_steps", "10000"] if long else [])])
        args, training_args = settings.honeybee, settings.training
        assert settings.model.model_name_or_path == f"outputs/{name}/align"
        assert (args.stage, training_args.learning_rate, training_args.weight_decay) == ("instruct", 2e-5, 1e-4)
        assert (args.global_batch_size, training_args.warmup_steps) == (128, 150)
        assert training_args.max_steps == (10_000 if long else 4_000)
        assert args.mixture.endswith("recipe.yaml")


@pytest.mark.parametrize(("per_device", "world_size", "steps"), [(32, 8, 1), (32, 1, 8), (8, 4, 8)])
def test_one_global_batch_on_any_number_of_devices(per_device, world_size, steps, monkeypatch):
    monkeypatch.setattr("trl.SFTConfig.world_size", property(lambda self: world_size))
    words = ["--config", str(CONFIGS / "align.yaml"), "--per_device_train_batch_size", str(per_device)]
    settings = parse_arguments([*words, "--output_dir", "unused", "--use_cpu", "True"])
    assert settings.training.gradient_accumulation_steps == steps
    assert settings.global_batch_size == per_device * world_size * steps


def test_a_7b_model_is_counted_without_its_weights(world, tmp_path, monkeypatch):
    """From configs and a tokenizer alone: there is no weight on this disk, which may be smaller than the model."""
    usage = shutil.disk_usage(tmp_path)._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    CLIPVisionConfig(**vision, image_size=224, patch_size=14).save_pretrained(tmp_path / "vision")
    image_processor().save_pretrained(tmp_path / "vision")
    LlamaConfig(vocab_size=32000).save_pretrained(tmp_path / "text")
    word_tokenizer().save_pretrained(tmp_path / "text")
    projector = json.dumps({"projector_type": "c-abs", "num_query_tokens": 144})
    text = run_dry(
        *("--config", CONFIGS / "align.yaml", "--dataset", world / "data" / "data.jsonl", "--save_strategy", "no"),
        *("--vision_model", tmp_path / "vision", "--text_model", tmp_path / "text", "--projector", projector),
        *("--output_dir", tmp_path / "out", "--dry_run"),
    )
    assert re.search(r"projector +37,070,336 parameters, trained", text)  # the official one's count
    assert re.search(r"language_model +6,607,343,616 parameters, frozen", text)  # Llama 7B without its head
    assert re.search(r"lm_head +131,072,000 parameters, frozen", text)
    assert re.search(r"weights +14\.2 GB", text) and re.search(r"optimizer +0\.3 GB", text)


@pytest.fixture
def launched(monkeypatch):
    """The environment that `accelerate launch --config_file X` gives its processes."""

    def launch(path):
        arguments = launch_command_parser().parse_args(["--config_file", str(path), "training/sft.py"])
        arguments, settings, _ = _validate_launch_command(arguments)
        assert arguments.num_processes == 8 and arguments.mixed_precision == "bf16"
        arguments.deepspeed_fields_from_accelerate_config = ",".join(settings.deepspeed_config)
        env = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
        for name, value in env.items():
            if name.startswith(("ACCELERATE", "FSDP")):
                monkeypatch.setenv(name, value)
        return arguments

    kept = dict(os.environ)
    yield launch
    os.environ.clear()
    os.environ.update(kept)


def test_every_launcher_is_documented():
    assert [path.stem for path in LAUNCHERS] == ["ddp", "fsdp2", "zero2", "zero3"]
    text = (CONFIGS / "README.md").read_text()
    assert all(f"accelerate/{path.name}" in text for path in LAUNCHERS)


def test_the_ddp_launcher(launched):
    arguments = launched(CONFIGS / "accelerate" / "ddp.yaml")
    assert arguments.multi_gpu and not arguments.use_fsdp and not arguments.use_deepspeed


def test_the_fsdp_launcher_shards_the_models_blocks(launched):
    assert launched(CONFIGS / "accelerate" / "fsdp2.yaml").use_fsdp
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    model = tiny_model()
    plugin.set_auto_wrap_policy(model)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    sharded = {type(module).__name__ for module in model.modules() if policy(module)}
    assert {"CLIPEncoderLayer", "HoneybeeCAbstractor", "LlamaDecoderLayer"} <= sharded
    assert len([module for module in model.modules() if policy(module)]) >= 2 + 1 + 2


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_launchers(stage, launched):
    assert launched(CONFIGS / "accelerate" / f"zero{stage}.yaml").use_deepspeed
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == stage
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"
    assert plugin.deepspeed_config["gradient_clipping"] == "auto"
    pytest.importorskip("deepspeed", reason="the trainer completes the config where deepspeed is installed")
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # the arguments would start its processes
    words = ["--config", str(CONFIGS / "instruct.yaml"), "--output_dir", "unused", "--use_cpu", "True"]
    training_args = parse_arguments(words).training
    config = HfTrainerDeepSpeedConfig(plugin.deepspeed_config)
    config.trainer_config_process(training_args, auto_find_batch_size=False)
    config.trainer_config_finalize(training_args, None, training_args.max_steps)
    assert (config.config["gradient_accumulation_steps"], config.config["gradient_clipping"]) == (8, 1.0)
    assert config.config["train_batch_size"] == 128
