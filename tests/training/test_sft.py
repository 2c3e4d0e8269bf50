# SPDX-License-Identifier: Apache-2.0
"""`training/sft.py` as a user runs it: a real script, a real trainer, real files."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor, check_processor
from tests.tiny import (
    NEW_PROJECTOR,
    SFT,
    SHORT_RUN,
    new_model,
    run_script,
    sample,
    save_clip,
    save_llama,
    tiny_inputs,
    write_dataset,
)

SHORT = ["--max_steps", 4, "--logging_steps", 1, *SHORT_RUN]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pretrained parts, a dataset, and the outputs of both stages."""
    root = tmp_path_factory.mktemp("world")
    save_clip(root / "vision")
    save_llama(root / "text")
    # In order: batches of two samples, some of them without any image.
    data = write_dataset(root, [sample(i, image=i % 4 < 2) for i in range(16)])
    new = new_model(root)
    run_script(SFT, "--stage", "align", "--dataset", data, *new, "--output_dir", root / "align", *SHORT)
    second = ["--stage", "instruct", "--dataset", data, "--model_name_or_path", root / "align"]
    run_script(SFT, *second, "--output_dir", root / "instruct", *SHORT)
    return root


def changed(before, after):
    """Names of the tensors that differ, without those that are new."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_stages_change_exactly_their_parameters(world):
    def weights(name):
        return load_file(world / name / "model.safetensors")

    torch.manual_seed(42)
    start = HoneybeeForConditionalGeneration.from_vision_text_pretrained(
        str(world / "vision"), str(world / "text"), **NEW_PROJECTOR
    ).state_dict()
    align, instruct = weights("align"), weights("instruct")
    projector = {name for name in align if ".projector." in name}
    tower = {name for name in align if ".vision_tower." in name}
    frozen_so_far = changed(start, align)
    assert frozen_so_far <= projector
    assert changed(align, instruct) == set(align) - tower
    assert changed(start, instruct) <= set(align) - tower
    # Each projector tensor moved in alignment too: none still has its value from before the optimizer.
    state = json.loads((world / "align" / "trainer_state.json").read_text())
    assert len([row for row in state["log_history"] if "loss" in row]) == 4


def test_alignment_moves_every_projector_tensor(world, tmp_path):
    """From a saved model, so that start and end are both on disk."""
    arguments = ["--stage", "align", "--dataset", world / "data.jsonl", "--model_name_or_path", world / "align"]
    run_script(SFT, *arguments, "--output_dir", tmp_path / "again", *SHORT)
    before, after = (
        load_file(world / "align" / "model.safetensors"),
        load_file(tmp_path / "again" / "model.safetensors"),
    )
    assert changed(before, after) == {name for name in before if ".projector." in name}


def test_output_is_a_whole_model(world):
    model, info = HoneybeeForConditionalGeneration.from_pretrained(world / "instruct", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    check_processor(model.config, HoneybeeProcessor.from_pretrained(world / "instruct"))
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]
    assert (world / "instruct" / "modeling_honeybee.py").is_file()


def test_batches_without_images_train_in_both_stages(world, tmp_path):
    # The order of the sampler must not decide: text-only samples alone, but for one image that alignment asks for.
    data = write_dataset(tmp_path, [sample(0, image=True), *[sample(i, image=False) for i in range(1, 9)]])
    for stage in ("align", "instruct"):
        arguments = ["--stage", stage, "--dataset", data, "--model_name_or_path", world / "align"]
        run_script(SFT, *arguments, "--output_dir", tmp_path / stage, *SHORT, "--per_device_train_batch_size", 1)


def last_loss(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row][-1]


def test_killed_and_resumed_ends_as_if_not(world, tmp_path):
    arguments = [
        SFT, "--stage", "instruct", "--dataset", world / "data.jsonl", "--model_name_or_path", world / "align", *SHORT,
        "--max_steps", 12, "--save_strategy", "steps", "--save_steps", 3,
    ]  # fmt: skip
    run_script(*arguments, "--output_dir", tmp_path / "whole")
    killed = [*arguments, "--output_dir", tmp_path / "killed"]
    process = subprocess.Popen(
        [sys.executable, *map(str, killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "killed" / "checkpoint-6" / "trainer_state.json"
    deadline = time.time() + 300
    while not checkpoint.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "it was done before it could be killed"
    assert run_script(*killed, check=False).returncode != 0, "a started run is not overwritten"
    run_script(*killed, "--resume_from_checkpoint", "true")
    assert abs(last_loss(tmp_path / "killed") - last_loss(tmp_path / "whole")) < 1e-6
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert changed(whole, resumed) == set()


def test_lora_trains_saves_reloads_and_merges(world, tmp_path):
    run_script(
        SFT, "--stage", "instruct", "--dataset", world / "data.jsonl", "--model_name_or_path", world / "align",
        "--output_dir", tmp_path / "lora", *SHORT, "--use_peft", "--lora_r", 4, "--lora_target_modules", "k_proj", "up_proj",
    )  # fmt: skip
    adapter = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapter if ".lora_" in name} == {"k_proj", "up_proj"}
    assert all((".projector." in name) or (".language_model." in name and "lora_" in name) for name in adapter)
    assert any("lora_B" in name and tensor.any() for name, tensor in adapter.items())
    base = HoneybeeForConditionalGeneration.from_pretrained(world / "align")
    inputs = tiny_inputs(base)
    before = base(**inputs).logits
    model = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    adapted = model(**inputs).logits
    assert (adapted - before).abs().max() > 1e-3
    by_name = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "lora").eval()
    torch.testing.assert_close(by_name(**inputs).logits, adapted, atol=1e-5, rtol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, adapted, atol=1e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(**inputs).logits, adapted, atol=1e-5, rtol=1e-4)


def test_a_start_that_failed_does_not_block_its_folder(world, tmp_path):
    data, out = world / "data.jsonl", tmp_path / "out"
    new = ["--stage", "align", "--dataset", data, "--vision_model", world / "vision", "--text_model", world / "text"]
    wrong = json.dumps({"projector_type": "linear", "num_query_tokens": 9})
    assert run_script(SFT, *new, "--projector", wrong, "--output_dir", out, *SHORT, check=False).returncode == 1
    run_script(SFT, *new, "--projector", '{"projector_type": "linear"}', "--output_dir", out, *SHORT)


def test_yaml_and_flags_together(world, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        yaml.safe_dump(
            {"stage": "instruct", "dataset": str(world / "data.jsonl"), "max_steps": 50, "max_length": 200,
             "model_name_or_path": str(world / "align")}
        )
    )  # fmt: skip
    run_script(SFT, "--config", config, "--output_dir", tmp_path / "out", *SHORT, "--max_steps", 2)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert os.path.isfile(tmp_path / "out" / "honeybee_run.json")
