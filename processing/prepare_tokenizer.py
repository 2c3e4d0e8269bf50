# SPDX-License-Identifier: Apache-2.0
"""Turns a language model's tokenizer and a vision model's preprocessing into a Honeybee processor.

The official code splits a prompt at the image and the role markers and tokenizes each piece on its own. What is made
here does the same inside a plain tokenizer.json, so that any runtime gets the same ids without a patched class.
"""

import json

import transformers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_base import ImageProcessingMixin

from .processing_honeybee import GUARD, IMAGE_TOKEN, ROLE_MARKERS, HoneybeeProcessor

# The PIL kind has a name of its own on transformers 5.
IMAGE_PROCESSOR_CLASS = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor

# Noncharacters: no text holds them.
_SPLIT = "\ufdd0"
_START = "\ufdd1"


def _split_sentencepiece(backend: Tokenizer):
    """Every piece gets its own "▁" in front, as the slow Llama tokenizer gives to each string."""
    steps = [normalizers.Prepend(_START)]
    for marker in ROLE_MARKERS:
        steps.append(normalizers.Replace(marker, f"{_SPLIT}{_START}{marker}{_SPLIT}{_START}"))
    steps += [
        normalizers.Replace(_START + _SPLIT, _SPLIT),  # an empty piece
        normalizers.Replace(Regex(_START + r"\z"), ""),  # the same at the end; `$` would match before a last newline
        normalizers.Replace(_START, "▁"),
        normalizers.Replace(" ", "▁"),
        normalizers.Replace(GUARD, ""),
    ]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Split(_SPLIT, "removed")
    backend.post_processor = processors.Sequence([])
    # Read back, each piece would show the blank that was put in front of it.
    undo = [decoders.Replace(Regex(f" ?{marker} ?"), marker) for marker in ROLE_MARKERS]
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *undo, decoders.Strip(" ", 1, 0)]
    )


def _split_other(backend: Tokenizer):
    """Role markers become pieces; within a piece the tokenizer's own pipeline goes on (byte-level BPE, words)."""
    own = [backend.pre_tokenizer] if backend.pre_tokenizer is not None else []
    markers = pre_tokenizers.Split(Regex("|".join(ROLE_MARKERS)), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([markers, pre_tokenizers.Split(GUARD, "removed"), *own])
    backend.post_processor = processors.Sequence([])


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """A plain fast tokenizer with the `<image>` token and the official splitting into pieces.

    Pads on the left, as generation needs; the padding token is `unk` (official) or, where there is none, eos.

    Raises:
        ValueError: the tokenizer has no fast (tokenizer.json) form.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; give a folder with a tokenizer.json, or one that "
            "AutoTokenizer converts to it (pip install sentencepiece protobuf)"
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    state = json.loads(backend.to_str())
    if "▁" in json.dumps([state["normalizer"], state["pre_tokenizer"]], ensure_ascii=False):
        _split_sentencepiece(backend)
    else:
        _split_other(backend)
    pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    special = {
        name: getattr(tokenizer, name)
        for name in ("bos_token", "eos_token", "unk_token")
        if getattr(tokenizer, name) is not None
    }
    prepared = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        pad_token=pad_token,
        padding_side="left",
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    prepared.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return prepared


def square_image_processor(size: int, **settings) -> ImageProcessingMixin:
    """Resizes straight to `size` x `size` pixels, bicubic, without a crop. Other settings, such as `image_mean`, are
    the class's own: CLIP's by default."""
    square = {"height": size, "width": size}
    return IMAGE_PROCESSOR_CLASS(size=square, crop_size=square, do_center_crop=False, **settings)


def processor_from_vision_text_pretrained(
    vision: str, text: str, num_image_tokens: int, image_size: int | None = None
) -> HoneybeeProcessor:
    """The processor that goes with `HoneybeeForConditionalGeneration.from_vision_text_pretrained(vision, text)`.

    Args:
        vision: Hub name or folder of the vision model: image size from its config, mean and standard deviation from its
            preprocessing. The image is resized straight to the square, without a crop.
        text: Hub name or folder of the language model: its tokenizer.
        num_image_tokens: `model.config.num_image_tokens`.
        image_size: where it is not the vision model's own, the one that the model was made with.

    Raises:
        ValueError: a tokenizer that is not fast, or preprocessing without a mean and a standard deviation.
    """
    config = AutoConfig.from_pretrained(vision)
    size = image_size or getattr(config, "vision_config", config).image_size
    size = size if isinstance(size, int) else size[0]
    preprocessing, _ = ImageProcessingMixin.get_image_processor_dict(vision)
    missing = [name for name in ("image_mean", "image_std") if name not in preprocessing]
    if missing:
        raise ValueError(
            f"the preprocessor_config.json of {vision!r} has no {' and no '.join(missing)}; complete it with what the vision "
            "model was trained with"
        )
    image_processor = square_image_processor(
        size, image_mean=preprocessing["image_mean"], image_std=preprocessing["image_std"]
    )
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(text))
    return HoneybeeProcessor(image_processor, tokenizer, num_image_tokens=num_image_tokens)


def check_processor(config, processor: HoneybeeProcessor) -> None:
    """Raises a ValueError with both numbers where the processor prepares something else than a model of `config` (a
    `HoneybeeConfig`) takes."""
    size = config.vision_config.image_size
    pairs = {
        "visual tokens an image": (processor.num_image_tokens, config.num_image_tokens),
        "the id of <image>": (processor.image_token_id, config.image_token_id),
        "the image height": (processor.image_processor.size["height"], size if isinstance(size, int) else size[0]),
    }
    for what, (of_processor, of_model) in pairs.items():
        if of_processor != of_model:
            raise ValueError(
                f"processor and model disagree on {what}: {of_processor} and {of_model}; use the processor that was "
                "saved with the model, or build it anew with processor_from_vision_text_pretrained"
            )
