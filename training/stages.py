# SPDX-License-Identifier: Apache-2.0
"""What each of the two training stages trains (paper, section 4): the projector, then the projector and the LLM."""

import logging

from modeling_honeybee import HoneybeeForConditionalGeneration

logger = logging.getLogger(__name__)

# Prefixes of the parameters that a stage trains; the vision tower is in neither.
TRAINED = {
    "align": ("model.projector.",),
    "instruct": ("model.projector.", "model.language_model.", "lm_head."),
}


def freeze_for_stage(model: HoneybeeForConditionalGeneration, stage: str) -> None:
    """Makes exactly the parameters of `TRAINED[stage]` require a gradient, and logs how many there are of each part.

    Raises:
        ValueError: an unknown stage.
    """
    if stage not in TRAINED:
        raise ValueError(f"stage={stage!r} is unknown; use one of {', '.join(TRAINED)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED[stage]))
    logger.info("Stage %s:", stage)
    for part, module in {**dict(model.model.named_children()), "lm_head": model.lm_head}.items():
        total = sum(p.numel() for p in module.parameters())
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        logger.info("  %-15s %15s parameters, %s", part, f"{total:,}", "trained" if trained else "frozen")


def lora_modules(stage: str) -> dict:
    """Where LoRA goes when it takes the LLM's place in a stage: q and v of the LLM (paper, section 4), with the
    projector trained in full. `all-linear` would reach into the vision tower.

    Raises:
        ValueError: LoRA in alignment, which does not train the LLM.
    """
    if stage != "instruct":
        raise ValueError(f"LoRA adapts the LLM, which stage {stage!r} does not train; use it with --stage instruct")
    return {"target_modules": r".*\.language_model\..*\.(q_proj|v_proj)", "modules_to_save": ["projector"]}
