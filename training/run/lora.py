# SPDX-License-Identifier: Apache-2.0
"""LoRA in the language model (paper, section 4), and in the vision tower where that is asked for, with the projector trained
in full: settings, where it goes, merging."""

import os
import re
from copy import deepcopy
from dataclasses import replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.utils import is_bitsandbytes_available
from trl import get_peft_config

from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor
from training.run.loading import load_model
from training.run.settings import Settings, is_set
from training.stages import parameter_counts, set_trained, trains_language_model
from training.trainer.engines import whole_models

DEFAULT_TARGETS = ("q_proj", "v_proj")
QUANTIZATION = ("load_in_4bit", "load_in_8bit")
# What of TRL's `ModelConfig` makes one run with LoRA another one than the next.
LORA_SETTINGS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "use_rslora", "use_dora",
    *QUANTIZATION,
)  # fmt: skip


def check_lora_settings(settings: Settings) -> None:
    """What is wrong with LoRA's settings before a file is read.

    Raises:
        ValueError: LoRA in alignment, its settings without it, or a quantized model that cannot be trained.
    """
    model, quantized = settings.model, any(getattr(settings.model, name) for name in QUANTIZATION)
    if not model.use_peft:
        given = [name for name in LORA_SETTINGS if is_set(model, name) and name not in QUANTIZATION]
        given += ["lora_vision"] if settings.honeybee.lora_vision else []
        if settings.honeybee.merge:
            raise ValueError(
                "--merge writes a LoRA adapter and its base as one model, and there is none; add --use_peft"
            )
        if given:
            raise ValueError(
                f"{', '.join(given)}: a setting of LoRA, which is not used; add --use_peft or leave it out"
            )
        if quantized:
            raise ValueError("load_in_4bit and load_in_8bit: a quantized model cannot be trained; add --use_peft")
        return
    if settings.honeybee.train_vision_tower is not None:
        raise ValueError(
            f"train_vision_tower={settings.honeybee.train_vision_tower} with --use_peft: beside LoRA only the projector is "
            "trained in full; give --lora_vision for LoRA in the tower, or leave out --use_peft"
        )
    lora_modules(settings.honeybee.stage)
    if quantized and not model.model_name_or_path:
        raise ValueError(
            "load_in_4bit and load_in_8bit quantize a trained model; give --model_name_or_path the output of stage 1"
        )
    if quantized and not is_bitsandbytes_available():
        raise ValueError("load_in_4bit and load_in_8bit need bitsandbytes: pip install bitsandbytes")


def lora_modules(stage: str, targets: str | list[str] = DEFAULT_TARGETS, vision_blocks: str | None = None) -> dict:
    """Where LoRA goes when it takes the LLM's place in a stage, with the projector trained in full.

    Args:
        targets: names of linear layers, of which the LLM's are taken (other parts have some of the same name), or a
            pattern for their whole paths.
        vision_blocks: name of the list of the vision tower's blocks, whose layers of these names are taken, too
            (`HoneybeeModel.vision_blocks_name`).

    Returns:
        `target_modules` and `modules_to_save` of a `LoraConfig`.

    Raises:
        ValueError: LoRA in alignment, which does not train the LLM.
    """
    if not trains_language_model(stage):
        raise ValueError(f"LoRA adapts the LLM, which stage {stage!r} does not train; use it with --stage instruct")
    if isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets):
        targets = [targets]
    if not isinstance(targets, str):
        parts = r"\.language_model\..*"
        if vision_blocks is not None:
            parts = rf"({parts}|\.{re.escape(vision_blocks)}\.\d+(\..*)?)"
        targets = rf".*{parts}\.({'|'.join(map(re.escape, targets))})"
    return {"target_modules": targets, "modules_to_save": ["projector"]}


def linear_names(module: nn.Module) -> list[str]:
    """Names, without their paths, of the linear layers inside: what `all-linear` means for a part of the model."""
    return sorted({name.rpartition(".")[2] for name, layer in module.named_modules() if isinstance(layer, nn.Linear)})


def adapted_modules(skeleton: HoneybeeForConditionalGeneration, lora_vision: bool) -> dict[str, nn.Module]:
    """What LoRA goes into, by the name that errors give it.

    Raises:
        ValueError: LoRA in a tower of which no block is read.
    """
    adapted, model = {"LLM": skeleton.model.language_model}, skeleton.model
    if lora_vision:
        if not max(model.config.vision_hidden_states):
            raise ValueError(
                f"lora_vision: the projector reads the embeddings of the tower and none of its blocks (vision_feature_layer="
                f"{model.config.vision_feature_layer}); leave it out"
            )
        adapted["vision tower"] = model.get_submodule(model.vision_blocks_name)
    return adapted


def names_of_linear_layers(adapted: dict[str, nn.Module]) -> str:
    return "; ".join(
        f"the {part}'s linear layers are named {', '.join(linear_names(m))}" for part, m in adapted.items()
    )


def lora_config(settings: Settings, skeleton: HoneybeeForConditionalGeneration) -> LoraConfig | None:
    """LoRA as the settings ask for it in this model; None for a run without it.

    Raises:
        ValueError: a name that no layer has, or see [`adapted_modules`].
    """
    model = settings.model
    if not model.use_peft:
        return None
    targets, adapted = model.lora_target_modules, adapted_modules(skeleton, settings.honeybee.lora_vision)
    if targets == "all-linear":
        targets = sorted({name for module in adapted.values() for name in linear_names(module)})
    for target in targets if isinstance(targets, list) else ():
        if not any(_is_there(target, (name for name, _ in module.named_modules())) for module in adapted.values()):
            raise ValueError(
                f"lora_target_modules: the {' and the '.join(adapted)} {'has' if len(adapted) == 1 else 'have'} no {target!r}; "
                f"{names_of_linear_layers(adapted)}"
            )
    beside = [name for name in model.lora_modules_to_save or () if name != "projector"]
    parts = [name for part in ("model.language_model", "lm_head", "model.projector")
             for name, _ in skeleton.get_submodule(part).named_modules(prefix=part)]  # fmt: skip
    for name in beside:
        if not _is_there(name, parts):
            raise ValueError(
                f"lora_modules_to_save: LLM and head have no {name!r}; lm_head and embed_tokens are such names, and the "
                "projector is trained without being named"
            )
    blocks = skeleton.model.vision_blocks_name if settings.honeybee.lora_vision else None
    modules = lora_modules(settings.honeybee.stage, targets or DEFAULT_TARGETS, blocks)
    return get_peft_config(
        replace(
            model,
            lora_target_modules=modules["target_modules"],
            lora_modules_to_save=modules["modules_to_save"] + beside,
        )
    )


def _is_there(name: str, paths) -> bool:
    return any(f".{path}".endswith(f".{name}") for path in paths)


def freeze_for_lora(model: HoneybeeForConditionalGeneration) -> None:
    """LoRA takes the place of training the LLM; peft makes its own parameters trainable."""
    set_trained(model, "align")


def parameter_counts_with(
    lora: LoraConfig, skeleton: HoneybeeForConditionalGeneration, lora_vision: bool = False
) -> dict[str, tuple[int, int]]:
    """[`parameter_counts`] of the model with LoRA, which is put into `skeleton` for it.

    Raises:
        ValueError: peft cannot put it there, or it would reach into the head, the vision tower (with `lora_vision`: what is
            not one of its blocks), or not into all that it should.
    """
    freeze_for_lora(skeleton)
    adapted = adapted_modules(skeleton, lora_vision)
    names, asked = names_of_linear_layers(adapted), f"lora_target_modules={lora.target_modules!r}"
    try:
        with torch.device("meta"):
            get_peft_model(skeleton, deepcopy(lora))
    except (ValueError, re.error) as error:
        raise ValueError(
            f"LoRA with lora_r={lora.r}, lora_dropout={lora.lora_dropout} and {asked} cannot be put into this model "
            f"({error}); {names}"
        ) from error
    counts = parameter_counts(skeleton)
    if isinstance(skeleton.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            f"{asked} reach the head, and TRL's loss reads its weight without the adapter; leave lm_head out there, and "
            "train it in full with --lora_modules_to_save lm_head"
        )
    reached = {part: sum(p.numel() for p in module.parameters() if p.requires_grad) for part, module in adapted.items()}
    if counts["vision_tower"][1] > reached.get("vision tower", 0):
        which = "outside of its blocks, where nothing reaches the projector" if lora_vision else "without --lora_vision"
        raise ValueError(
            f"{asked} reach into the vision tower {which}; give names alone (q_proj v_proj), of which those of the "
            f"{' and the '.join(adapted)} are taken, or all-linear"
        )
    for part in [part for part, number in reached.items() if not number]:
        raise ValueError(f"{asked} reach nothing of the {part}; {names}; name some of each with --lora_target_modules")
    return counts


@whole_models()
def merge_adapter(settings: Settings) -> str:
    """Puts the adapter in `output_dir` into its base model, not quantized, and writes the whole model beside it.

    Returns:
        The new folder.
    """
    adapter = settings.training.output_dir
    base = load_model(settings, quantized=False)
    folder = os.path.join(adapter, "merged")
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)
    HoneybeeProcessor.from_pretrained(adapter).save_pretrained(folder)
    return folder
