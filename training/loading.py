# SPDX-License-Identifier: Apache-2.0
"""The model, config and processor that the arguments name, new or trained."""

import os
from dataclasses import replace

import torch
from peft import PeftModel
from transformers import set_seed
from trl import ModelConfig, SFTConfig, get_quantization_config

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor, processor_from_vision_text_pretrained
from training.arguments import HoneybeeArguments
from training.engines import whole_models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto", None: None}


def new_model(args: HoneybeeArguments) -> dict:
    """The settings of a new model besides its parts."""
    layers = args.vision_feature_layer or [-2]
    layers = layers if len(layers) > 1 else layers[0]
    return {"image_size": args.image_size, "vision_feature_layer": layers, **(args.projector or {})}


def load_config_and_processor(
    args: HoneybeeArguments, model_args: ModelConfig
) -> tuple[HoneybeeConfig, HoneybeeProcessor]:
    """Config and processor of the model that the arguments name; of a new one as it will be made.

    Raises:
        ValueError: parts that do not fit.
        OSError: a name that is neither a folder nor on the Hub, or cannot be had from there.
    """
    path = model_args.model_name_or_path
    try:
        if path is None:
            config = HoneybeeForConditionalGeneration.config_from_vision_text_pretrained(
                args.vision_model, args.text_model, **new_model(args)
            )
            processor = processor_from_vision_text_pretrained(
                args.vision_model, args.text_model, config.num_image_tokens, args.image_size
            )
        else:
            config = HoneybeeConfig.from_pretrained(path, revision=model_args.model_revision)
            processor = HoneybeeProcessor.from_pretrained(path, revision=model_args.model_revision)
    except OSError as error:
        names = [repr(name) for name in (path, args.vision_model, args.text_model) if name and not os.path.isdir(name)]
        if not names:
            raise
        raise OSError(f"{' and '.join(names)}: no folder here, and not to be had from the Hub ({error})") from error
    return config, processor


@whole_models()
def load_model(
    args: HoneybeeArguments, training_args: SFTConfig, model_args: ModelConfig
) -> HoneybeeForConditionalGeneration:
    """The model that the arguments name, new or trained."""
    dtype = DTYPES[model_args.dtype]
    loading = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    if model_args.model_name_or_path is None:
        set_seed(training_args.seed)  # of the projector's first weights
        return HoneybeeForConditionalGeneration.from_vision_text_pretrained(
            args.vision_model,
            args.text_model,
            dtype=None if dtype == "auto" else dtype,
            **loading,
            **new_model(args),
        )
    if quantization := get_quantization_config(model_args):
        loading["quantization_config"] = quantization
    return HoneybeeForConditionalGeneration.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, dtype=dtype or "auto", **loading
    )


@whole_models()
def merge_adapter(args: HoneybeeArguments, training_args: SFTConfig, model_args: ModelConfig) -> str:
    """Puts the adapter in `output_dir` into its base model, not quantized, and writes the whole model beside it.

    Returns:
        The new folder.
    """
    base = load_model(args, training_args, replace(model_args, load_in_4bit=False, load_in_8bit=False))
    folder = os.path.join(training_args.output_dir, "merged")
    PeftModel.from_pretrained(base, training_args.output_dir).merge_and_unload().save_pretrained(folder)
    HoneybeeProcessor.from_pretrained(training_args.output_dir).save_pretrained(folder)
    return folder


def bytes_of(dtype: str | None, config: HoneybeeConfig) -> int:
    """Bytes of a weight as the model is loaded; a new one has its language model's dtype."""
    dtype = DTYPES[dtype]
    if dtype in (None, "auto"):
        dtype = config.dtype or torch.float32
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return dtype.itemsize


def state_bytes(
    parameters: dict[str, tuple[int, int]], config: HoneybeeConfig, training_args: SFTConfig, model_args: ModelConfig
) -> dict[str, int]:
    """Bytes of `weights`, of the `trained` ones among them, and of the `optimizer` while training, as they are saved, too.

    Weights: 4 bytes where trained under mixed precision, else those of their dtype, half a byte where quantized to 4
    bits. AdamW: two float32 numbers for each trained weight (8-bit optimizers: two bytes; Adafactor: none).

    Args:
        parameters: part of the model -> (all, trained).
    """
    size = bytes_of(model_args.dtype, config)
    total, trained = map(sum, zip(*parameters.values()))
    trained_bytes = trained * (4 if training_args.bf16 or training_args.fp16 else size)
    quantized = 0
    if model_args.load_in_4bit or model_args.load_in_8bit:
        all_here, trained_here = parameters["language_model"]
        quantized = all_here - trained_here
    frozen_bytes = (total - trained - quantized) * size + quantized * (0.5 if model_args.load_in_4bit else 1)
    optimizer = training_args.optim.value
    return {
        "weights": int(trained_bytes + frozen_bytes),
        "trained": trained_bytes,
        "optimizer": trained * (2 if "8bit" in optimizer else 0 if "adafactor" in optimizer else 8),
    }
