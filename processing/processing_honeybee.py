# SPDX-License-Identifier: Apache-2.0
"""Processor of Honeybee: images and chat messages in, model inputs out.

Travels with every checkpoint: torch and transformers are the only imports, beside Pillow, which transformers' image
processors need.
"""

import base64
import functools
import io
import itertools
import json
import math
import os
import re
import urllib.parse
import urllib.request

import torch
import transformers
from transformers import PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import get_size_dict
from transformers.image_utils import to_numpy_array
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack

from .crops_honeybee import WHOLE, Cut, cut_image, plan_cut

try:  # transformers asks for packages that are imported without a guard before it runs code from the Hub
    from PIL import Image, ImageOps
except ImportError:  # the image processor says that it needs Pillow
    Image = ImageOps = None

SYSTEM_BASE = "The following is a conversation between a curious human and AI assistant."
ROLE_MARKERS = ("\nHuman: ", "\nAI: ")
IMAGE_TOKEN = "<image>"

# The longest side of a picture, in pixels. Resizing a picture of a single column along its rows takes hundreds of times
# its own memory.
MAX_SIDE = 262_144

# A noncharacter that the tokenizer drops. The templates put it inside anything in a message that looks like a
# placeholder or a role marker, so that what people type is text and nothing else.
GUARD = "\ufdd2"

# Every tag of the templates trims the white space around it: their lines and indentation are not rendered, whatever the
# Jinja environment does with white space.
_GUARDED_TEXT = r"""
{%- macro plain(text) -%}
    {{ text
        | replace('<image>', '<\ufdd2image>')
        | replace('\nHuman: ', '\nHuman\ufdd2: ')
        | replace('\nAI: ', '\nAI\ufdd2: ') }}
{%- endmacro -%}

{%- macro words(content) -%}
    {%- if content is string -%}
        {{ plain(content) }}
    {%- else -%}
        {%- for item in content -%}
            {%- if item.type == 'text' -%}
                {{ plain(item.text) }}
            {%- else -%}
                {{ raise_exception('only text can stand here, got an item of type ' ~ item.type) }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

# Every content item of a user turn has its own marker, except a text that `continues` the image before it (official data
# has some). Training supervises the answer and its eos.
_CHAT = r"""
{{- bos_token -}}
{%- if messages and messages[0].role == 'system' -%}
    {{ words(messages[0].content) }}
{%- else -%}
    SYSTEM_BASE
{%- endif -%}

{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- if message.content is string -%}
            {{ '\nHuman: ' ~ plain(message.content) }}
        {%- else -%}
            {%- for item in message.content -%}
                {%- if item.type == 'text' -%}
                    {%- if not (item.continues and loop.previtem is defined and loop.previtem.type in ('image', 'image_url')) -%}
                        {{ '\nHuman: ' }}
                    {%- endif -%}
                    {{ plain(item.text) }}
                {%- elif item.type in ('image', 'image_url') -%}
                    {{ '\nHuman: <image>' }}
                {%- else -%}
                    {{ raise_exception('content items are of type text or image, got ' ~ item.type) }}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
    {%- elif message.role == 'assistant' -%}
        {{ '\nAI: ' }}
        {%- generation -%}
            {{ words(message.content) ~ eos_token }}
        {%- endgeneration -%}
    {%- elif not (message.role == 'system' and loop.first) -%}
        {{ raise_exception('roles are user, assistant and, first, system; got ' ~ message.role) }}
    {%- endif -%}
{%- endfor -%}

{%- if add_generation_prompt -%}
    {{ '\nAI: ' }}
{%- endif -%}
"""
CHAT_TEMPLATE = _GUARDED_TEXT + _CHAT.replace("SYSTEM_BASE", SYSTEM_BASE)

# Stage 1: bos, image, caption, eos, without a prompt.
CAPTION_TEMPLATE = (
    _GUARDED_TEXT
    + r"""
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- for item in message.content -%}
            {%- if item.type in ('image', 'image_url') -%}
                {{ '<image>' }}
            {%- else -%}
                {{ raise_exception('a caption has an image and no prompt, got an item of type ' ~ item.type) }}
            {%- endif -%}
        {%- endfor -%}
    {%- elif message.role == 'assistant' -%}
        {%- generation -%}
            {{ words(message.content) ~ eos_token }}
        {%- endgeneration -%}
    {%- else -%}
        {{ raise_exception('roles in a caption are user and assistant, got ' ~ message.role) }}
    {%- endif -%}
{%- endfor -%}
"""
)

_TRANSFORMERS_4 = not hasattr(ProcessorMixin, "replace_image_token")

# What a call is told about images beside the images, and a text alone does not hold.
_NUMBERS = ("num_query_tokens", "max_visual_tokens", "max_crops")


def flat_images(images) -> list:
    """One flat list, in order, of images nested by row or not at all; an array or tensor may be a batch of them."""
    if not isinstance(images, (list, tuple)) and getattr(images, "ndim", 0) < 4:
        return [images]
    return [image for item in images for image in flat_images(item)]


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def _read_text(source: str, root: str) -> bytes:
    """The file that a path, URL, data URI or base64 text stands for."""
    if source.startswith(("http://", "https://")):
        # Some servers refuse the name that urllib gives itself.
        request = urllib.request.Request(source, headers={"User-Agent": "honeybee"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.read()
    if source.startswith("data:"):
        return base64.b64decode(source.partition(",")[2])
    if source.startswith("file://"):
        source = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    path = os.path.join(root, source)
    if os.path.isfile(path):
        # Read here: Pillow forgets to turn a TIFF that it maps into memory by its path.
        with open(path, "rb") as file:
            return file.read()
    try:
        content = base64.b64decode("".join(source.split()), validate=True)
        Image.open(io.BytesIO(content)).close()
        return content
    except (OSError, ValueError):
        raise FileNotFoundError(
            f"image file {_shortened(path)!r} does not exist; correct the path or leave the sample out"
        ) from None


def _from_array(array):
    """A picture of bytes from (H, W), (H, W, C) or (C, H, W), C from 1 to 4."""
    dtype = getattr(array.dtype, "name", str(array.dtype)).removeprefix("torch.")
    if dtype not in ("bool", "uint8", "uint16"):
        raise ValueError(
            f"its numbers are of type {dtype}, which has no range of brightness; convert them to 0 to 255 in uint8"
        )
    # A picture of few rows looks like channels first. Tensors are, arrays are not.
    first = array.ndim == 3 and array.shape[0] <= 4 and (isinstance(array, torch.Tensor) or array.shape[2] > 4)
    array = to_numpy_array(array)
    array = array.transpose(1, 2, 0) if first else array
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] > 4):
        raise ValueError(
            f"its shape is {array.shape}; it can be (height, width), or with 1 to 4 channels as first or last"
        )
    if dtype == "bool":
        array = array.astype("uint8") * 255
    if dtype == "uint16":
        array = (array >> 8).astype("uint8")
    return Image.fromarray(array)


def _open_unconverted(image, root: str):
    image = _read_text(image, root) if isinstance(image, str) else image
    if isinstance(image, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(image))
    if hasattr(image, "read"):
        return Image.open(image)
    return image if isinstance(image, Image.Image) else _from_array(image)


def _as_rgb(image):
    # 16 bits in one channel, which older Pillow calls "I". Pillow would cut the numbers off at 255. The upper byte is what it
    # takes where there are several channels.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        upright = ImageOps.exif_transpose(image).convert("I").point(lambda value: value * (1 / 256))
        return upright.convert("L").convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its mode is {image.mode!r}, 32-bit numbers without a range of brightness; convert it to 8 or 16 bits"
        )
    if image.getexif().get(0x0112, 1) != 1:  # orientation
        image = ImageOps.exif_transpose(image)
    if image.mode != "RGB" or "transparency" in image.info:
        image = image.convert("RGB")
        image.info.pop("transparency", None)  # a palette's, which transformers 5 would still blend with white
    return image


def open_image(image, root: str = ""):
    """A picture as PIL in RGB, whatever it comes as. Everything that a model sees is opened here.

    It is turned upright where its EXIF data says so, transparency is dropped, as in the official code, 16 bits become 8,
    and an animation is its first frame.

    Args:
        image: a path, URL, data URI or base64 text; bytes or an open file; the dict of `datasets` with `bytes` or a `path`;
            a PIL image; an array or tensor of 8 or 16 bits, (H, W) or with 1 to 4 channels as first or last.
        root: folder of relative paths.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what is wrong with the picture: it cannot be decoded, is too large, or has numbers without a range.
    """
    given = image
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
        name = given.get("path")
    else:
        name = getattr(image, "filename", None)
    if isinstance(image, (str, os.PathLike)):
        image = name = os.fspath(image)
    known = (str, bytes, bytearray, memoryview, Image.Image)
    if not isinstance(image, known) and not hasattr(image, "read") and not hasattr(image, "dtype"):
        raise ValueError(f"image {given!r} is neither a path nor a picture; correct it or leave the sample out")
    name = _shortened(str(name or "in memory"))
    try:
        image = _open_unconverted(image, root)
        if max(image.size) > MAX_SIDE:
            raise Image.DecompressionBombError(
                f"{image.width} x {image.height} pixels, {MAX_SIDE} a side are the limit"
            )
        image.load()
        return _as_rgb(image)
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {name!r} is too large ({error}); make it smaller or leave the sample out") from error
    except Exception as error:  # what decoders raise on broken data has no common class
        raise ValueError(
            f"image {name!r} cannot be read ({error}); replace the file or leave the sample out"
        ) from error


def resize_image(image, size: tuple[int, int], resample):
    """A PIL image resized to (width, height), with the values of Pillow up to 12, which the official pixels have.

    These versions resize along the rows first. Pillow 13 begins with the columns of a tall picture and rounds other values;
    resizing one axis at a time leaves it no choice.
    """
    return image.resize((size[0], image.height), resample).resize(size, resample)


def resize_images(images: list, image_processor, cuts: list[Cut] | None = None, **asked) -> list:
    """PIL images resized to the size of an image processor, so that its own resize has nothing left to do.

    Where its size is not a width and a height, the images stay as they are.

    Args:
        cuts: how each becomes squares of that size. Default: one square each.
        asked: settings of the call; they win over those of the image processor.
    """
    square, resample = _square(image_processor, asked)
    if square is None:
        return images
    resize = functools.partial(resize_image, resample=resample)
    cuts = cuts or [WHOLE] * len(images)
    return [each for image, cut in zip(images, cuts) for each in cut_image(image, cut, square, resize)]


def _square(image_processor, asked: dict) -> tuple[tuple[int, int] | None, int | None]:
    """Width and height to which pictures are resized, and the filter; None where they are not resized to such."""
    asked = {**asked, **(asked.get("images_kwargs") or {})}

    def setting(name: str):
        return asked[name] if asked.get(name) is not None else getattr(image_processor, name, None)

    size, resample = setting("size"), setting("resample")
    size = dict(get_size_dict(size, default_to_square=False)) if size is not None else {}
    if not setting("do_resize") or not isinstance(resample, int) or not (size.get("width") and size.get("height")):
        return None, None
    return (size["width"], size["height"]), resample


def make_tokenizer_portable(folder: str | os.PathLike) -> None:
    """Rewrites a saved tokenizer's config so that both transformers lines read it.

    transformers 5 writes a tokenizer class and fields that 4 cannot read; the plain class suits both.
    """
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
    settings["extra_special_tokens"] = {
        "image_token": IMAGE_TOKEN
    }  # a name for it; 5 writes a list, which 4 cannot read
    with open(path, "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=2, ensure_ascii=False)
        file.write("\n")


class HoneybeeImagesKwargs(ImagesKwargs, total=False):
    """As `__call__` has worked them out. `num_query_tokens`: M of each square; `cuts`: how each image becomes squares."""

    num_query_tokens: list[int]
    cuts: list


class HoneybeeProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: HoneybeeImagesKwargs
    _defaults = {}  # which releases of transformers up to 5.19 read; a class like this one does not inherit them


def _plain(number):
    """Numbers of torch and numpy as Python's."""
    return number.tolist() if hasattr(number, "tolist") else number


def _check_number(name: str, value) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


class HoneybeeProcessor(ProcessorMixin):
    """Image processor and tokenizer of Honeybee.

    Args:
        image_processor: resizes to the tower's square and normalises. Its PIL kind is used on every line, because
            torchvision's bicubic resize is another function.
        tokenizer: a fast tokenizer that has `image_token` as one token (see `processing.prepare_tokenizer`).
        num_image_tokens: placeholders that one `<image>` becomes where nothing else is asked for; equals
            `model.config.num_image_tokens`.
        image_token: the placeholder, `<image>`: the templates and the prepared tokenizer know no other.
        chat_template: of conversations; the one above by default. Older folders give templates by name here.
        named_chat_templates: the others by name; `caption` (stage 1) is the one above where it is not given. They are part
            of processor_config.json.
        elastic_num_query_tokens: the numbers M that the model is trained for, those of its `projector_config`. None: it has
            one M, that of `num_image_tokens`.
        num_eos_tokens: how many of `num_image_tokens` are extra tokens, which every image has whatever its M.
        max_crops: the most squares that a picture is cut into (see `plan_cut`); 1: none is cut.
        min_crops: the fewest. Above 1 small pictures are enlarged, too.
        overview: whether the whole picture, squeezed into one square, follows the crops of a picture that is cut.
        overview_num_query_tokens: M of the overview. Default: that of the image's crops.
        max_images_cut: in a prompt with more images than this none is cut.

    Raises:
        ValueError: `num_image_tokens` is not positive, `image_token` is another, or the tokenizer lacks it; or the numbers
            of visual tokens or of crops do not fit together.
    """

    # The class's: a processor of a model with a fixed M, or whose pictures are not cut, does not save them.
    elastic_num_query_tokens = None
    num_eos_tokens = 0
    max_crops = 1
    min_crops = 1
    overview = True
    overview_num_query_tokens = None
    max_images_cut = 2
    valid_processor_kwargs = HoneybeeProcessorKwargs

    if _TRANSFORMERS_4:  # 5 finds the parts by the names of the arguments, and warns of these
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "CLIPImageProcessor"
        tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(
        self,
        image_processor,
        tokenizer,
        num_image_tokens: int = 144,
        image_token: str = IMAGE_TOKEN,
        chat_template: str | dict[str, str] | None = None,
        named_chat_templates: dict[str, str] | None = None,
        elastic_num_query_tokens: list[int] | None = None,
        num_eos_tokens: int = 0,
        max_crops: int = 1,
        min_crops: int = 1,
        overview: bool = True,
        overview_num_query_tokens: int | None = None,
        max_images_cut: int = 2,
        **kwargs,
    ):
        _check_number("num_image_tokens", num_image_tokens)
        crops = {"max_crops": max_crops, "min_crops": min_crops, "max_images_cut": max_images_cut}
        crops |= {"overview": overview, "overview_num_query_tokens": overview_num_query_tokens}
        for name, value in crops.items():
            if value != getattr(self, name):
                setattr(self, name, value)
        self.check_crops()
        if type(num_eos_tokens) is not int or not 0 <= num_eos_tokens < num_image_tokens:
            raise ValueError(
                f"num_eos_tokens={num_eos_tokens!r} must be a whole number from 0 to num_image_tokens={num_image_tokens} - 1"
            )
        if elastic_num_query_tokens is not None:
            self.elastic_num_query_tokens = elastic_num_query_tokens
        if num_eos_tokens:
            self.num_eos_tokens = num_eos_tokens
        if image_token != IMAGE_TOKEN:
            raise ValueError(f"image_token={image_token!r}: the chat templates write {IMAGE_TOKEN!r}; leave it out")
        if image_token not in tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizer has no token {image_token!r}; prepare it with processing.prepare_tokenizer(tokenizer)"
            )
        pil_class = getattr(transformers, f"{type(image_processor).__name__.removesuffix('Fast')}Pil", None)
        if pil_class is not None:
            settings = image_processor.to_dict()
            image_processor = pil_class(**{k: v for k, v in settings.items() if k != "image_processor_type"})
        self.num_image_tokens = num_image_tokens
        self._check_trained()
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        # Tools look for both here as well; a tokenizer that was saved by us brings them.
        tokenizer.image_token, tokenizer.image_token_id = image_token, self.image_token_id
        # Serving runtimes take nothing but a string as `chat_template`, and transformers 4 cannot load its own files of named
        # templates from the Hub (it looks for caption.jinja.jinja).
        named = {"caption": CAPTION_TEMPLATE, **(named_chat_templates or {})}
        if isinstance(chat_template, dict):
            named |= chat_template
            chat_template = named.pop("default", None)
        self.named_chat_templates = named
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    @property
    def chat_templates(self) -> dict[str, str]:
        """All templates by name: `default`, which `chat_template` is, `caption`, and what was given besides."""
        return {**self.named_chat_templates, "default": self.chat_template}

    @property
    def num_query_tokens(self) -> int:
        """M of an image for which nothing else is asked."""
        return self.num_image_tokens - self.num_eos_tokens

    @property
    def trained_num_query_tokens(self) -> list[int]:
        """The numbers M that the model is trained for, in ascending order."""
        return self.elastic_num_query_tokens or [self.num_query_tokens]

    def _check_trained(self):
        trained = self.elastic_num_query_tokens
        listed = isinstance(trained, list) and all(type(number) is int and number > 0 for number in trained)
        if trained is not None and not (listed and trained and trained == sorted(set(trained))):
            raise ValueError(
                f"elastic_num_query_tokens={trained!r} must be a list of whole numbers of at least 1, in ascending order and "
                "without repetition, such as [16, 64, 144]"
            )
        self.check_is_trained(self.num_query_tokens)

    def check_crops(self) -> None:
        """Raises a ValueError where the settings of crops are not what they can be."""
        for name in ("max_crops", "min_crops", "max_images_cut"):
            _check_number(name, getattr(self, name))
        if self.overview_num_query_tokens is not None:
            _check_number("overview_num_query_tokens", self.overview_num_query_tokens)
        if self.min_crops > self.max_crops:
            raise ValueError(f"min_crops={self.min_crops} is more than max_crops={self.max_crops}; lower it")
        if not isinstance(self.overview, bool):
            raise ValueError(f"overview={self.overview!r} must be True or False")

    def check_is_trained(self, number: int) -> None:
        """Raises a ValueError, with the numbers that may be asked for, where the model is not trained for this M."""
        trained = self.trained_num_query_tokens
        between = trained[0] < number < trained[-1] and math.isqrt(number) ** 2 == number
        if number not in trained and not between:
            others = f" or a square between {trained[0]} and {trained[-1]}" if len(trained) > 1 else ""
            raise ValueError(
                f"num_query_tokens={number}: the model is trained for {', '.join(map(str, trained))} visual tokens an image; "
                f"use one of these{others}"
            )

    def image_query_tokens(self, messages: list[dict], num_query_tokens=None) -> list[int | None]:
        """M of each image of a conversation, in order: that of the content item's `num_query_tokens`, or of its OpenAI
        `detail` (`low` the smallest that the model is trained for, `high` the largest); where it has neither, or `auto`,
        that of `num_query_tokens`, a number or a list by image, and else None.

        Raises:
            ValueError: another `detail`, where the model has a choice.
        """
        named = {"low": self.trained_num_query_tokens[0], "high": self.trained_num_query_tokens[-1]}
        has_choice = self.elastic_num_query_tokens is not None or self.max_crops > 1
        return self._of_images(messages, "num_query_tokens", named, has_choice, num_query_tokens)

    def image_max_crops(self, messages: list[dict], max_crops=None) -> list[int | None]:
        """The same for the most crops of each image: the item's `max_crops`, and 1 for the `detail` `low`."""
        return self._of_images(messages, "max_crops", {"low": 1}, False, max_crops)

    def _of_images(self, messages: list[dict], name: str, named: dict[str, int], has_choice: bool, otherwise) -> list:
        numbers = []
        for message in messages:
            for item in message["content"] if isinstance(message.get("content"), (list, tuple)) else ():
                if item.get("type") not in ("image", "image_url"):
                    continue
                url = item.get("image_url")
                detail = item.get("detail", url.get("detail") if isinstance(url, dict) else None)
                if has_choice and detail not in (None, "auto", "low", "high"):
                    raise ValueError(f"detail={detail!r} of an image must be low, high or auto")
                own = item.get(name)
                if own is None and isinstance(detail, str):
                    own = named.get(detail)
                numbers.append(own)
        each = _plain(otherwise)
        each = each if isinstance(each, (list, tuple)) else [each] * len(numbers)
        if len(each) != len(numbers):
            return each  # the call that takes them says what is wrong
        return [theirs if number is None else number for number, theirs in zip(numbers, each)]

    def square_query_tokens(self, number: int, cut: Cut) -> list[int]:
        """M of each square of an image whose crops have `number`."""
        crops = [number] * (cut.columns * cut.rows)
        return [*crops, self.overview_num_query_tokens or number] if cut.overview else crops

    def count_image_tokens(self, number: int, cut: Cut = WHOLE) -> int:
        """Placeholders of an image whose crops have M = `number`."""
        return sum(self.square_query_tokens(number, cut)) + cut.num_crops * self.num_eos_tokens

    def plan_cuts(self, sizes: list[tuple[int, int]], max_crops: list[int] | None = None, **asked) -> list[Cut]:
        """How the images of one prompt become squares.

        Args:
            sizes: width and height of each, in pixels, as [`open_image`] gives them.
            max_crops: of each image. Default: the processor's.
            asked: settings of a call for the image processor, such as `size`.
        """
        limits = max_crops or [self.max_crops] * len(sizes)
        square, _ = _square(self.image_processor, asked)
        if square is None or len(sizes) > self.max_images_cut:
            return [WHOLE] * len(sizes)
        return [
            plan_cut(size, square, limit, min(self.min_crops, limit), self.overview) if limit > 1 else WHOLE
            for size, limit in zip(sizes, limits)
        ]

    def _share(
        self, numbers: list[int | None], sizes: list[tuple[int, int]], limits: list[int], most: int, asked: dict
    ) -> list[tuple[int, Cut]]:
        """The images of one prompt within a budget of `most` visual tokens. Those without a number get the largest trained
        one that fits; where the smallest does not, the images are cut into fewer crops, and it is tried again."""
        _check_number("max_visual_tokens", most)
        cuts = self.plan_cuts(sizes, limits, **asked)
        for fewer in range(max((cut.columns * cut.rows for cut in cuts), default=1) - 1, -1, -1):
            for shared in reversed(self.trained_num_query_tokens):
                filled = [shared if number is None else number for number in numbers]
                needed = sum(map(self.count_image_tokens, filled, cuts))
                if needed <= most:
                    return list(zip(filled, cuts))
            cuts = self.plan_cuts(sizes, [min(fewer, limit) for limit in limits], **asked)
        raise ValueError(
            f"max_visual_tokens={most} is too small: the {len(numbers)} images of the prompt need at least "
            f"{needed} visual tokens; give fewer images, or {needed} or more"
        )

    def _for_each_image(self, name: str, given, total: int) -> list[int | None]:
        """A setting of a call, one for all images or a list by image, as a list."""
        each = _plain(given)
        numbers = list(map(_plain, each)) if isinstance(each, (list, tuple)) else [each] * total
        if len(numbers) != total:
            raise ValueError(
                f"{name} lists {len(numbers)} numbers, but there are {total} images; give one number for all images or one "
                "for each"
            )
        for number in numbers:
            if number is not None:
                _check_number(name, number)
        return numbers

    def _limits(self, max_crops, total: int) -> list[int]:
        """The most crops of each image, for a `max_crops` of a call."""
        limits = self._for_each_image("max_crops", max_crops, total)
        return [self.max_crops if limit is None else limit for limit in limits]

    def _plan(
        self,
        sizes_by_row: list[list[tuple[int, int]]],
        num_query_tokens=None,
        max_visual_tokens=None,
        max_crops=None,
        allow_untrained: bool = False,
        **asked,
    ) -> list[tuple[int, Cut]]:
        """M of each image of all rows, and how it is cut; the arguments are those of `__call__`."""
        self.check_crops()  # they may have been set since
        total = sum(map(len, sizes_by_row))
        numbers = self._for_each_image("num_query_tokens", num_query_tokens, total)
        limits = self._limits(max_crops, total)
        for number in numbers:
            if number is not None and not allow_untrained:
                try:
                    self.check_is_trained(number)
                except ValueError as error:
                    raise ValueError(f"{error}, or allow_untrained=True to try it all the same") from None
        plan = []
        for sizes in sizes_by_row:
            here = slice(len(plan), len(plan) + len(sizes))
            if max_visual_tokens is None:
                filled = [self.num_query_tokens if number is None else number for number in numbers[here]]
                plan += zip(filled, self.plan_cuts(sizes, limits[here], **asked))
            else:
                plan += self._share(numbers[here], sizes, limits[here], max_visual_tokens, asked)
        return plan

    def _check_image_count(self, text: list[str], images: list | None, rows: list | None):
        placeholders = [row.count(self.image_token) for row in text]
        given = [len(row) for row in rows] if rows is not None else len(images or ())
        if (placeholders != given) if rows is not None else (sum(placeholders) != given):
            raise ValueError(
                f"the text has {sum(placeholders)} {self.image_token} placeholders (by row: {placeholders}), but "
                f"{given} images were passed; give exactly one image for each placeholder"
            )

    def _prepare(self, images, text):
        """Checked inputs: a flat list of opened images or None, a list of strings or None, and how many images a row has."""
        if images is None and text is None:
            raise ValueError("give `text`, `images` or both")
        if isinstance(text, str):
            text = [text]
        if text is not None and (not text or not all(isinstance(row, str) for row in text)):
            raise ValueError("`text` must be a string or a list of at least one string")
        rows = None
        if images is not None:
            if isinstance(images, (list, tuple)) and any(isinstance(i, (list, tuple)) for i in images):
                rows = [[image for image in flat_images(row) if image is not None] for row in images]
            images = [image for image in flat_images(images) if image is not None]
        if text is not None:
            self._check_image_count(text, images, rows)
        images = [open_image(image) for image in images or ()]
        if text is not None:
            by_row = [row.count(self.image_token) for row in text]
        else:
            by_row = [len(images)] if rows is None else [len(row) for row in rows]
        return images or None, list(text) if text is not None else None, by_row

    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        audio=None,
        num_query_tokens: int | list[int | None] | None = None,
        max_visual_tokens: int | None = None,
        allow_untrained: bool = False,
        max_crops: int | list[int | None] | None = None,
        **kwargs: Unpack[HoneybeeProcessorKwargs],
    ) -> BatchFeature:
        """Model inputs of the rows in `text`; the images of all rows in order.

        Args:
            images: image, list of images, or list of lists by row; each whatever [`open_image`] takes. Without text, a list
                that is not of lists is one row.
            text: one row or a list, with one `<image>` for each image.
            num_query_tokens: M, the visual tokens of each image (of each of its crops), or a list with the M of each of all
                images. Default (also None in a list): that of the model.
            max_visual_tokens: the most that the images of one row may have together. Those without a number of their own
                get the largest M that the model is trained for with which all fit; where the smallest is too many, images
                are cut into fewer crops.
            allow_untrained: takes also an M that the model is not trained for, which otherwise has to be one of
                `trained_num_query_tokens` or a square between them.
            max_crops: the most crops of each image, or a list with that of each of all images. Default (also None in a
                list): the processor's.

        Returns:
            `input_ids` and `attention_mask` (rows, tokens), `pixel_values` (squares, 3, S, S), a square for an image that is
            not cut; `num_crops` (images,), the squares of each, where images may be cut; and `num_query_tokens` (squares,)
            where one has another M than the model's default, or could have, were it cut.

        Raises:
            ValueError: text and images that do not belong together, images that cannot be read, an M or a number of crops
                that is not allowed, or a budget that is too small.
        """
        for name in ("num_query_tokens", "max_crops"):
            if name in (kwargs.get("images_kwargs") or {}):
                raise ValueError(f"{name} stands in images_kwargs; give it to the call itself")
        images, text, by_row = self._prepare(images, text)
        sizes = iter(image.size for image in images or ())
        sizes = [[next(sizes) for _ in range(number)] for number in by_row]
        by_vllm = kwargs.get("return_text_replacement_offsets") and not kwargs.get("return_offsets_mapping")
        if by_vllm:
            sizes = self._one_by_one(sizes, max_visual_tokens)
        plan = self._plan(sizes, num_query_tokens, max_visual_tokens, max_crops, allow_untrained, **kwargs)
        may_cut = bool(plan) and max(self.max_crops, *self._limits(max_crops, len(plan))) > 1
        kwargs |= self._told(plan, may_cut, has_budget=max_visual_tokens is not None)
        if _TRANSFORMERS_4:
            return self._call_4(images, text, **kwargs)
        inputs = super().__call__(images=images, text=text, **kwargs)
        if by_vllm and plan and (may_cut or max_crops is not None):
            # vLLM takes as many rows of each field for an image as it has squares, but of this one, which other models have, a
            # row; and its product for the number of squares, which it else counts without a request's own settings.
            inputs.pop("num_crops", None)
            inputs["image_grid_thw"] = torch.tensor([[cut.num_crops, 1, 1] for _, cut in plan])
        return inputs

    def _told(self, plan: list[tuple[int, Cut]], may_cut: bool, has_budget: bool) -> dict:
        """`cuts` of the images and `num_query_tokens` of their squares, those that the model has to be told. It depends on
        settings and not on what became of the pictures, so that samples which are put into one batch later have the same
        fields."""
        squares = [number for image in plan for number in self.square_query_tokens(*image)]
        overviews_differ = self.overview and self.overview_num_query_tokens not in (None, self.num_query_tokens)
        may_differ = may_cut and (overviews_differ or has_budget)
        told = {"cuts": [cut for _, cut in plan]} if may_cut else {}
        if may_differ or any(number != self.num_query_tokens for number in squares):
            told["num_query_tokens"] = squares
        return told

    def _call_4(self, images, text, num_query_tokens=None, cuts=None, **kwargs) -> BatchFeature:
        # On transformers 4, what `__call__` of the base class does on 5.
        merged = self._merge_kwargs(ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        numbered = self._numbered(num_query_tokens, cuts)
        data = {}
        if text is not None:
            number = itertools.count()
            expanded = [
                re.sub(self.image_token, lambda _: self.replace_image_token(numbered, next(number)), row)
                for row in text
            ]
            mark_images = merged["text_kwargs"].pop("return_mm_token_type_ids", False)
            data.update(self.tokenizer(expanded, **merged["text_kwargs"]))
            if mark_images:  # 1 at the placeholders; read by serving runtimes
                data["mm_token_type_ids"] = [
                    [int(token == self.image_token_id) for token in row] for row in data["input_ids"]
                ]
            self._check_special_mm_tokens(expanded, data, modalities=["image"])
        if images is not None:
            # Guessed from the shape otherwise, where an image of 1 or 3 rows looks channels-first.
            merged["images_kwargs"]["input_data_format"] = "channels_last"
            squares = resize_images(images, self.image_processor, cuts, **merged["images_kwargs"])
            data.update(self.image_processor(squares, **merged["images_kwargs"]))
        return BatchFeature(data={**data, **numbered}, tensor_type=return_tensors)

    def _process_images(self, images, num_query_tokens=None, cuts=None, **kwargs):
        # transformers 5 calls it. The image processor takes no numbers of tokens, and squares for images.
        inputs, _ = super()._process_images(resize_images(images, self.image_processor, cuts, **kwargs), **kwargs)
        inputs.update(self._numbered(num_query_tokens, cuts))
        return inputs, [self.replace_image_token(inputs, index) for index in range(len(images))]

    def _numbered(self, num_query_tokens: list[int] | None, cuts: list[Cut] | None) -> dict[str, list[int]]:
        """What the model is told of its images."""
        numbered = {} if cuts is None else {"num_crops": [cut.num_crops for cut in cuts]}
        return numbered if num_query_tokens is None else {**numbered, "num_query_tokens": num_query_tokens}

    def replace_image_token(self, image_inputs: dict | None = None, image_idx: int = 0, **kwargs) -> str:
        """What one `<image>` becomes. transformers 5 calls it for every image."""
        numbers, crops = ((image_inputs or {}).get(name) for name in ("num_query_tokens", "num_crops"))
        first = image_idx if crops is None else int(sum(crops[:image_idx]))
        squares = range(first, first + (1 if crops is None else int(crops[image_idx])))
        each = [self.num_query_tokens if numbers is None else int(numbers[square]) for square in squares]
        return self.image_token * (sum(each) + len(each) * self.num_eos_tokens)

    @staticmethod
    def _one_by_one(sizes_by_row: list, max_visual_tokens: int | None) -> list:
        """Each image as a prompt of its own: vLLM keeps what it became for every prompt that holds it, with whatever others.
        Only a budget is shared by those that are given together."""
        if max_visual_tokens is not None:
            return sizes_by_row
        return [[size] for sizes in sizes_by_row for size in sizes]

    def _get_num_multimodal_tokens(self, image_sizes=None, **settings) -> MultiModalData:
        """Placeholders and squares of each image of a prompt; read by serving runtimes, with the settings of a call.

        Args:
            image_sizes: height and width of each, in pixels.
        """
        if image_sizes is None:
            return MultiModalData()
        sizes = [[(width, height) for height, width in image_sizes]]
        plan = self._plan(self._one_by_one(sizes, settings.get("max_visual_tokens")), **settings)
        return MultiModalData(
            num_image_tokens=[self.count_image_tokens(*image) for image in plan],
            num_image_patches=[cut.num_crops for _, cut in plan],
        )

    @classmethod
    def _load_tokenizer_from_pretrained(cls, sub_processor_type, pretrained_model_name_or_path, subfolder="", **kwargs):
        # Called by transformers 5, whose AutoTokenizer would first load the model's config, and for that ask whether the
        # code in the folder may run. The class is known.
        return PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """As in transformers; a message's content may be a plain string, and a name out of `chat_templates` may stand for
        the template. With `tokenize=True`, `num_query_tokens`, `max_visual_tokens`, `max_crops` and `allow_untrained` of
        a call are taken as well, and the numbers of [`image_query_tokens`] and [`image_max_crops`] go before them. Text alone
        does not hold these numbers: without `tokenize`, give them to the call that takes the text.

        Raises:
            ValueError: a conversation without messages, or what [`image_query_tokens`] and a call refuse.
        """

        def as_item(item):
            # OpenAI's spelling; transformers 4 collects only its own
            if item.get("type") == "image_url" and isinstance(item.get("image_url"), dict):
                return {"type": "image", "url": item["image_url"]["url"]}
            return item

        def as_items(messages):
            if not messages:
                raise ValueError("the conversation is empty; give it at least one message")
            return [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if isinstance(message.get("content"), str)
                else {**message, "content": [as_item(item) for item in message.get("content") or ()]}  # None: no words
                for message in messages
            ]

        if not conversation:
            raise ValueError("the conversation is empty; give it at least one message")
        conversation = getattr(conversation, "messages", conversation)
        batch = [conversation] if isinstance(conversation[0], dict) else conversation
        batch = [getattr(messages, "messages", messages) for messages in batch]
        names = [name for name in _NUMBERS if kwargs.get(name) is not None]
        if names and not kwargs.get("tokenize"):
            raise ValueError(
                f"{' and '.join(names)}: text alone does not hold numbers of visual tokens; add tokenize=True, or give them to "
                "the call of the processor that takes the text"
            )
        if kwargs.get("tokenize"):
            kwargs = self._with_settings([message for row in batch for message in row], kwargs)
        rows = [as_items(messages) for messages in batch]
        conversation = rows[0] if isinstance(conversation[0], dict) else rows
        chat_template = self.chat_templates.get(chat_template, chat_template)
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def _with_settings(self, messages: list[dict], kwargs: dict) -> dict:
        """Arguments of `apply_chat_template` with the settings of `__call__` where this line of transformers takes them."""
        settings = dict(kwargs.get("processor_kwargs") or {})
        names = (*_NUMBERS, "allow_untrained")
        settings |= {name: kwargs[name] for name in names if name in kwargs}
        for name, of_images in (("num_query_tokens", self.image_query_tokens), ("max_crops", self.image_max_crops)):
            numbers = of_images(messages, settings.get(name))
            if any(number is not None for number in numbers):
                settings[name] = numbers
        rest = {name: value for name, value in kwargs.items() if name not in (*names, "processor_kwargs")}
        if not settings:
            return rest
        return {**rest, **settings} if _TRANSFORMERS_4 else {**rest, "processor_kwargs": settings}

    def save_pretrained(self, save_directory, **kwargs):
        files = super().save_pretrained(save_directory, **kwargs)
        make_tokenizer_portable(save_directory)
        return files


HoneybeeProcessor.register_for_auto_class()

__all__ = ["HoneybeeProcessor", "open_image", "resize_image"]
