# SPDX-License-Identifier: Apache-2.0
"""Pixels are the official ones on every Pillow: reference images, stored bytes of Pillow 12, and its formula by hand."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from processing.pixels import Pixels
from processing.prepare_tokenizer import square_image_processor
from processing.processing_honeybee import resize_image
from tests.golden import FULL
from tests.tiny import REPOSITORY, tiny_processor

FOLDER = FULL / "preprocess"
STORED = json.loads((REPOSITORY / "tests" / "data" / "pixels.json").read_text())
LONG = [(90, 380), (380, 90), (20, 3000), (1, 5000), (5000, 1), (1, 7), (3, 1)]  # width, height


def pattern(width: int, height: int) -> Image.Image:
    """A picture with edges everywhere, the same on any machine."""
    x, y = np.arange(width, dtype=np.int32)[None], np.arange(height, dtype=np.int32)[:, None]
    channels = (x * 7 + y * 13 + x * y, x * x // 3 + y * 31, (x ^ y) * 5 + 40 * (y % 3))
    return Image.merge("RGB", [Image.fromarray((channel % 256).astype(np.uint8)) for channel in channels])


def checked_bytes(pixels: torch.Tensor, image_processor) -> torch.Tensor:
    """The bytes (3, S, S) that pixel values were made of; equal bytes show an equal resize."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (image_processor.image_mean, image_processor.image_std))
    bytes_ = ((pixels * std + mean) * 255).round().to(torch.uint8)
    torch.testing.assert_close(pixels, (bytes_.float() / 255 - mean) / std, atol=1e-5, rtol=0)
    return bytes_


def sha256(bytes_: torch.Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(bytes_.numpy()).tobytes()).hexdigest()


def all_ways(image: Image.Image, size: int) -> list[torch.Tensor]:
    """Bytes of a picture as inference and training see it."""
    processor = tiny_processor()
    processor.image_processor = square_image_processor(size)
    pixels = Pixels(processor.image_processor)
    assert pixels.table is not None
    ways = [processor(images=image, return_tensors="pt")["pixel_values"], pixels([image]), pixels._slow([image])]
    return [checked_bytes(way[0], processor.image_processor) for way in ways]


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference images at {FOLDER}")
def test_pixel_values():
    processor = tiny_processor()
    rows = json.loads((FOLDER / "index.json").read_text())["images"]
    assert len(rows) > 10
    for row in rows:
        processor.image_processor = square_image_processor(row["image_size"])
        pixels = processor(images=str(FOLDER / row["file"]), return_tensors="pt")["pixel_values"][0]
        assert list(pixels.shape) == row["shape"]
        assert sha256(checked_bytes(pixels, processor.image_processor)) == row["sha256_uint8_chw"]
        torch.testing.assert_close(pixels.double().sum().item(), row["sum"], atol=0.05, rtol=1e-5)


@pytest.mark.parametrize("row", STORED, ids=lambda row: f"{row['width']}x{row['height']}-{row['size']}")
def test_pixels_of_pillow_12(row):
    for bytes_ in all_ways(pattern(row["width"], row["height"]), row["size"]):
        assert sha256(bytes_) == row["sha256_uint8_chw"]


def bicubic_by_hand(values: np.ndarray, length: int) -> np.ndarray:
    """Rows of bytes (rows, columns, channels) at `length` columns, by the fixed-point formula of Pillow's C code."""
    columns = values.shape[1]
    scale = columns / length
    stretch = max(scale, 1.0)
    weights = np.zeros((length, columns))
    for place in range(length):
        center = (place + 0.5) * scale
        first, end = max(int(center - 2 * stretch + 0.5), 0), min(int(center + 2 * stretch + 0.5), columns)
        x = np.abs((np.arange(first, end) - center + 0.5) / stretch)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights[place, first:end] = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights /= weights.sum(1, keepdims=True)
    weights = np.trunc(weights * 2**22 + np.copysign(0.5, weights)).astype(np.int64)
    return (np.einsum("rxc,px->rpc", values.astype(np.int64), weights) + 2**21 >> 22).clip(0, 255)


@pytest.mark.parametrize("size", LONG, ids=str)
def test_pixels_by_hand(size):
    image = pattern(*size)
    rows_first = bicubic_by_hand(np.asarray(image), 32)
    expected = bicubic_by_hand(rows_first.transpose(1, 0, 2), 32).transpose(1, 0, 2)
    for bytes_ in all_ways(image, 32):
        assert np.array_equal(bytes_.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("resample", Image.Resampling)
def test_one_axis_at_a_time_changes_nothing_for_wide_pictures(resample):
    """The order of the passes is all that is chosen; wide pictures have the same one in every Pillow."""
    for size in [(90, 40), (32, 32), (300, 200), (16, 8)]:
        image = pattern(*size)
        assert resize_image(image, (32, 32), resample).tobytes() == image.resize((32, 32), resample).tobytes()
