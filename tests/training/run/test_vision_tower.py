# SPDX-License-Identifier: Apache-2.0
"""Runs that train the vision tower: killed and resumed, LoRA merged, and what is said about them."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hub_upload.model_card import _describe_training, read_provenance
from modeling_honeybee import HoneybeeForConditionalGeneration
from tests.tiny import IMAGE_SIZE, SFT, SHORT_RUN, run_script, sample, save_joined, tiny_inputs, write_dataset
from tests.training.test_sft_mixture import RUN_SFT
from training.run.checkpoints import changes_since
from training.run.checks import check_settings
from training.run.dry_run import dry_run
from training.run.plan import make_plan
from training.run.settings import parse_arguments

TOWER = ["--train_vision_tower", 1, "--vision_learning_rate", 1e-3, "--projector_learning_rate", 2e-2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, data, and a run that trains one block of the tower, killed in step 5 and resumed."""
    root = tmp_path_factory.mktemp("world")
    save_joined(root)
    write_dataset(root / "data", [sample(i, image=i % 4 < 3) for i in range(16)])
    words = ["--dataset", root / "data" / "data.jsonl", "--model_name_or_path", root / "model", *SHORT_RUN]
    words += ["--max_steps", 8, "--logging_steps", 1]
    saving = ["--save_strategy", "steps", "--save_steps", 2]
    run_script(RUN_SFT, "kill", 1, 5, *words, *TOWER, *saving, "--output_dir", root / "killed")
    return root, words, saving


def parsed(*words):
    return parse_arguments(list(map(str, words)))


def test_killed_and_resumed_ends_as_if_not(world, tmp_path):
    root, words, _ = world
    run_script(SFT, *words, *TOWER, "--output_dir", tmp_path / "whole")
    whole, killed = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", root / "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    start = load_file(root / "model" / "model.safetensors")
    moved = {name for name in start if "vision_tower" in name and not torch.equal(start[name], whole[name])}
    assert moved == {name for name in start if "vision_tower.encoder.layers.1." in name}
    logs = [
        [{k: v for k, v in row.items() if k.startswith(("learning_rate", "loss"))} for row in history if "loss" in row]
        for history in (
            json.loads((folder / "trainer_state.json").read_text())["log_history"]
            for folder in (tmp_path / "whole", root / "killed")
        )
    ]
    assert logs[0] == logs[1] and "learning_rate_vision" in logs[0][0]


def test_another_tower_or_rate_is_another_run(world):
    root, words, saving = world
    go_on = [*words, *saving, "--resume", "--output_dir", root / "killed", "--max_steps", 20]
    assert make_plan(parsed(*go_on, *TOWER)).checkpoint.endswith("checkpoint-8")
    for other, said in (
        (["--train_vision_tower", 2, *TOWER[2:]], "train_vision_tower was 1 and is 2"),
        ([*TOWER[:2], *TOWER[4:]], "vision_learning_rate was 0.001 and is None"),
        ([*TOWER[:3], 5e-3, *TOWER[4:]], "vision_learning_rate was 0.001 and is 0.005"),
        (TOWER[:4], "projector_learning_rate was 0.02 and is None"),
    ):
        with pytest.raises(ValueError, match=said):
            make_plan(parsed(*go_on, *other))


@pytest.mark.parametrize("name", ["optimizer", "scheduler"])
def test_an_optimizer_of_deepspeeds_has_one_rate(name, world, tmp_path):
    _, words, _ = world
    settings = parsed(*words, *TOWER, "--output_dir", tmp_path / "out")
    settings.training.deepspeed_plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {}})
    check_settings(settings)
    settings.training.deepspeed_plugin.deepspeed_config[name] = {"type": "any"}
    with pytest.raises(
        ValueError, match=f"vision_learning_rate=0.001, projector_.* the {name} of DeepSpeed's own .* leave it out"
    ):
        check_settings(settings)


def test_a_mark_without_these_settings_is_of_a_run_without_them(world, tmp_path):
    arguments = parsed("--output_dir", tmp_path, "--use_cpu", "--bf16", "False").training
    (tmp_path / "honeybee_run.json").write_text("{}")
    now = {
        "train_vision_tower": None,
        "lora_vision": False,
        "vision_learning_rate": None,
        "projector_learning_rate": None,
    }
    assert changes_since(now, arguments) == []
    assert len(changes_since(dict.fromkeys(now, 1), arguments)) == 4


def test_the_page_and_the_card_say_it(world):
    root, _, _ = world
    page = (root / "killed" / "run_summary.md").read_text()
    assert re.search(r"vision_tower +[\d,]+ parameters, [\d,]+ trained, the rest frozen", page)
    card = _describe_training(read_provenance(root / "killed"))
    for name, value in zip(TOWER[::2], TOWER[1::2]):
        name = name.removeprefix("--")
        assert f"| {name} | {value} |" in page and f"| {name} | `{value}` |" in card
    assert "lora_vision" not in page + card


def test_the_dry_run_says_it(world, tmp_path, monkeypatch):
    _, words, _ = world
    monkeypatch.setattr("training.run.dry_run.gigabytes", lambda number: f"{number:.0f} B")
    words = [*words, "--dry_run", "--output_dir", tmp_path / "out"]

    def said(*more) -> tuple[str, float]:
        text = dry_run(parsed(*words, *more))
        return text, float(re.search(r"activations +(\d+) B", text)[1])

    frozen, none = said()
    assert re.search(r"vision_tower +[\d,]+ parameters, frozen", frozen) and "to 0.01\n" in frozen
    text, one = said(*TOWER)
    assert re.search(r"vision_tower +[\d,]+ parameters, [\d,]+ trained, the rest frozen", text)
    assert "to 0.01; vision: 0.1 times that, 0.001; projector: 2 times that, 0.02\n" in text
    # 17 tokens of width 32 an image, 12 images in 16 samples, two samples, 4 bytes a number
    stream = 17 * 32 * 4 * 2 * 12 / 16
    layer = 17 * (12 * 32 + 4 * 48) * 4 * 2 * 12 / 16
    assert one - none == pytest.approx(stream + layer, abs=2)
    for more in (["--train_vision_tower", "all"], ["--use_peft", "--lora_vision"]):
        assert said(*more)[1] - none == pytest.approx(2 * stream + layer, abs=2)
    assert said(*TOWER, "--gradient_checkpointing", "False")[1] - said("--gradient_checkpointing", "False")[1] == (
        pytest.approx(layer, abs=2)
    )


def test_lora_in_the_tower_is_merged_into_it(world, tmp_path):
    root, words, _ = world
    lora = ["--use_peft", "--lora_r", 4, "--merge", "--lora_vision", "--lora_target_modules", "all-linear"]
    run_script(SFT, *words, *lora, "--vision_learning_rate", 2e-2, "--output_dir", tmp_path)
    start, merged = (load_file(folder / "model.safetensors") for folder in (root / "model", tmp_path / "merged"))
    assert start.keys() == merged.keys()
    moved = {name for name in start if "vision_tower" in name and not torch.equal(start[name], merged[name])}
    layers = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    assert moved == {
        name
        for name in start
        if "vision_tower" in name and name.endswith(tuple(f".{layer}.weight" for layer in layers))
    }
    base = HoneybeeForConditionalGeneration.from_pretrained(root / "model").eval()
    pixels, inputs = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE), tiny_inputs(base)
    before = base.model.get_patch_features(pixels)
    adapted = PeftModel.from_pretrained(base, tmp_path).eval()
    after = adapted.get_base_model().model.get_patch_features(pixels)
    assert (after - before).abs().max() > 1e-3
    model = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(model.model.get_patch_features(pixels), after, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(**inputs).logits, adapted(**inputs).logits, atol=1e-5, rtol=1e-4)
