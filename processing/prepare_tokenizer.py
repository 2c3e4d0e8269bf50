# SPDX-License-Identifier: Apache-2.0
"""Turns a language model's tokenizer and a vision model's preprocessing into a Honeybee processor.

The official code splits a prompt at the image and the role markers and tokenizes each piece on its own. What is made
here does the same inside a plain tokenizer.json, so that any runtime gets the same ids without a patched class.
"""

import json

import transformers
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_base import ImageProcessingMixin

from .processing_honeybee import GUARD, IMAGE_TOKEN, ROLE_MARKERS, SYSTEM_BASE, HoneybeeProcessor

# The PIL kind has a name of its own on transformers 5.
IMAGE_PROCESSOR_CLASS = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor

# Noncharacters: no text holds them.
_SPLIT = "\ufdd0"
_START = "\ufdd1"


def _replace(pattern: str | dict, content: str) -> dict:
    return {
        "type": "Replace",
        "pattern": {"String": pattern} if isinstance(pattern, str) else pattern,
        "content": content,
    }


def _steps(pipeline: dict | None) -> list[dict]:
    """The steps of a normalizer, pre-tokenizer or decoder of a tokenizer.json, in order."""
    if pipeline is None:
        return []
    for inner in ("normalizers", "pretokenizers", "decoders"):
        if inner in pipeline:
            return [step for part in pipeline[inner] for step in _steps(part)]
    return [pipeline]


def _of_each_piece(step: dict) -> list[dict]:
    """A tokenizer's own normalizing step, changed to do to each piece what it did to the whole text."""
    if step["type"] != "Prepend":
        return [step]
    return [
        {"type": "Prepend", "prepend": _START},
        _replace(_SPLIT, _SPLIT + _START),
        _replace(_START + _SPLIT, _SPLIT),  # an empty piece
        _replace({"Regex": _START + r"\z"}, ""),  # the same at the end; `$` would match before a last newline
        _replace(_START, step["prepend"]),
    ]


def _has_dummy_prefix(splitting: list[dict]) -> bool:
    """Whether these pre-tokenizing steps are transformers' form of what sentencepiece does for Llama."""
    return len(splitting) == 1 and splitting[0].get("split") is False and splitting[0]["prepend_scheme"] != "never"


def _split_into_pieces(state: dict) -> None:
    """Lets a tokenizer.json treat each role marker, and what stands between them, as a text of its own.

    The tokenizer's own steps and their order stay: they decide whether a piece gets a "▁" or a blank in front. With those
    of Llama, a piece that begins with a blank gets one, too, as in sentencepiece and in the official code.
    """
    normalizing, splitting = _steps(state["normalizer"]), _steps(state["pre_tokenizer"])
    if _has_dummy_prefix(splitting):
        blank = splitting.pop()["replacement"]
        normalizing += [{"type": "Prepend", "prepend": blank}, _replace(" ", blank)]
    marked = [_replace(marker, _SPLIT + marker + _SPLIT) for marker in ROLE_MARKERS] + [_replace(GUARD, "")]
    state["normalizer"] = {
        "type": "Sequence",
        "normalizers": [*marked, *(new for step in normalizing for new in _of_each_piece(step))],
    }
    for step in splitting:
        if step.get("prepend_scheme") == "first":  # of the whole text
            step["prepend_scheme"] = "always"
    split = {"type": "Split", "pattern": {"String": _SPLIT}, "behavior": "Removed", "invert": False}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, *splitting]}
    state["post_processor"] = None
    in_front = any(step["type"] == "Prepend" for step in normalizing) or any(
        step.get("add_prefix_space") or step.get("prepend_scheme") == "always" for step in splitting
    )
    if in_front and state["decoder"] is not None:
        # Read back, each piece would show the blank that was put in front of it.
        undo = [_replace({"Regex": f" ?{marker} ?"}, marker) for marker in ROLE_MARKERS]
        state["decoder"] = {"type": "Sequence", "decoders": [*_steps(state["decoder"]), {"type": "Fuse"}, *undo]}


# What answers and questions are made of, and what tokenizers treat in ways of their own.
_PIECES = (
    *ROLE_MARKERS, SYSTEM_BASE, "What is in the picture?", "Yes", "a", "3.14 + 2,000 = ?", "[0.125,0.250,1.000,0.500]",
    " a blank in front", "one behind ", "two  or   three", "a\nline\n\nbreak", "\n", "\ttab", " ", "it's \"so\" (a-b)!",
    "na\u00efve cafe\u0301", "\u65e5\u672c\u8a9e", "\U0001f41d", "<b>x</b>", "CamelCase UPPER",
)  # fmt: skip


def _check_pieces(tokenizer: PreTrainedTokenizerBase, prepared: PreTrainedTokenizerFast) -> None:
    """Compares the ids of pieces in a conversation with those that the language model's own tokenizer gives to each alone.

    Raises:
        ValueError: the first piece that differs, with both.
    """

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    dummy_prefix = _has_dummy_prefix(_steps(state["pre_tokenizer"]))

    def own(text: str) -> list[int]:
        # The fast form takes a blank for the "▁" that sentencepiece puts before it.
        in_front = "▁" if dummy_prefix and text.startswith(" ") else ""
        return tokenizer(in_front + text, add_special_tokens=False)["input_ids"]

    human, ai = ROLE_MARKERS
    for piece in _PIECES:
        parts = [piece, human, IMAGE_TOKEN, human, piece, ai, piece, tokenizer.eos_token, human]
        special = {
            IMAGE_TOKEN: prepared.convert_tokens_to_ids(IMAGE_TOKEN),
            tokenizer.eos_token: tokenizer.eos_token_id,
        }
        expected = [id for part in parts for id in ([special[part]] if part in special else own(part))]
        found = prepared("".join(parts), add_special_tokens=False)["input_ids"]
        if found != expected:
            raise ValueError(
                f"the piece {piece!r} is {own(piece)} in {type(tokenizer).__name__}, but in a conversation "
                f"{''.join(parts)!r} becomes {found} instead of {expected}; use a language model whose tokenizer can be "
                "split at role markers, such as Llama's, Qwen's or Gemma's"
            )


def check_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a ValueError where the tokenizer has no token for the end of an answer: no model would learn to stop."""
    if not tokenizer.eos_token or tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer has eos_token={tokenizer.eos_token!r}, so no answer would end and a model could not learn to "
            "stop; name the token that ends its texts as eos_token in tokenizer_config.json"
        )
    if tokenizer.eos_token_id == tokenizer.unk_token_id and tokenizer.eos_token != tokenizer.unk_token:
        raise ValueError(
            f"eos_token={tokenizer.eos_token!r} is no token of the tokenizer, so a model could not learn to stop; name one "
            "that it has as eos_token in tokenizer_config.json"
        )


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """A plain fast tokenizer with the `<image>` token and the official splitting into pieces.

    Pads on the left, as generation needs; the padding token is `unk` (official) or, where there is none, eos. One that was
    prepared before is returned as it is.

    Raises:
        ValueError: the tokenizer has no fast (tokenizer.json) form or no eos, or a piece would get other ids than
            `tokenizer` gives it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; give a folder with a tokenizer.json, or one that "
            "AutoTokenizer converts to it (pip install sentencepiece protobuf)"
        )
    check_ends(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if _SPLIT in json.dumps(state["pre_tokenizer"], ensure_ascii=False):
        return tokenizer  # was prepared before
    state["padding"] = state["truncation"] = None
    _split_into_pieces(state)
    for token in state["added_tokens"]:
        if token["content"] in (tokenizer.bos_token, tokenizer.eos_token):
            # A blank or newline beside it is the next piece's; and it is found in the text as it was written.
            token |= {"lstrip": False, "rstrip": False, "normalized": False}
        elif not token["special"] and any(character.isspace() for character in token["content"]):
            token["normalized"] = True  # Gemma's "\n\n" would take the "\n" of a marker before that is set apart
    pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    special = {
        name: getattr(tokenizer, name)
        for name in ("bos_token", "eos_token", "unk_token")
        if getattr(tokenizer, name) is not None
    }
    prepared = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **special,
        pad_token=pad_token,
        padding_side="left",
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    prepared.add_tokens([IMAGE_TOKEN], special_tokens=True)
    _check_pieces(tokenizer, prepared)
    return prepared


def square_image_processor(size: int, **settings) -> ImageProcessingMixin:
    """Resizes straight to `size` x `size` pixels, bicubic, without a crop. Other settings, such as `image_mean`, are
    the class's own: CLIP's by default."""
    square = {"height": size, "width": size}
    return IMAGE_PROCESSOR_CLASS(size=square, crop_size=square, do_center_crop=False, **settings)


def processor_from_vision_text_pretrained(
    vision: str, text: str, num_image_tokens: int, image_size: int | None = None, **settings
) -> HoneybeeProcessor:
    """The processor that goes with `HoneybeeForConditionalGeneration.from_vision_text_pretrained(vision, text)`.

    Args:
        vision: Hub name or folder of the vision model: image size from its config, mean and standard deviation from its
            preprocessing. The image is resized straight to the square, without a crop.
        text: Hub name or folder of the language model: its tokenizer.
        num_image_tokens: `model.config.num_image_tokens`.
        image_size: where it is not the vision model's own, the one that the model was made with.
        settings: of [`HoneybeeProcessor`]: `elastic_num_query_tokens`, `num_eos_tokens` and `overview_num_query_tokens`, those
            of `model.config.projector_config`, and the others of crops.

    Raises:
        ValueError: what [`prepare_tokenizer`] refuses, or preprocessing without a mean and a standard deviation.
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
    return HoneybeeProcessor(image_processor, tokenizer, num_image_tokens=num_image_tokens, **settings)


def check_processor(config, processor: HoneybeeProcessor) -> None:
    """Raises a ValueError with both numbers where the processor prepares something else than a model of `config` (a
    `HoneybeeConfig`) takes, or where [`check_ends`] does."""
    check_ends(processor.tokenizer)
    if processor.tokenizer.eos_token_id >= config.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer's eos_token={processor.tokenizer.eos_token!r} has the id {processor.tokenizer.eos_token_id}, and "
            f"the model's vocabulary ends at {config.text_config.vocab_size - 1}; name a token that it has"
        )
    size, projector = config.vision_config.image_size, config.projector_config
    trained = projector.elastic_num_query_tokens
    pairs = {
        "visual tokens an image": (processor.num_image_tokens, config.num_image_tokens),
        "the numbers of visual tokens that are trained": (processor.elastic_num_query_tokens, trained),
        "the id of <image>": (processor.image_token_id, config.image_token_id),
        "the image height": (processor.image_processor.size["height"], size if isinstance(size, int) else size[0]),
    }
    if processor.max_crops > 1 and processor.overview_num_query_tokens is not None:
        # Another M than the config's is as good where the model is trained for it.
        own = processor.overview_num_query_tokens
        expected = own if projector.is_trained(own) else projector.overview_num_query_tokens
        pairs["visual tokens of an overview"] = (own, expected)
    if trained or processor.overview_num_query_tokens:  # processors of older models with one number do not know it
        pairs["extra tokens of an image"] = (processor.num_eos_tokens, projector.num_eos_tokens)
    for what, (of_processor, of_model) in pairs.items():
        if of_processor != of_model:
            raise ValueError(
                f"processor and model disagree on {what}: {of_processor} and {of_model}; use the processor that was "
                "saved with the model, or build it anew with processor_from_vision_text_pretrained"
            )
