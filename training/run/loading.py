# SPDX-License-Identifier: Apache-2.0
"""The model, config and processor that the settings name, new or trained."""

import os

import torch
from transformers import set_seed
from trl import get_quantization_config

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration
from modeling_honeybee.configuration_honeybee import PIXELWISE_PROJECTORS, covers
from processing import HoneybeeProcessor, processor_from_vision_text_pretrained
from training.collator import CROPS, crops_of
from training.elastic import parse_elastic
from training.run.arguments import HoneybeeArguments
from training.run.settings import Settings
from training.trainer.engines import whole_models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto", None: None}


def projector_settings(own: HoneybeeArguments) -> dict:
    """The settings of a new projector, with the numbers of `--elastic` and `--overview_num_query_tokens`.

    Raises:
        ValueError: they are given twice.
    """
    settings = dict(own.projector or {})
    elastic = None if own.elastic is None else list(parse_elastic(own.elastic).numbers)
    flags = {
        "elastic_num_query_tokens": (f"--elastic {own.elastic}", elastic),
        "overview_num_query_tokens": (
            f"--overview_num_query_tokens {own.overview_num_query_tokens}", own.overview_num_query_tokens
        ),
    }  # fmt: skip
    for name, (flag, numbers) in flags.items():
        if numbers is not None and settings.get(name) is not None:
            raise ValueError(f"{flag} and {name}={settings[name]} of --projector; give one of them")
    return {**settings, **{name: numbers for name, (_, numbers) in flags.items() if numbers is not None}}


def new_model_settings(own: HoneybeeArguments) -> dict:
    """The settings of a new model apart from the names of its parts: image size, layer of the tower, and projector."""
    layers = own.vision_feature_layer or [-2]
    layers = layers if len(layers) > 1 else layers[0]
    return {"image_size": own.image_size, "vision_feature_layer": layers, **projector_settings(own)}


def record_numbers(config: HoneybeeConfig, settings: Settings) -> None:
    """Puts the numbers of `--elastic` and `--overview_num_query_tokens` into the config of a model that exists already.

    Raises:
        ValueError: its projector cannot be trained for them, or its config would not be saved with them.
    """
    own, path = settings.honeybee, settings.model.model_name_or_path
    if own.elastic is not None:
        numbers, default = list(parse_elastic(own.elastic).numbers), config.projector_config.num_query_tokens
        if config.projector_config.projector_type not in PIXELWISE_PROJECTORS and not covers(numbers, default):
            raise ValueError(
                f"--elastic {own.elastic}: the default of {path}, {default}, has to be among the numbers (or a square between "
                "them); add it"
            )
        known = config.projector_config.elastic_num_query_tokens == numbers
        _record(config, settings, "--elastic", own.elastic, {"elastic_num_query_tokens": numbers}, known)
    if own.overview_num_query_tokens is not None:
        number = own.overview_num_query_tokens
        known = config.projector_config.is_trained(number)
        flag = "--overview_num_query_tokens"
        _record(config, settings, flag, number, {"overview_num_query_tokens": number}, known)


def _record(
    config: HoneybeeConfig, settings: Settings, flag: str, value: str | int, numbers: dict, known: bool
) -> None:
    """Puts `numbers`, which `flag` asks for with `value`, into the projector's config.

    Args:
        known: whether the config of the model's folder says as much.
    """
    path, projector = settings.model.model_name_or_path, config.projector_config
    before = projector.num_learned_queries
    config.projector_config = type(projector)(**{**projector.to_dict(), **numbers})
    if projector.projector_type in ("d-abs", "resampler") and config.projector_config.num_learned_queries != before:
        raise ValueError(
            f"{flag} {value}: the {projector.projector_type} of {path} has learned queries for {before} visual tokens, and "
            f"{before} has to be the largest of the numbers; or train a new projector"
        )
    if settings.model.use_peft and not settings.honeybee.merge and not known:
        raise ValueError(
            f"{flag} {value} with --use_peft: an adapter has no config of its own, and that of {path} does not have these "
            f"numbers; train its first stage with {flag}, or give --merge"
        )


def with_settings(processor: HoneybeeProcessor, config: HoneybeeConfig, own: HoneybeeArguments) -> HoneybeeProcessor:
    """The processor with the numbers of visual tokens of `config`, and with the crops that the run asks for. One that has
    these, or none that the run changes, stays as it is.

    Raises:
        ValueError: settings of crops that do not fit together.
    """
    had = {name: getattr(processor, name) for name in CROPS}
    crops = crops_of(processor, own)
    projector = config.projector_config
    if crops["max_crops"] > 1 and crops["overview_num_query_tokens"] is None:
        crops["overview_num_query_tokens"] = projector.overview_num_query_tokens
    if own.elastic is None and crops == had:
        return processor
    return HoneybeeProcessor(
        processor.image_processor,
        processor.tokenizer,
        num_image_tokens=processor.num_image_tokens,
        chat_template=processor.chat_template,
        named_chat_templates=processor.named_chat_templates,
        elastic_num_query_tokens=projector.elastic_num_query_tokens,
        num_eos_tokens=projector.num_eos_tokens,
        **crops,
    )


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
            record_numbers(config, settings)
    except OSError as error:
        names = [repr(name) for name in (path, own.vision_model, own.text_model) if name and not os.path.isdir(name)]
        if not names:
            raise
        raise OSError(f"{' and '.join(names)}: no folder here, and not to be had from the Hub ({error})") from error
    return config, with_settings(processor, config, own)


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
    loaded = HoneybeeForConditionalGeneration.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, dtype=dtype or "auto", **loading
    )
    record_numbers(loaded.config, settings)
    return loaded
