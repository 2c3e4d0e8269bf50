# SPDX-License-Identifier: Apache-2.0
"""What each of the two training stages trains (paper, section 4): the projector, then the projector and the LLM. Either
trains the vision tower or its last blocks as well, where that is asked for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the settings name the stages, and `--help` should not wait for these
    from torch import nn

    from modeling_honeybee import HoneybeeForConditionalGeneration

logger = logging.getLogger(__name__)

# Prefixes of the parameters that a stage trains; for the vision tower see `tower_parameters`.
TRAINED = {
    "align": ("model.projector.",),
    "instruct": ("model.projector.", "model.language_model.", "lm_head."),
}


def set_trained(model: HoneybeeForConditionalGeneration, stage: str, vision_tower: int | str | None = None) -> None:
    """Makes exactly the parameters of `TRAINED[stage]`, and those of the vision tower that are asked for, require a gradient.

    Args:
        vision_tower: see [`tower_parameters`]; None for nothing of it.

    Raises:
        ValueError: an unknown stage, or more blocks than there are.
    """
    if stage not in TRAINED:
        raise ValueError(f"stage={stage!r} is unknown; use one of {', '.join(TRAINED)}")
    of_tower = set() if vision_tower is None else tower_parameters(model, vision_tower)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED[stage]) or name in of_tower)


def tower_parameters(model: HoneybeeForConditionalGeneration, trained: int | str) -> set[str]:
    """Names of the vision tower's parameters that are trained. The projector's input depends on all of them. Others (a norm or a
    head behind the blocks, the mask token of DINOv2) would never get a gradient, and DDP would wait for one.

    Args:
        trained: "all", or a number of blocks, counted from the deepest layer that the projector reads.

    Raises:
        ValueError: more or fewer blocks than there are.
    """
    depth = max(model.config.vision_hidden_states)
    if trained != "all" and not 1 <= trained <= depth:
        layers, remedy = model.config.vision_feature_layer, f"give 1 to {depth}, or all" if depth else "give all"
        raise ValueError(
            f"train_vision_tower={trained}: the projector reads {depth} blocks of the tower (vision_feature_layer={layers}), "
            f"and none above is run; {remedy}"
        )
    blocks = f"model.{model.model.vision_blocks_name}."
    names = [name for name, _ in model.named_parameters() if name.startswith("model.vision_tower.")]
    number = {name: int(name.removeprefix(blocks).split(".")[0]) for name in names if name.startswith(blocks)}
    first = 0 if trained == "all" else depth - trained
    found = {name for name in number if first <= number[name] < depth}
    if trained == "all":  # in the order in which a tower is built, which is that of its forward
        in_front = names[: names.index(next(iter(number)))]
        found |= {name for name in in_front if not name.endswith(".mask_token")}
    return found


def trains_language_model(stage: str) -> bool:
    """Whether a stage learns from text as well; one that does not learns from images alone, through the projector."""
    return "model.language_model.".startswith(TRAINED[stage])


def freeze_for_stage(
    model: HoneybeeForConditionalGeneration, stage: str, vision_tower: int | str | None = None
) -> None:
    """[`set_trained`], and logs how many parameters there are of each part."""
    set_trained(model, stage, vision_tower)
    logger.info("Stage %s:", stage)
    for line in parts_table(parameter_counts(model)):
        logger.info("  %s", line)


def parameter_counts(model: HoneybeeForConditionalGeneration) -> dict[str, tuple[int, int]]:
    """How many parameters each part of the model has, and how many of them are trained. A head that is tied to the embedding
    counts there. The frozen original that peft keeps beside a module trained in full does not count."""
    counts, seen = {}, {id(p) for name, p in model.named_parameters() if ".original_module." in name}
    for part, module in {**dict(model.model.named_children()), "lm_head": model.lm_head}.items():
        own = [p for p in module.parameters() if id(p) not in seen]
        seen.update(map(id, own))
        counts[part] = (sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad))
    return counts


def parts_table(counts: dict[str, tuple[int, int]]) -> list[str]:
    """A line for each part: its parameters, and what of it is trained."""
    lines = []
    for part, (total, trained) in counts.items():
        if part == "lm_head" and not total:
            lines.append(f"{part:<15} tied to the embedding")
            continue
        what = "frozen" if not trained else "trained" if trained == total else f"{trained:,} trained, the rest frozen"
        lines.append(f"{part:<15} {total:>15,} parameters, {what}")
    return lines


def keep_trained_in_float32(model: nn.Module) -> None:
    """Under mixed precision only what is computed is in half precision: a step of AdamW is too small for weights in it."""
    tower = [p for name, p in model.named_parameters() if ".model.vision_tower." in f".{name}"]
    whole = tower if tower and tower[0].requires_grad else []
    # Trained from its start on, a tower hands float32 to the norm behind its blocks, which is frozen. On a CPU torch has no
    # norm in half precision for that.
    for parameter in [*whole, *(p for p in model.parameters() if p.requires_grad)]:
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
