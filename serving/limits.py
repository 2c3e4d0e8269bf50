# SPDX-License-Identifier: Apache-2.0
"""What a server takes from strangers: sizes of images and prompts, checked before anything is decoded or computed."""

import argparse
import base64
import binascii
import io
from dataclasses import dataclass, fields

from PIL import Image, UnidentifiedImageError


class LimitError(ValueError):
    """A request that is not taken; the message gives the value and the limit."""


@dataclass
class Limits:
    """Of one request (one chat). Images by their bytes as sent, base64 decoded, and by pixels (width times height)."""

    max_image_bytes: int = 10_000_000
    max_image_pixels: int = 25_000_000
    max_images: int = 8
    max_prompt_chars: int = 8_000
    max_new_tokens: int = 1_024

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name}={value!r} must be a whole number of at least 1")

    @property
    def max_body_bytes(self) -> int:
        """Of an HTTP request that keeps all other limits: images in base64, text of any script in JSON escapes."""
        return self.max_images * (self.max_image_bytes * 4 // 3 + 200) + 12 * self.max_prompt_chars + 100_000

    def check_image_size(self, size: int) -> None:
        if size > self.max_image_bytes:
            raise LimitError(f"an image has {size:,} bytes; the limit is {self.max_image_bytes:,}")

    def check_image(self, content: bytes) -> None:
        """Raises a LimitError for an image that is too large, which its header tells, or that cannot be read."""
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
        from processing import open_image  # loads for seconds

        try:
            open_image(content)
        except ValueError as error:
            raise LimitError(f"an image cannot be read ({error.__cause__ or error}); send another one") from error

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


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of [`Limits`]."""
    for field in fields(Limits):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help="(default: %(default)s)")


def limits_from(args: argparse.Namespace) -> Limits:
    return Limits(**{field.name: getattr(args, field.name) for field in fields(Limits)})
