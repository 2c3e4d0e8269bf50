# SPDX-License-Identifier: Apache-2.0
import logging

import pytest
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_model
from training.run.lora import linear_names, lora_modules
from training.stages import freeze_for_stage, parameter_counts, set_trained


@pytest.mark.parametrize(
    ("stage", "parts"), [("align", {"projector"}), ("instruct", {"projector", "language_model", "lm_head"})]
)
def test_what_a_stage_trains(stage, parts, caplog):
    model = tiny_model()
    with caplog.at_level(logging.INFO):
        freeze_for_stage(model, stage)
    for name, parameter in model.named_parameters():
        part = name.removeprefix("model.").split(".")[0]
        assert parameter.requires_grad == (part in parts), name
    assert "vision_tower" in caplog.text and "frozen" in caplog.text
    assert f"{sum(p.numel() for p in model.model.projector.parameters()):,}" in caplog.text


def test_unknown_stage_is_named():
    with pytest.raises(ValueError, match="stage='pretrain' is unknown; use one of align, instruct"):
        freeze_for_stage(tiny_model(), "pretrain")


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["q_proj", "o_proj"], {"q_proj", "o_proj"}),
        ("k_proj", {"k_proj"}),
        ("mlp.up_proj", {"up_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_lora_names_are_the_language_models(targets, names):
    model = tiny_model()
    before = parameter_counts(model)
    set_trained(model, "align")
    if targets == "all-linear":
        targets = linear_names(model.model.language_model)
    get_peft_model(model, LoraConfig(r=2, **lora_modules("instruct", targets)))
    adapters = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert all(".language_model." in name for name in adapters)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapters} == names
    after = parameter_counts(model)
    assert after["projector"] == (before["projector"][0],) * 2, "counted once, and all of it trained"
    assert after["vision_tower"] == (before["vision_tower"][0], 0)
