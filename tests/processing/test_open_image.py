# SPDX-License-Identifier: Apache-2.0
"""One picture gives one answer, whatever it comes as and whoever asks: inference, training, evaluation or a server."""

import base64
import io
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from processing import open_image
from processing.processing_honeybee import MAX_SIDE
from tests.tiny import picture, tiny_processor
from training.collator import HoneybeeDataCollator

RGB = np.asarray(picture(0, (40, 24)))
GREY = RGB[..., 0]
DEEP = np.random.default_rng(1).integers(0, 2**16, GREY.shape, dtype=np.uint16)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    return exif


def as_grey(values) -> np.ndarray:
    return np.stack([values.astype(np.uint8)] * 3, axis=-1)


def deep_png(values: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits in several channels, which Pillow reads and does not write."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    height, width, _ = values.shape
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def kinds() -> dict[str, tuple[bytes, np.ndarray]]:
    """A file of each kind and the picture in it (H, W, 3), without Pillow's conversions where it has a formula."""
    rgb, grey, alpha = Image.fromarray(RGB), Image.fromarray(GREY), Image.fromarray(RGB[..., 1])
    palette = rgb.quantize(16)
    in_palette = np.asarray(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]
    transparent, grey_alpha = rgb.copy(), grey.copy()
    transparent.putalpha(alpha)
    grey_alpha.putalpha(alpha)
    ink = Image.fromarray(np.concatenate([RGB, 255 - RGB[..., :1]], axis=-1), "CMYK")
    jpeg = encoded(rgb, "JPEG", exif=turned())
    upright = np.rot90(np.asarray(Image.open(io.BytesIO(jpeg))), -1)
    return {
        "rgb": (encoded(rgb, "PNG"), RGB),
        "grey": (encoded(grey, "PNG"), as_grey(GREY)),
        "black and white": (encoded(Image.fromarray(GREY > 99), "PNG"), as_grey((GREY > 99) * 255)),
        "transparent": (encoded(transparent, "PNG"), RGB),
        "transparent grey": (encoded(grey_alpha, "PNG"), as_grey(GREY)),
        "transparent colour": (encoded(rgb, "PNG", transparency=tuple(map(int, RGB[0, 0]))), RGB),
        "palette": (encoded(palette, "PNG"), in_palette),
        "transparent palette": (encoded(palette, "PNG", transparency=bytes(range(0, 160, 10))), in_palette),
        "16 bits, PNG": (encoded(Image.fromarray(DEEP), "PNG"), as_grey(DEEP // 256)),
        "16 bits, colour": (
            deep_png(np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], axis=-1), 2),
            np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], axis=-1).astype(">u2").view(np.uint8)[..., ::2],
        ),
        "16 bits, transparent": (deep_png(np.stack([DEEP, DEEP[::-1]], axis=-1), 4), as_grey(DEEP // 256)),
        "16 bits, TIFF": (encoded(Image.fromarray(DEEP), "TIFF"), as_grey(DEEP // 256)),
        "16 bits, PGM": (b"P5 40 24 65535\n" + DEEP.astype(">u2").tobytes(), as_grey(DEEP // 256)),
        "16 bits, turned": (encoded(Image.fromarray(DEEP), "TIFF", exif=turned()), np.rot90(as_grey(DEEP // 256), -1)),
        "four inks": (encoded(ink, "TIFF"), np.asarray(ink.convert("RGB"))),
        "turned JPEG": (jpeg, upright),
        "turned PNG": (encoded(rgb, "PNG", exif=turned()), np.rot90(RGB, -1)),
        "animated": (encoded(rgb, "PNG", save_all=True, append_images=[picture(1)]), RGB),
        "animated palette": (encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(180)]), in_palette),
        "one row": (encoded(rgb.crop((0, 0, 40, 1)), "PNG"), RGB[:1]),
        "three rows": (encoded(rgb.crop((0, 0, 40, 3)), "PNG"), RGB[:3]),
    }


KINDS = kinds()


def forms(content: bytes, pixels: np.ndarray, folder) -> dict:
    (folder / "picture").write_bytes(content)
    path, text = folder / "picture", base64.b64encode(content).decode()
    values = np.array(pixels)
    return {
        "path": str(path),
        "pathlib": path,
        "file URL": path.as_uri(),
        "bytes": content,
        "bytearray": bytearray(content),
        "file": io.BytesIO(content),
        "base64": text,
        "base64 in lines": base64.encodebytes(content).decode(),
        "data URI": f"data:image/png;base64,{text}",
        "dict of bytes": {"bytes": content, "path": None},
        "dict of bytes and a name": {"bytes": content, "path": "somewhere/else.png"},
        "dict of a path": {"bytes": None, "path": str(path)},
        "relative path": "picture",
        "dict of a relative path": {"path": "picture"},
        "opened": Image.open(path),
        "copied": Image.open(path).convert("RGB"),
        "array": values,
        "array, channels first": values.transpose(2, 0, 1),
        "tensor": torch.from_numpy(values).permute(2, 0, 1),
        "tensor, channels last": torch.from_numpy(values),
        "batch of one": torch.from_numpy(values).permute(2, 0, 1)[None],
    }


def fitting(kind: str, given: dict) -> dict:
    if kind.startswith("16 bits"):
        del given["copied"]  # Pillow has cut the numbers off
    if kind == "16 bits, turned":
        del given["opened"]  # by path, and so not turned by Pillow
    if "row" in kind:
        del (
            given["array, channels first"],
            given["tensor, channels last"],
        )  # an array of this shape is taken for the other
    return given


@pytest.mark.parametrize("kind", KINDS)
def test_one_picture_has_one_answer(kind, tmp_path, monkeypatch):
    content, pixels = KINDS[kind]
    processor = tiny_processor()
    collator = HoneybeeDataCollator(processor, image_root=str(tmp_path))
    monkeypatch.chdir(tmp_path)
    expected = processor(images=Image.fromarray(np.array(pixels)), return_tensors="pt")["pixel_values"]
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "yes"}]
    for form, image in fitting(kind, forms(content, pixels, tmp_path)).items():
        if form != "batch of one":
            assert np.array_equal(np.asarray(open_image(image)), pixels), form
            getattr(image, "seek", lambda place: None)(0)
        inferred = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
        assert torch.equal(inferred, expected), form
        getattr(image, "seek", lambda place: None)(0)
        trained = collator([{"messages": messages, "images": image}])["pixel_values"]
        assert torch.equal(trained, expected), form
        chat = [{"role": "user", "content": [{"type": "image", "image": image}]}]
        getattr(image, "seek", lambda place: None)(0)
        if form != "batch of one":
            asked = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
            assert torch.equal(asked["pixel_values"], expected), form


@pytest.mark.parametrize("decode", [True, False])
def test_pictures_of_a_dataset(decode):
    contents = {kind: content for kind, (content, _) in KINDS.items()}
    rows = Dataset.from_dict({"image": [{"bytes": content, "path": None} for content in contents.values()]})
    for row, (_, pixels) in zip(rows.cast_column("image", ImageFeature(decode=decode)), KINDS.values()):
        assert np.array_equal(np.asarray(open_image(row["image"])), pixels)


def test_pictures_by_address(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        for content, pixels in KINDS.values():
            (tmp_path / "picture").write_bytes(content)
            assert np.array_equal(np.asarray(open_image(f"{address}/picture")), pixels)
        with pytest.raises(ValueError, match="127.0.0.1.*/missing' cannot be read .*404"):
            open_image(f"{address}/missing")
    finally:
        server.shutdown()
        server.server_close()


def test_a_batch_is_its_pictures():
    processor = tiny_processor()
    pictures = [picture(seed) for seed in range(3)]
    batch = np.stack([np.asarray(image) for image in pictures])
    expected = processor(images=pictures, text="<image>" * 3, return_tensors="pt")["pixel_values"]
    for images in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2), [batch[:1], batch[1:]]):
        given = processor(images=images, text=["<image>" * 3] if not isinstance(images, list) else ["<image>", "<image>" * 2],
                          padding=True, return_tensors="pt")  # fmt: skip
        assert torch.equal(given["pixel_values"], expected)


def test_16_bits_in_arrays_and_tensors():
    for values in (DEEP, DEEP.astype(">u2"), torch.from_numpy(DEEP), np.stack([DEEP] * 3)):
        assert np.array_equal(np.asarray(open_image(values)), as_grey(DEEP // 256))
    assert np.array_equal(np.asarray(open_image(GREY > 99)), as_grey((GREY > 99) * 255))


FLOATS = RGB.astype(np.float32) / 255


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(FLOATS[..., 0]), "mode is 'F'"),
        (Image.fromarray(GREY.astype(np.int32)), "mode is 'I'"),
        (encoded(Image.fromarray(FLOATS[..., 0]), "TIFF"), "mode is 'F'"),
        (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "mode is 'I'"),
        (FLOATS, "type float32, .*uint8"),
        (torch.from_numpy(FLOATS), "type float32, .*uint8"),
        (torch.from_numpy(FLOATS).to(torch.bfloat16), "type bfloat16, .*uint8"),
        (RGB.astype(np.int64), "type int64, .*uint8"),
        (np.zeros((8, 8, 5), np.uint8), r"shape is \(8, 8, 5\)"),
        (np.zeros((0, 8, 3), np.uint8), r"shape is \(0, 8, 3\)"),
        (np.zeros(8, np.uint8), r"shape is \(8,\)"),
        (5, "image 5 is neither a path nor a picture"),
        (None, "image None is neither a path nor a picture"),
        ({"path": None, "bytes": None}, "neither a path nor a picture"),
        (b"", "'in memory' cannot be read"),
        (encoded(picture(0, (64, 64)), "PNG")[:-2000], "'in memory' cannot be read .*truncated"),
        ("data:image/png;base64,AAAA", "cannot be read"),
        (Image.new("1", (1, MAX_SIDE + 1)), f"is too large .1 x {MAX_SIDE + 1} pixels.*smaller"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_shown_is_said(image, words):
    with pytest.raises(ValueError, match=words):
        open_image(image)
    if image is not None:
        with pytest.raises(ValueError, match=words):
            tiny_processor()(images=image, text="<image>")


def test_bombs_are_refused_in_every_form(tmp_path, monkeypatch):
    content = encoded(Image.new("1", (300, 300)), "PNG")
    given = forms(content, RGB, tmp_path)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10_000)
    for image in given.values():
        if isinstance(image, (str, Path, bytes, bytearray, dict, io.BytesIO)):
            with pytest.raises(ValueError, match="too large .*decompression bomb.*smaller"):
                open_image(image, str(tmp_path))


def test_the_callers_picture_stays_as_it_is():
    for content, _ in KINDS.values():
        image = Image.open(io.BytesIO(content))
        image.load()
        before = image.mode, image.size, image.tobytes(), dict(image.info)
        open_image(image)
        assert (image.mode, image.size, image.tobytes(), dict(image.info)) == before
