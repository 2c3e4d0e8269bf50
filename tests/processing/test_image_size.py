# SPDX-License-Identifier: Apache-2.0
"""The size of a picture from the header of its file is that of the picture that is decoded later."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from processing import open_image
from processing.image_size import image_size
from tests.processing.test_open_image import KINDS, encoded, forms
from tests.tiny import picture


def rewound(image):
    getattr(image, "seek", lambda place: None)(0)
    return image


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_form(kind, tmp_path, monkeypatch):
    content, pixels = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    for form, image in forms(content, pixels, tmp_path).items():
        if form == "batch of one":
            continue
        root = str(tmp_path) if "relative" in form else ""
        found = image_size(rewound(image), root)
        assert found == open_image(rewound(image), root).size, form
        assert form in ("opened", "copied") or "channels" in form or found == pixels.shape[1::-1], form


FORMATS = ["JPEG", "PNG", "TIFF", *(["WEBP"] if features.check("webp") else [])]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_way_to_turn_a_picture(kind):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(picture(0, (40, 24)), kind, exif=exif)
        expected = (24, 40) if orientation >= 5 else (40, 24)
        assert image_size(content) == open_image(content).size == expected


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


TURNED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
RAW = b"\nexif\n      %d\n%s\n" % (len(TURNED) + 6, (b"Exif\0\0" + TURNED).hex().encode())
OF_PNG = {
    "eXIf": (chunk(b"eXIf", TURNED), True),
    "XMP": (chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP), True),
    "raw": (chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW)), True),
    "date": (chunk(b"tEXt", b"date:create\0today"), False),
    "comment": (chunk(b"iTXt", b"Comment\0\0\0\0\0" + XMP), False),
}


@pytest.mark.parametrize("behind", [False, True], ids=["in front", "behind"])
@pytest.mark.parametrize("kind", OF_PNG)
def test_what_stands_around_the_pixels_of_a_png(kind, behind):
    added, is_turned = OF_PNG[kind]
    content = encoded(picture(0, (40, 24)), "PNG")
    place = len(content) - 12 if behind else 33  # in front of IEND, or behind IHDR
    content = content[:place] + added + content[place:]
    assert image_size(content) == open_image(content).size
    assert image_size(content) == ((24, 40) if is_turned else (40, 24))


def test_no_pixel_is_decoded(tmp_path, monkeypatch):
    contents = {kind: encoded(picture(0, (40, 24)), kind) for kind in [*FORMATS, "GIF", "BMP", "PPM"]}
    contents["PNG, named"] = contents["PNG"][:-12] + OF_PNG["date"][0] + contents["PNG"][-12:]

    def load(self):
        raise AssertionError(f"a {self.format} is decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for kind, content in contents.items():
        (tmp_path / "picture").write_bytes(content)
        monkeypatch.setattr("processing.image_size.open_image", None)
        for image in (content, "picture", {"bytes": content}, {"bytes": None, "path": "picture"}):
            assert image_size(image, str(tmp_path)) == (40, 24), kind


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ("no_such.png", FileNotFoundError, "no_such.png' does not exist"),
        ({"bytes": None, "path": "no_such.png"}, FileNotFoundError, "no_such.png' does not exist"),
        (b"", ValueError, "cannot be read"),
        (b"not an image", ValueError, "cannot be read"),
        (5, ValueError, "neither a path nor a picture"),
        (None, ValueError, "neither a path nor a picture"),
        ({}, ValueError, "neither a path nor a picture"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), ValueError, "mode is 'F'"),
        (encoded(Image.new("1", (20000, 10000)), "PNG"), ValueError, "too large .*decompression bomb"),
        (encoded(Image.new("1", (1, 262_145)), "PNG"), ValueError, "too large .1 x 262145 pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_those_of_opening(image, error, words, tmp_path):
    for function in (image_size, open_image):
        with pytest.raises(error, match=words) as found:
            function(image, str(tmp_path))
        assert "bomb" not in words or isinstance(found.value.__cause__, Image.DecompressionBombError)


def test_an_open_file_can_be_read_again():
    file = io.BytesIO(encoded(picture(0, (40, 24)), "PNG"))
    assert image_size(file) == (40, 24) and open_image(file).size == (40, 24)
