# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a run is said before its first step, with the value, the limit and the remedy."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from trl import SFTConfig, SFTTrainer

from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import processor_from_vision_text_pretrained
from tests.tiny import (
    NEW_PROJECTOR,
    SFT,
    run_script,
    sample,
    save_clip,
    save_llama,
    tiny_model,
    tiny_processor,
    write_dataset,
)
from training import sft
from training.run.settings import parse_arguments

SHORT = ["--max_steps", 4, "--bf16", "False", "--report_to", "none", "--save_strategy", "no", "--use_cpu"]


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Parts, a whole model and a dataset, and each with something wrong, by name."""
    root = tmp_path_factory.mktemp("things")

    def dataset(name, *rows):
        return write_dataset(root / name, [sample(0), *rows])

    made = {
        "vision": save_clip(root / "vision"),
        "text": save_llama(root / "text"),
        "data": dataset("data", *[sample(i) for i in range(1, 4)]),
        "missing": dataset("missing", {**sample(1), "images": ["images/no_such.png"]}),
        "truncated": dataset("truncated", sample(1)),
        "bomb": dataset("bomb", sample(1)),
        "empty": dataset("empty", {"messages": [], "images": []}),
        "user_last": dataset("user_last", {**sample(1), "messages": sample(1)["messages"][:1]}),
        "counts": dataset("counts", {**sample(1), "images": ["images/0.png", "images/0.png"]}),
        "text_messages": root / "text_messages.jsonl",
        "number_for_image": root / "number_for_image.jsonl",
        "many_images": dataset("many_images", sample(1, images=20)),
        "text_only": write_dataset(root / "text_only", [sample(i, image=False) for i in range(3)]),
        "no_columns": root / "no_columns.jsonl",
        "broken": root / "broken.jsonl",
        "model": root / "model",
        "out": root / "out",
        "a_file": root / "a_file",
    }
    path = root / "truncated" / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:-500])
    Image.new("1", (20000, 10000)).save(root / "bomb" / "images" / "1.png")
    made["text_messages"].write_text('{"messages": ["hello"]}\n' * 2)
    made["number_for_image"].write_text(json.dumps({**sample(0), "images": [5]}) + "\n")
    made["broken"].write_text('{"messages": [')
    made["no_columns"].write_text('{"question": "what", "answer": "that"}\n')
    made["a_file"].write_text("")
    for name in (
        "cut_config",
        "not_a_model",
        "other_run",
        "adapter",
        "no_weights",
        "disagreeing",
        "wrong_shape",
        "cut_weights",
    ):
        made[name] = root / name
        made[name].mkdir()
    (made["other_run"] / "model.safetensors").write_text("weights of another run")
    (made["cut_config"] / "config.json").write_text('{"model_type": "honeyb')
    (made["adapter"] / "adapter_config.json").write_text("{}")
    tiny_model().save_pretrained(made["disagreeing"])
    tiny_processor(9).save_pretrained(made["disagreeing"])

    model = HoneybeeForConditionalGeneration.from_vision_text_pretrained(made["vision"], made["text"], **NEW_PROJECTOR)
    model.save_pretrained(made["model"])
    processor_from_vision_text_pretrained(made["vision"], made["text"], 4).save_pretrained(made["model"])
    for name in ("no_weights", "wrong_shape", "cut_weights"):
        shutil.copytree(made["model"], made[name], dirs_exist_ok=True)
    (made["no_weights"] / "model.safetensors").unlink()
    file = made["wrong_shape"] / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": torch.zeros(7, 24)}, file, {"format": "pt"})
    file = made["cut_weights"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return made


# transformers 5 and 4
GROUPED_BY_THE_TRAINER = (
    ["--train_sampling_strategy", "group_by_length"]
    if "train_sampling_strategy" in SFTConfig.__dataclass_fields__
    else ["--group_by_length"]
)
EVALUATED = ["--eval_strategy", "steps", "--eval_steps", "2"]
STEP = ["--global_batch_size", "8"]
NEW = ["--vision_model", "{vision}", "--text_model", "{text}", "--model_name_or_path", None]


def new(**projector):
    return [*NEW, "--projector", json.dumps(projector)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # Speed
        (["--max_tokens_per_batch", "2048"], ["max_tokens_per_batch=2048", "--global_batch_size"]),
        (["--max_tokens_per_batch", "0", *STEP], ["max_tokens_per_batch=0", "at least 1"]),
        (["--max_tokens_per_batch", "2048", "--global_batch_size", "0"], ["global_batch_size=0", "at least 1"]),
        (["--max_tokens_per_batch", "512", *STEP], ["max_tokens_per_batch=512", "max_length=1024"]),
        (["--max_tokens_per_batch", "2048", *STEP, "--batching", "grouped"], ["--batching packed", "this is grouped"]),
        (["--max_tokens_per_batch", "2048", *STEP, "--gradient_accumulation_steps", "4"],
         ["gradient_accumulation_steps=4", "leave it out"]),
        (["--max_tokens_per_batch", "2048", *STEP, "--dataloader_drop_last"], ["dataloader_drop_last", "leave it out"]),
        (["--auto_find_batch_size"], ["auto_find_batch_size=True", "--per_device_train_batch_size"]),
        (["--use_liger_kernel"], ["use_liger_kernel", "GPU", "leave it out"]),
        (["--use_liger_kernel", "--torch_compile"], ["torch_compile with use_liger_kernel", "give one of them"]),
        (["--torch_compile_backend", "inducter"], ["torch_compile_backend='inducter'", "leave both out"]),
        (["--torch_compile_mode", "fastest"], ["torch_compile_mode='fastest'", "leave both out"]),
        # Data
        (["--dataset", None], ["no data", "--dataset", "--mixture"]),
        (["--dataset", "no/such/data.jsonl"], ["no/such/data.jsonl", "does not exist"]),
        (["--dataset", "{broken}"], ["broken.jsonl", "cannot be read", "repair"]),
        (["--dataset", "{no_columns}"], ["question, answer", "messages", "rename"]),
        (["--dataset_split", "validation"], ["no split 'validation'", "--dataset_split"]),
        (["--dataset", "{missing}"], ["sample 1", "no_such.png", "does not exist"]),
        (["--dataset", "{truncated}"], ["sample 1", "1.png", "truncated", "replace the file"]),
        (["--dataset", "{number_for_image}"], ["sample 0", "image 5 ", "neither a path nor a picture"]),
        (["--dataset", "{bomb}"], ["sample 1", "decompression bomb", "smaller"]),
        (["--dataset", "{empty}"], ["sample 1", "conversation is empty"]),
        (["--dataset", "{user_last}"], ["sample 1", "ends with the user", "assistant"]),
        (["--dataset", "{text_messages}"], ["sample 0", "not a list of {role, content}"]),
        (["--dataset", "{counts}"], ["sample 1", "1 image placeholders", "2 images"]),
        (["--dataset", "{text_only}", "--stage", "align"], ["none of the 3 samples has an image", "--stage instruct"]),
        (["--set", "balancing=per-task"], ["--set balancing=per-task", "--mixture"]),
        (["--max_length", "3"], ["max_length=3", "an image is 4 visual tokens", "raise it"]),
        (["--dataset", "{many_images}", "--max_length", "70"], ["sample 1", "max_length=70 would cut an image", "raise max_length to 266"]),
        (["--dataset", "{text_only}", "--max_length", "30"], ["sample 0", "question fills max_length=30", "raise max_length"]),
        (["--packing"], ["packing", "leave them out"]),
        (["--eos_token", "<eos>"], ["eos_token='<eos>'", "leave it out"]),
        (["--completion_only_loss", "False"], ["completion_only_loss=False", "leave it out"]),
        (GROUPED_BY_THE_TRAINER, ["group_by_length", "--batching grouped"]),
        # Evaluation
        (["--eval_strategy", "steps"], ["eval_strategy", "--eval_dataset", "--eval_split_size"]),
        (["--metric_for_best_model", "loss"], ["metric_for_best_model", "nothing to evaluate"]),
        (["--early_stopping_patience", "2"], ["early_stopping_patience", "nothing to evaluate"]),
        (["--eval_dataset", "{data}"], ["--eval_dataset", "evaluates nothing", "--eval_strategy steps"]),
        (["--eval_split_size", "0.5"], ["--eval_split_size", "evaluates nothing", "--eval_strategy steps"]),
        (["--eval_split_size", "0.5", "--eval_dataset", "{data}", *EVALUATED], ["--eval_dataset and --eval_split_size", "give one"]),
        (["--eval_split_size", "0", *EVALUATED], ["eval_split_size=0.0", "between 0 and 1"]),
        (["--eval_split_size", "1", *EVALUATED], ["eval_split_size=1.0", "between 0 and 1"]),
        (["--eval_split_size", "0.9", *EVALUATED], ["share of 0.9", "4 samples", "lower it"]),
        (["--eval_split_size", "0.5", "--eval_dataset_split", "test", *EVALUATED], ["--eval_dataset_split test", "leave it out"]),
        (["--eval_split_size", "0.5", "--dataset", None, "--mixture", "no.yaml", *EVALUATED], ["mixture", "--eval_dataset"]),
        (["--eval_dataset", "{data}", "--eval_strategy", "steps", "--eval_steps", "0"], ["eval_steps=0", "more than 0"]),
        (["--eval_dataset", "{data}", "--eval_strategy", "steps", "--eval_steps=-3"], ["eval_steps=-3", "more than 0"]),
        (["--eval_dataset", "{data}", "--eval_strategy", "often"], ["eval_strategy", "often", "epoch"]),
        (["--eval_dataset", "no/such/val.jsonl", *EVALUATED], ["--eval_dataset no/such/val.jsonl", "does not exist"]),
        (["--eval_dataset", "{missing}", *EVALUATED], ["--eval_dataset", "sample 1", "no_such.png"]),
        (["--eval_dataset", "{many_images}", "--max_length", "70", *EVALUATED], ["--eval_dataset", "max_length=70"]),
        (["--eval_dataset", '{"val": }', *EVALUATED], ["--eval_dataset", "not JSON"]),
        (["--eval_dataset", '{"val": 3}', *EVALUATED], ["--eval_dataset", "'val': 3", "path or a Hub name"]),
        (["--eval_dataset", "{data}", "--per_device_eval_batch_size", "0", *EVALUATED], ["per_device_eval_batch_size=0"]),
        (["--eval_dataset", "{data}", "--dataloader_drop_last", *EVALUATED], ["drop_last", "--per_device_eval_batch_size"]),
        (
            ["--eval_dataset", "{data}", "--load_best_model_at_end", *EVALUATED],
            ["load_best_model_at_end", "strategy to match", "SaveStrategy.NO"],
        ),
        (
            ["--eval_dataset", "{data}", "--save_strategy", "steps", "--save_steps", "4", "--load_best_model_at_end", *EVALUATED],
            ["load_best_model_at_end", "save_steps=4", "eval_steps=2", "same number"],
        ),
        (
            ["--eval_dataset", "{data}", "--save_strategy", "steps", "--save_steps", "2", "--load_best_model_at_end",
             "--save_total_limit", "1", *EVALUATED],
            ["save_total_limit=1", "--save_total_limit 2"],
        ),
        (["--eval_dataset", "{data}", "--metric_for_best_model", "bleu", *EVALUATED], ["'bleu'", "not evaluated", "eval_loss"]),
        (
            ["--eval_dataset", '{"val": "v.jsonl"}', "--metric_for_best_model", "loss", *EVALUATED],
            ["'loss'", "not evaluated", "eval_val_loss"],
        ),
        (
            ["--eval_dataset", "{data}", "--metric_for_best_model", "loss", "--greater_is_better", "True", *EVALUATED],
            ["greater_is_better=True", "loss"],
        ),
        (["--eval_dataset", "{data}", "--early_stopping_patience", "2", *EVALUATED], ["patience=2", "--load_best_model_at_end"]),
        (["--eval_dataset", "{data}", "--early_stopping_patience", "0", *EVALUATED], ["early_stopping_patience=0", "at least 1"]),
        (["--eval_packing", "True"], ["eval_packing", "--batching packed"]),
        # Model
        (["--model_name_or_path", None], ["no model", "--vision_model and --text_model"]),
        (["--model_name_or_path", "{not_a_model}"], ["not_a_model", "no config.json"]),
        (["--model_name_or_path", "{cut_config}"], ["config.json", "not valid JSON", "save the model again"]),
        (["--model_name_or_path", "{text}"], ["model_type='llama'", "--vision_model"]),
        (["--model_name_or_path", "{adapter}"], ["LoRA adapter", "--merge"]),
        (["--model_name_or_path", "/no/such/folder"], ["/no/such/folder", "does not exist"]),
        (["--model_name_or_path", "{no_weights}"], ["no_weights", "*.safetensors"]),
        (["--model_name_or_path", "{wrong_shape}"], ["lm_head.weight is [7, 24] and should be ["]),
        (["--model_name_or_path", "{cut_weights}"], ["model.safetensors", "cannot be read"]),
        (["--model_name_or_path", "{disagreeing}"], ["visual tokens an image: 9 and 4", "processor"]),
        (["--image_size", "48"], ["--image_size", "already has", "leave out"]),
        (["--projector", '{"projector_type": "c-abs"}'], ["already has", "leave out"]),
        (NEW, ["projector_type", "--projector"]),
        (new(num_query_tokens=4), ["projector_type", "such as"]),
        (new(projector_type="c-abs"), ["num_query_tokens", "is missing", "such as"]),
        (new(projector_type="c-abs", num_query_tokens=150), ["num_query_tokens=150", "not a perfect square", "144 or 169"]),
        (new(projector_type="q-former", num_query_tokens=4), ["'q-former'", "c-abs"]),
        (new(projector_type="c-abs", num_query_tokens=4, depht=3), ["unknown projector settings depht", "depth"]),
        (new(projector_type="linear", num_query_tokens=9), ["num_query_tokens=9", "16"]),
        ([*new(**NEW_PROJECTOR), "--image_size", "45"], ["image_size=45", "patch_size=8", "use 40"]),
        ([*new(**NEW_PROJECTOR), "--image_size", "0"], ["image_size=0", "leave it out"]),
        ([*new(**NEW_PROJECTOR), "--vision_feature_layer", "-9"], ["vision_feature_layer=-9", "3 blocks"]),
        ([*NEW, "--projector", "c-abs"], ["--projector 'c-abs'", "JSON"]),
        # Training
        (["--stage", "pretrain"], ["pretrain", "align"]),
        (["--stage", "align", "--use_peft"], ["LoRA", "'align'", "--stage instruct"]),
        (["--use_peft", "--lora_target_modules", "no_such_module"], ["no_such_module", "lora_target_modules", "v_proj"]),
        (["--use_peft", "--lora_target_modules", "q_proj", "w_proj"], ["lora_target_modules", "no 'w_proj'", "v_proj"]),
        (
            ["--use_peft", "--lora_target_modules", ".*(q_proj|v_proj)"],
            ["lora_target_modules='.*(q_proj|v_proj)'", "vision tower", "names alone"],
        ),
        (
            ["--use_peft", "--lora_target_modules", ".*(language_model.*q_proj|lm_head)"],
            ["lora_target_modules='.*(language_model.*q_proj|lm_head)'", "the head", "--lora_modules_to_save lm_head"],
        ),
        (["--use_peft", "--lora_r", "0"], ["lora_r=0", "positive"]),
        (["--use_peft", "--lora_alpha", "0"], ["lora_alpha=0", "lora_r"]),
        (["--use_peft", "--lora_modules_to_save", "lm_hed"], ["lora_modules_to_save", "no 'lm_hed'", "lm_head"]),
        (["--use_peft", "--lora_modules_to_save", "vision_tower"], ["lora_modules_to_save", "no 'vision_tower'", "lm_head"]),
        (["--use_peft", "--lora_target_modules", "*.q_proj"], ["lora_target_modules='*.q_proj'", "nothing to repeat", "v_proj"]),
        (["--use_peft", "--lora_target_parameters", "q_proj.weight"], ["lora_target_parameters", "--lora_target_modules"]),
        (["--use_peft", "--lora_task_type", "SEQ_CLS"], ["lora_task_type='SEQ_CLS'", "leave it out"]),
        (["--lora_r", "64"], ["lora_r", "--use_peft"]),
        ([*new(**NEW_PROJECTOR), "--model_revision", "v1"], ["model_revision='v1'", "--model_name_or_path"]),
        (["--trust_remote_code"], ["trust_remote_code", "leave it out"]),
        (["--merge"], ["--merge", "--use_peft"]),
        (["--load_in_4bit"], ["load_in_4bit", "--use_peft"]),
        ([*new(**NEW_PROJECTOR), "--use_peft", "--load_in_4bit"], ["load_in_4bit", "--model_name_or_path"]),
        # Vision tower, and rates of parts
        (["--train_vision_tower", "3"], ["train_vision_tower=3", "2 blocks", "vision_feature_layer=-2", "1 to 2, or all"]),
        (["--train_vision_tower", "0"], ["train_vision_tower=0", "from 1", "leave it out"]),
        (["--train_vision_tower=-1"], ["train_vision_tower=-1", "from 1"]),
        (["--train_vision_tower", "last"], ["train_vision_tower=last", "all, or a number"]),
        (["--train_vision_tower", "1.5"], ["train_vision_tower=1.5", "all, or a number"]),
        (["--train_vision_tower", "all", "--use_peft"], ["train_vision_tower=all", "--use_peft", "--lora_vision"]),
        (["--train_vision_tower", "1", "--load_in_8bit"], ["load_in_8bit", "quantized model cannot be trained", "--use_peft"]),
        (["--lora_vision"], ["lora_vision", "--use_peft"]),
        (["--lora_vision", "--use_peft", "--stage", "align"], ["LoRA", "'align'", "--stage instruct"]),
        (
            ["--lora_vision", "--use_peft", "--lora_target_modules", "query", "q_proj"],
            ["the LLM and the vision tower have no 'query'", "gate_proj", "fc1"],
        ),
        (["--lora_vision", "--use_peft", "--lora_target_modules", "fc1"], ["reach nothing of the LLM", "gate_proj", "name some of each"]),
        (
            ["--lora_vision", "--use_peft", "--lora_target_modules", "o_proj"],
            ["reach nothing of the vision tower", "fc1", "--lora_target_modules"],
        ),
        (["--vision_learning_rate", "1e-6"], ["vision_learning_rate=1e-06", "--train_vision_tower", "--lora_vision"]),
        (["--train_vision_tower", "all", "--vision_learning_rate", "0"], ["vision_learning_rate=0.0", "more than 0", "leave it out"]),
        (["--projector_learning_rate=-1"], ["projector_learning_rate=-1.0", "more than 0"]),
        (["--projector_learning_rate", "nan"], ["projector_learning_rate=nan", "finite"]),
        (["--projector_learning_rate", "1e-3", "--stage", "align"], ["projector_learning_rate=0.001", "'align'", "--learning_rate"]),
        (
            ["--projector_learning_rate", "1e-3", "--optim", "galore_adamw_layerwise", "--optim_target_modules", "q_proj"],
            ["projector_learning_rate=0.001", "galore_adamw_layerwise", "adamw_torch"],
        ),
        (
            ["--train_vision_tower", "1", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'],
            ["use_reentrant=True", "no gradient", "leave it out"],
        ),
        (["--no_such_setting", "1"], ["no_such_setting"]),
        (["--learning_rate=-1e-4"], ["learning_rate=-0.0001", "more than 0"]),
        (["--learning_rate", "inf"], ["learning_rate=inf", "finite"]),
        (["--max_grad_norm", "nan"], ["max_grad_norm=nan", "at least 0"]),
        (["--dataloader_num_workers=-1"], ["num_workers", "non-negative"]),
        (["--report_to", "carrier-pigeon"], ["report_to=", "carrier-pigeon", "--report_to none"]),
        (["--report_to", "swanlab"], ["report_to=", "pip install swanlab", "--report_to none"]),
        (["--save_strategy", "best", "--metric_for_best_model", "loss"], ["save_strategy=best", "--load_best_model_at_end"]),
        (
            ["--learning_rate", "1e-6", "--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-5}'],
            ["min_lr=1e-05", "learning_rate=1e-06", "lower it"],
        ),
        (["--lr_scheduler_kwargs", "[1]"], ["lr_scheduler_kwargs='[1]'", "mapping"]),
        (
            ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr_rate": 2}'],
            ["min_lr_rate=2", "0 to 1"],
        ),
        (["--label_smoothing_factor", "1.5"], ["label_smoothing_factor=1.5", "below 1"]),
        (["--max_steps", "0"], ["max_steps=0", "-1"]),
        (["--max_steps", "-1", "--num_train_epochs", "inf"], ["num_train_epochs=inf", "finite"]),
        (["--push_to_hub", "--hub_token", "nobody"], ["push_to_hub", "hf auth login", "hub_upload/push.py"]),
        (["--optim", "lomo"], ["optim=lomo", "pip install"]),
        (["--accelerator_config", '{"dispatch_batches": true}'], ["dispatch_batches", "leave it out"]),
        (["--dataloader_persistent_workers"], ["persistent_workers", "num_workers > 0"]),
        (["--dataloader_drop_last", "--per_device_train_batch_size", "64"], ["drop_last", "batches of 64"]),
        (["--adam_beta1", "2"], ["Invalid beta parameter", "2.0"]),
        (["--weight_decay=-1"], ["Invalid weight_decay value: -1"]),
        (["--lr_scheduler_type", "cosine_with_min_lr"], ["cosine_with_min_lr", "min_lr"]),
        (["--max_grad_norm=-1"], ["max_grad_norm=-1"]),
        (["--warmup_steps", "150"], ["warm-up of 150 steps", "max_steps=4", "--warmup_steps"]),
        (["--per_device_train_batch_size", "0"], ["per_device_train_batch_size=0"]),
        (["--per_device_train_batch_size", "3", "--global_batch_size", "8"], ["global_batch_size=8", "multiple of 3"]),
        (
            ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--global_batch_size", "8"],
            ["global_batch_size=8", "make 4", "leave gradient_accumulation_steps out"],
        ),
        # Output
        (["--output_dir", "{other_run}"], ["other_run", "already holds", "--resume_from_checkpoint"]),
        (["--output_dir", ""], ["output_dir is empty", "give the folder"]),
        (["--output_dir", "{a_file}/out"], ["a_file", "is a file", "another folder"]),
        (["--output_dir", "/proc/honeybee"], ["/proc/honeybee", "cannot be written", "another folder"]),
        (["--resume"], ["no whole checkpoint found", "--save_strategy steps"]),
    ],
)  # fmt: skip
def test_wrong_input_is_named_before_any_work(arguments, words, things, monkeypatch, capsys):
    message = refusal(arguments, things, monkeypatch, capsys)
    assert all(word in message for word in words), message


def refusal(arguments, things, monkeypatch, capsys) -> str:
    """The error that ends the script: its text, or the parser's on stderr."""
    defaults = {
        "--stage": "instruct",
        "--model_name_or_path": "{model}",
        "--dataset": "{data}",
        "--output_dir": "{out}",
    }
    flags = [flag for name, value in defaults.items() if name not in arguments for flag in (name, value)]
    flags += [a for n, a in enumerate(arguments) if a is not None and arguments[n + 1 : n + 2] != [None]]
    flags = [str(things[a[1:-1]]) if isinstance(a, str) and a[1:-1] in things else a for a in flags]
    flags = [a.replace("{a_file}", str(things["a_file"])) if isinstance(a, str) else a for a in flags]
    monkeypatch.setattr(sys, "argv", [str(SFT), *map(str, [*SHORT, *flags])])
    monkeypatch.setattr(SFTTrainer, "train", lambda *_, **__: pytest.fail("training started"))
    with pytest.raises((SystemExit, ValueError)) as exit:
        sft.main()
    assert exit.value.args[0] != 0
    assert not things["out"].exists(), "a refused run leaves nothing behind"
    assert (things["other_run"] / "model.safetensors").read_text() == "weights of another run"
    return f"{exit.value} {capsys.readouterr().err[-500:]}"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lerning_rate": 1e-4}, ["lerning_rate"]),
        ({"dtype": "half"}, ["'half'", "float32, bfloat16"]),
        ({"stage": "pretrain"}, ["'pretrain'", "align, instruct"]),
        ({"projector": ["c-abs"]}, ["c-abs", "mapping"]),
        ({"learning_rate": 0}, ["learning_rate=0", "more than 0"]),
        ({"text_model": ["one", "two"]}, ["text_model", "['one', 'two']", "str"]),
        ({"vision_feature_layer": "-2"}, ["vision_feature_layer: '-2'", "list[int]"]),
        ({"save_strategy": False}, ["save_strategy", "False", "quotes"]),
        ({"learning_rate": None}, ["learning_rate", "None", "float"]),
        ({"lr_scheduler_kwargs": {"min_lr": "1e-6"}}, ["min_lr='1e-6'", "1.0e-6"]),
        ({"vision_feature_layer": ["-2"]}, ["vision_feature_layer", "['-2']", "list[int]"]),
        ({"text_model": True}, ["text_model", "True", "str", "quotes"]),
        ({"max_steps": True}, ["max_steps", "True", "int"]),
        ({"use_peft": True, "lora_modules_to_save": "lm_hed"}, ["lora_modules_to_save", "no 'lm_hed'"]),
        ({"max_length": 12.5}, ["max_length", "12.5", "int"]),
        ({"per_device_train_batch_size": [2]}, ["per_device_train_batch_size", "[2]", "int"]),
        ({"lora_target_modules": 5, "use_peft": True}, ["lora_target_modules", "5", "list[str]"]),
        ({"lr_scheduler_kwargs": 3}, ["lr_scheduler_kwargs", "3", "mapping"]),
        ({"eval_dataset": {}, "eval_strategy": "epoch"}, ["--eval_dataset {}", "path or a Hub name"]),
        ({"eval_dataset": ["a.jsonl"]}, ["eval_dataset", "['a.jsonl']", "mapping or str"]),
        ({"train_vision_tower": True}, ["train_vision_tower", "True", "int or str"]),
        ({"train_vision_tower": [1]}, ["train_vision_tower", "[1]", "int or str"]),
        ({"mixture_settings": "balancing=per-task"}, ["--set balancing=per-task", "--mixture"]),
    ],
)
def test_wrong_yaml(settings, words, things, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"stage": "instruct", **settings}))
    defaults = ["--model_name_or_path", things["model"], "--dataset", things["data"], "--output_dir", things["out"]]
    monkeypatch.setattr(sys, "argv", [str(SFT), "--config", str(path), *map(str, [*SHORT, *defaults])])
    monkeypatch.setattr(SFTTrainer, "train", lambda *_, **__: pytest.fail("training started"))
    with pytest.raises((SystemExit, ValueError)) as exit:
        sft.main()
    message = f"{exit.value} {capsys.readouterr().err[-500:]}"
    assert exit.value.args[0] != 0 and all(word in message for word in words), message


def test_what_changes_nothing_is_named_and_put_back(caplog):
    words = ["--pad_token", "<pad>", "--assistant_only_loss", "--learning_rate", "1e-4"]
    training_args = parse_arguments([*words, "--output_dir", "out", "--use_cpu"]).training
    (warning,) = [record.message for record in caplog.records if record.name == "training.run.settings"]
    assert all(word in warning for word in ("pad_token", "assistant_only_loss", "processor"))
    assert "learning_rate" not in warning and training_args.learning_rate == 1e-4
    assert training_args.pad_token is None
    assert not training_args.assistant_only_loss


def test_a_setting_that_the_yaml_file_has_twice(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text("stage: instruct\nlearning_rate: 2.0e-5\nmax_steps: 4\nlearning_rate: 3.0e-4\n")
    monkeypatch.setattr(sys, "argv", [str(SFT), "--config", str(path), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="run.yaml: 'learning_rate' is there twice \\(line 4\\); keep one of them"):
        sft.main()


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A real file system of 100 kB where one can be mounted (root), else the words of one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    yield folder
    if not mount.returncode:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_is_noticed_at_the_start(small_disk, things, monkeypatch, capsys):
    out = ["--output_dir", str(small_disk / "out")]
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2"]
    message = refusal([*out, *saving], things, monkeypatch, capsys)
    assert "0.10 MB free" in message and "3 checkpoints" in message and "--save_total_limit" in message, message
    assert not (small_disk / "out").exists()


def test_several_gpus_in_one_process_are_refused(things, monkeypatch, capsys):
    monkeypatch.setattr("trl.SFTConfig.n_gpu", property(lambda self: 8))
    message = refusal([], things, monkeypatch, capsys)
    assert "8 GPUs" in message and "accelerate launch" in message


def test_errors_end_the_script_with_one_sentence(things, tmp_path):
    arguments = [
        "--dataset",
        things["missing"],
        "--model_name_or_path",
        things["model"],
        "--output_dir",
        tmp_path / "out",
    ]
    result = run_script(SFT, *arguments, *SHORT, check=False)
    assert result.returncode == 1
    assert result.stdout.strip().splitlines()[-1].startswith("error: sample 1: image file")
    assert not (tmp_path / "out").exists()


def test_yaml_values_are_read_as_meant(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "vision_feature_layer: -2\nresume_from_checkpoint: true\nlearning_rate: 2e-5\nnum_train_epochs: 1\n"
        "lora_target_modules: q_proj\nmixture_settings: seed=1\nlr_scheduler_kwargs: {min_lr: 1e-6}\nreport_to: [none]\n"
        "save_strategy: 'no'\nneftune_noise_alpha: null\nbf16: no\ntrain_vision_tower: 4\n"
    )
    settings = parse_arguments(["--config", str(path), "--output_dir", "out", "--use_cpu"])
    args, training_args, model_args = settings.honeybee, settings.training, settings.model
    assert (args.vision_feature_layer, args.mixture_settings) == ([-2], ["seed=1"])
    assert (
        args.train_vision_tower
        == 4
        == parse_arguments(
            ["--train_vision_tower", "4", "--output_dir", "out", "--use_cpu"]
        ).honeybee.train_vision_tower
    )
    assert (training_args.learning_rate, training_args.num_train_epochs, training_args.bf16) == (2e-5, 1, False)
    assert str(training_args.resume_from_checkpoint).lower() == "true" and training_args.save_strategy == "no"
    assert model_args.lora_target_modules == "q_proj"


def test_help_names_all_settings():
    text = run_script(SFT, "--help").stdout
    assert all(name in text for name in ("--projector", "--learning_rate", "--lora_r", "--dry_run"))
