# SPDX-License-Identifier: Apache-2.0
"""LoRA in the language model, with the projector trained in full (paper, section 4): settings, where it goes, merging."""

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
    lora_modules(settings.honeybee.stage)
    if quantized and not model.model_name_or_path:
        raise ValueError(
            "load_in_4bit and load_in_8bit quantize a trained model; give --model_name_or_path the output of stage 1"
        )
    if quantized and not is_bitsandbytes_available():
        raise ValueError("load_in_4bit and load_in_8bit need bitsandbytes: pip install bitsandbytes")


def lora_modules(stage: str, targets: str | list[str] = ("q_proj", "v_proj")) -> dict:
    """Where LoRA goes when it takes the LLM's place in a stage, with the projector trained in full.

    Args:
        targets: names of linear layers, of which the LLM's are taken (other parts have some of the same name), or a
            pattern for their whole paths.

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
        targets = rf".*\.language_model\..*\.({'|'.join(map(re.escape, targets))})"
    return {"target_modules": targets, "modules_to_save": ["projector"]}


def linear_names(module: nn.Module) -> list[str]:
    """Names, without their paths, of the linear layers inside: what `all-linear` means for a part of the model."""
    return sorted({name.rpartition(".")[2] for name, layer in module.named_modules() if isinstance(layer, nn.Linear)})


def lora_config(settings: Settings, skeleton: HoneybeeForConditionalGeneration) -> LoraConfig | None:
    """LoRA as the settings ask for it in this model; None for a run without it.

    Raises:
        ValueError: a name that no layer has.
    """
    model = settings.model
    if not model.use_peft:
        return None
    targets, language_model = model.lora_target_modules, skeleton.model.language_model
    if targets == "all-linear":
        targets = linear_names(language_model)
    for target in targets if isinstance(targets, list) else ():
        if not _is_there(target, (name for name, _ in language_model.named_modules())):
            raise ValueError(
                f"lora_target_modules: the LLM has no {target!r}; its linear layers are named "
                f"{', '.join(linear_names(language_model))}"
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
    modules = lora_modules(settings.honeybee.stage, *([targets] if targets else []))
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


def parameter_counts_with(lora: LoraConfig, skeleton: HoneybeeForConditionalGeneration) -> dict[str, tuple[int, int]]:
    """[`parameter_counts`] of the model with LoRA, which is put into `skeleton` for it.

    Raises:
        ValueError: peft cannot put it there, or it would reach into the head or the vision tower.
    """
    freeze_for_lora(skeleton)
    names, asked = (
        ", ".join(linear_names(skeleton.model.language_model)),
        f"lora_target_modules={lora.target_modules!r}",
    )
    try:
        with torch.device("meta"):
            get_peft_model(skeleton, deepcopy(lora))
    except (ValueError, re.error) as error:
        raise ValueError(
            f"LoRA with lora_r={lora.r}, lora_dropout={lora.lora_dropout} and {asked} cannot be put into this model "
            f"({error}); its LLM's linear layers are named {names}"
        ) from error
    counts = parameter_counts(skeleton)
    if isinstance(skeleton.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            f"{asked} reach the head, and TRL's loss reads its weight without the adapter; leave lm_head out there, and "
            "train it in full with --lora_modules_to_save lm_head"
        )
    if counts["vision_tower"][1]:
        raise ValueError(
            f"{asked} reach into the vision tower, which no stage trains; give names alone (q_proj v_proj), of which the "
            "LLM's are taken, or all-linear"
        )
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
