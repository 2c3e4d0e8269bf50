# SPDX-License-Identifier: Apache-2.0
"""What a server takes from strangers: sizes of images and prompts, and each field of an OpenAI chat request. Everything is
checked before anything is decoded or computed."""

import argparse
import base64
import binascii
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from PIL import Image, UnidentifiedImageError

MOST_OF_AN_IMAGE = 2**20  # visual tokens or crops; which numbers a model takes, its processor says


class LimitError(ValueError):
    """A request that is not taken; the message gives the value and the limit.

    Args:
        param: the field of the request that is to blame, where it is one.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


@dataclass
class Limits:
    """Limits of one request (one chat). Bytes of an image are counted after base64 is decoded; pixels are width times
    height."""

    max_image_bytes: int = 10_000_000
    max_image_pixels: int = 25_000_000
    max_images: int = 8
    max_prompt_chars: int = 8_000
    max_new_tokens: int = 1_024

    def __post_init__(self):
        for limit in fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{limit.name}={value!r} must be a whole number of at least 1")

    @property
    def max_body_bytes(self) -> int:
        """The largest HTTP request that keeps all other limits: images in base64, text of any script in JSON escapes."""
        return self.max_images * (self.max_image_bytes * 4 // 3 + 200) + 12 * self.max_prompt_chars + 100_000

    def check_image_size(self, size: int) -> None:
        if size > self.max_image_bytes:
            raise LimitError(f"an image has {size:,} bytes; the limit is {self.max_image_bytes:,}")

    def check_image(self, content: bytes) -> None:
        """Raises a LimitError for an image that is too large or none. Reads its header, not its pixels."""
        self.check_image_size(len(content))
        try:
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            # Pillow's own words for these bytes are "cannot identify image file <_io.BytesIO object at 0x...>".
            why = "of no known format" if isinstance(error, UnidentifiedImageError) else error
            raise LimitError(f"an image cannot be read ({why}); send a PNG, JPEG or WebP file") from error
        if width * height > self.max_image_pixels:
            raise LimitError(
                f"an image has {width} x {height} = {width * height:,} pixels; the limit is {self.max_image_pixels:,}"
            )

    def check_data_url(self, url) -> None:
        """The same for an image in a `data:` URL. Other addresses are refused: the server would fetch or open them."""
        head, comma, content = url.partition(",") if isinstance(url, str) else ("", "", "")
        if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
            raise LimitError('an image must be a URL that starts with "data:image/" and holds base64, not an address')
        self.check_image_size(len(content) * 3 // 4 - content[-2:].count("="))  # of base64 without and with padding
        try:
            decoded = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise LimitError(f"an image is not valid base64 ({error})") from error
        self.check_image(decoded)

    def check_counts(self, images: int, characters: int) -> None:
        if images > self.max_images:
            raise LimitError(f"the chat has {images} images; the limit is {self.max_images}")
        if characters > self.max_prompt_chars:
            raise LimitError(f"the chat has {characters:,} characters; the limit is {self.max_prompt_chars:,}")


@dataclass
class ChatRequest:
    """A checked chat request. The fields are named as in OpenAI's API, except:

    Args:
        messages: for the processor's chat template; content is always a list of items.
        images: the `data:` URLs of the image items, in order.
        stop: always a list.
        logit_bias: by token id.
        num_query_tokens, max_visual_tokens, max_crops: of the processor's call; not in OpenAI's API.
    """

    messages: list[dict]
    images: list[str]
    max_tokens: int
    stream: bool = False
    stream_options: dict = field(default_factory=dict)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    num_query_tokens: int | list[int] | None = None
    max_visual_tokens: int | None = None
    max_crops: int | list[int] | None = None


# A check returns the value as it is used, or raises a ValueError with the rule that the value breaks.


def _is(kind: type, words: str) -> Callable:
    def check(value):
        if not isinstance(value, kind):
            raise ValueError(f"must be {words}")
        return value

    return check


def _number(low, high, kind: type | tuple = (int, float)) -> Callable:
    def check(value):
        # A bool is an int to Python; NaN fails the comparison.
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            raise ValueError(f"must be a {'whole ' if kind is int else ''}number from {low} to {high}")
        return value if kind is int else float(value)  # transformers takes 0.5 and not 2 as a temperature

    return check


def _only(*accepted) -> Callable:
    """The check of a field for something that this server does not do: it takes the values that do not ask for it."""

    def check(value):
        if not any(type(value) is type(one) and value == one for one in accepted):
            others = "".join(f" or send {json.dumps(one)}" for one in accepted)
            raise ValueError(f"is not served here; leave it out{others}")
        return value

    return check


def _stop(value) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > 4 or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a text or a list of at most 4 texts, none of them empty")
    return texts


def _stream_options(value) -> dict:
    if not isinstance(value, dict) or set(value) - {"include_usage", "include_obfuscation"}:
        raise ValueError('must be an object with "include_usage" alone')
    if not isinstance(value.get("include_usage", False), bool) or value.get("include_obfuscation"):
        raise ValueError('must have true or false as "include_usage", and no "include_obfuscation"')
    return value


def _logit_bias(value) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError("must be an object from token ids to numbers")
    check = _number(-100, 100)
    if not all(token.isascii() and token.isdecimal() and len(token) < 10 for token in value):
        raise ValueError("must have token ids as its names")
    return {int(token): check(bias) for token, bias in value.items()}


def _by_image(value) -> int | list[int]:
    check = _number(1, MOST_OF_AN_IMAGE, int)
    return [check(number) for number in value] if isinstance(value, list) else check(value)


_label, _object = _is(str, "a text"), _is(dict, "an object")
FIELDS = {
    # These change the answer, or how it is sent.
    "stream": _is(bool, "true or false"),
    "stream_options": _stream_options,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "seed": _number(-(2**63), 2**63 - 1, int),
    "stop": _stop,
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "logit_bias": _logit_bias,
    # Not OpenAI's: visual tokens of an image, or of all images of the chat, and the most crops of an image, where the model has
    # a choice.
    "num_query_tokens": _by_image,
    "max_visual_tokens": _number(1, 2**31 - 1, int),
    "max_crops": _by_image,
    # Labels for the provider's books, and hints to its caches: an answer does not depend on them.
    "user": _label,
    "safety_identifier": _label,
    "metadata": _object,
    "prompt_cache_key": _label,
    "prompt_cache_retention": _label,
    "prompt_cache_options": _object,
    "parallel_tool_calls": _is(bool, "true or false"),
    # What this server does not do.
    "n": _only(1),
    "logprobs": _only(False),
    "top_logprobs": _only(0),
    "response_format": _only({"type": "text"}),
    "modalities": _only(["text"]),
    "tools": _only([]),
    "tool_choice": _only("none", "auto"),
    "functions": _only([]),
    "function_call": _only("none", "auto"),
    "reasoning_effort": _only("none"),
    "verbosity": _only("medium"),
    "service_tier": _only("auto", "default"),
    "store": _only(False),
}


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _text(text, where: str) -> dict:
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise LimitError(
            f"{where} must be a text of valid Unicode characters, got {_short(text)}", "messages"
        ) from error
    return {"type": "text", "text": text}


def _nothing_else(given: dict, known: set[str], where: str) -> None:
    """Refuses unknown fields, unless they are empty: clients copy such fields from a reply into the history."""
    if more := sorted(name for name, value in given.items() if name not in known and value not in (None, "", [], {})):
        raise LimitError(f"{where} has what this server does not take: {', '.join(more)}", "messages")


def _item(item, role: str, where: str) -> tuple[dict, str | None]:
    """A content item for the chat template, and its URL where it is an image."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text":
        _nothing_else(item, {"type", "text"}, where)
        return _text(item.get("text"), f"{where}.text"), None
    if kind != "image_url" or role != "user":
        raise LimitError(
            f"{where}: content items are of type text, and in user messages also image_url; got {_short(kind)}",
            "messages",
        )
    _nothing_else(item, {"type", "image_url"}, where)
    image = item.get("image_url")
    image = image if isinstance(image, dict) else {"url": image}
    _nothing_else(image, {"url", "detail"}, f"{where}.image_url")
    if image.get("detail") not in (None, "auto", "low", "high"):
        raise LimitError(f"{where}.image_url.detail={_short(image['detail'])} must be auto, low or high", "messages")
    # Of a model whose images all have the same number of visual tokens it changes nothing.
    detail = {"detail": image["detail"]} if image.get("detail") else {}
    return {"type": "image", **detail}, image.get("url")


def _message(message, position: int) -> tuple[dict, list[str]]:
    where = f"messages[{position}]"
    role = message.get("role") if isinstance(message, dict) else None
    role = "system" if role == "developer" else role  # its name for newer models
    if role not in ("system", "user", "assistant"):
        raise LimitError(f"{where} needs a role (system, user or assistant), got {_short(role)}", "messages")
    if role == "system" and position:
        raise LimitError(f"{where} is a system message; only the first message can be one", "messages")
    _nothing_else(message, {"role", "content", "name"}, where)
    _text(message.get("name") or "", f"{where}.name")  # a label
    content = message.get("content")
    content = "" if content is None and role == "assistant" else content
    if isinstance(content, str):
        return {"role": role, "content": [_text(content, f"{where}.content")]}, []
    if not isinstance(content, list) or not content:
        raise LimitError(f"{where}.content must be a text or a list of items, got {_short(content)}", "messages")
    items = [_item(item, role, f"{where}.content[{i}]") for i, item in enumerate(content)]
    return {"role": role, "content": [item for item, _ in items]}, [
        url for item, url in items if item["type"] == "image"
    ]


def _messages(messages, limits: Limits) -> tuple[list[dict], list[str]]:
    if not isinstance(messages, list) or not messages:
        raise LimitError('the request needs a list of at least one message under "messages"', "messages")
    checked, images, characters = [], [], 0
    for position, message in enumerate(messages):
        message, urls = _message(message, position)
        checked.append(message)
        images += urls
        characters += sum(len(item.get("text", "")) for item in message["content"])
    try:
        limits.check_counts(len(images), characters)
        for url in images:
            limits.check_data_url(url)
    except LimitError as error:
        raise LimitError(str(error), "messages") from error
    return checked, images


def check_chat(body, model: str, limits: Limits) -> ChatRequest:
    """The body of a request to `/v1/chat/completions`, checked. A field that is null was not given.

    Raises:
        LimitError: what it may not hold.
    """
    if not isinstance(body, dict):
        raise LimitError("the request must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    tokens = _number(1, limits.max_new_tokens, int)
    checks = {**FIELDS, "model": _only(model), "max_tokens": tokens, "max_completion_tokens": tokens}
    if unknown := sorted(set(given) - {*checks, "messages"}):
        raise LimitError(f"fields that this server does not take: {_short(', '.join(unknown))}", unknown[0])
    for name, check in checks.items():
        if name in given:
            try:
                given[name] = check(given[name])
            except ValueError as error:
                raise LimitError(f"{name}={_short(given[name])} {error}", name) from error
    messages, images = _messages(given.get("messages"), limits)
    wanted = given.get("max_completion_tokens", given.get("max_tokens", limits.max_new_tokens))
    names = {known.name for known in fields(ChatRequest)} - {"messages", "images", "max_tokens"}
    return ChatRequest(messages, images, wanted, **{name: given[name] for name in names & set(given)})


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of [`Limits`]."""
    for limit in fields(Limits):
        parser.add_argument(f"--{limit.name}", type=int, default=limit.default, help="(default: %(default)s)")


def limits_from(args: argparse.Namespace) -> Limits:
    return Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
