# SPDX-License-Identifier: Apache-2.0
import logging

import pytest

from tests.tiny import tiny_model
from training.stages import freeze_for_stage


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
