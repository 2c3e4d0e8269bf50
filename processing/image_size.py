# SPDX-License-Identifier: Apache-2.0
"""How large a picture is, from the header of its file: how many crops it becomes is known before a pixel is decoded."""

import io
import os

from PIL import Image

from processing.processing_honeybee import MAX_SIDE, _read_text, open_image

# Formats whose header gives the size of the picture that is decoded later. (Of others, such as icons, decoding may change it.)
SAY_IT = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
ORIENTATION = 0x0112
TURNED_SIDEWAYS = (5, 6, 7, 8)


def image_size(image, root: str = "") -> tuple[int, int]:
    """Width and height of a picture in pixels, those of [`open_image`] with the same arguments, and its errors.

    A file, or what is in one, is not decoded where its header says enough; an image that is open already is, as it will be
    anyway. What is broken behind the header is not noticed.
    """
    source = image
    if isinstance(image, dict):
        source = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        try:
            size = _in_header(source, root)
        except Exception:  # opening it says what is wrong
            size = None
        if size is not None:
            return size
    return open_image(image, root).size


def _in_header(source, root: str) -> tuple[int, int] | None:
    """None where the header does not say enough."""
    if isinstance(source, (str, os.PathLike)):
        path = os.path.join(root, os.fspath(source))
        file = path if os.path.isfile(path) else io.BytesIO(_read_text(os.fspath(source), root))
    else:
        file = io.BytesIO(source)
    with Image.open(file) as image:
        is_png = image.format == "PNG"
        if image.format not in SAY_IT or image.mode in ("I", "F") or (is_png and _has_exif_behind_pixels(image.fp)):
            return None
        # Pillow decodes a PNG to see whether there is EXIF data behind its pixels, which has been seen already.
        exif = Image.Image.getexif(image) if is_png else image.getexif()
        # Some releases of Pillow have turned the size of a TIFF by now, some have not.
        width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
    if max(width, height) > MAX_SIDE:
        return None
    return (height, width) if exif.get(ORIENTATION) in TURNED_SIDEWAYS else (width, height)


def _has_exif_behind_pixels(file) -> bool:
    """Whether a PNG file may say behind its pixels how it is to be turned."""
    file.seek(8)
    behind = False
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"eXIf" and behind:
            return True
        if kind in (b"iTXt", b"tEXt", b"zTXt") and behind:
            keyword = file.read(min(length, 32))
            if keyword.startswith((b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")):
                return True
            length -= len(keyword)
        behind |= kind == b"IDAT"
        file.seek(length + 4, os.SEEK_CUR)
    return False
