# SPDX-License-Identifier: Apache-2.0
"""The model, config and processor that the settings name, new or trained."""

import os

import torch
from transformers import set_seed
from trl import get_quantization_config

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor, processor_from_vision_text_pretrained
from training.run.arguments import HoneybeeArguments
from training.run.settings import Settings
from training.trainer.engines import whole_models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto", None: None}


def new_model_settings(own: HoneybeeArguments) -> dict:
    """The settings of a new model apart from the names of its parts: image size, layer of the tower, and projector."""
    layers = own.vision_feature_layer or [-2]
    layers = layers if len(layers) > 1 else layers[0]
    return {"image_size": own.image_size, "vision_feature_layer": layers, **(own.projector or {})}


def load_config_and_processor(settings: Settings) -> tuple[HoneybeeConfig, HoneybeeProcessor]:
    """Config and processor of the model that the settings name; of a new one as it will be made.

    Raises:
        ValueError: parts that do not fit.
        OSError: a name that is neither a folder nor on the Hub, or cannot be had from there.
    """
    own, path, revision = settings.honeybee, settings.model.model_name_or_path, settings.model.model_revision
    try:
        if path is None:
            config = HoneybeeForConditionalGeneration.config_from_vision_text_pretrained(
                own.vision_model, own.text_model, **new_model_settings(own)
            )
            projector = config.projector_config
            processor = processor_from_vision_text_pretrained(
                own.vision_model,
                own.text_model,
                config.num_image_tokens,
                own.image_size,
                elastic_num_query_tokens=projector.elastic_num_query_tokens,
                num_eos_tokens=projector.num_eos_tokens,
            )
        else:
            config = HoneybeeConfig.from_pretrained(path, revision=revision)
            processor = HoneybeeProcessor.from_pretrained(path, revision=revision)
    except OSError as error:
        names = [repr(name) for name in (path, own.vision_model, own.text_model) if name and not os.path.isdir(name)]
        if not names:
            raise
        raise OSError(f"{' and '.join(names)}: no folder here, and not to be had from the Hub ({error})") from error
    return config, processor


@whole_models()
def load_model(settings: Settings, quantized: bool = True) -> HoneybeeForConditionalGeneration:
    """The model that the settings name, new or trained.

    Args:
        quantized: as the settings ask for it; False for the weights as they are in the folder.
    """
    own, model = settings.honeybee, settings.model
    dtype = DTYPES[model.dtype]
    loading = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    if model.model_name_or_path is None:
        set_seed(settings.training.seed)  # of the projector's first weights
        return HoneybeeForConditionalGeneration.from_vision_text_pretrained(
            own.vision_model,
            own.text_model,
            dtype=None if dtype == "auto" else dtype,
            **loading,
            **new_model_settings(own),
        )
    if quantized and (quantization := get_quantization_config(model)):
        loading["quantization_config"] = quantization
    return HoneybeeForConditionalGeneration.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, dtype=dtype or "auto", **loading
    )
