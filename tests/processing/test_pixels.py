# SPDX-License-Identifier: Apache-2.0
"""Pixels by table are the image processor's, to the bit; what the table cannot do goes to the image processor."""

import pytest
import torch
from PIL import Image

from processing.crops_honeybee import WHOLE, Cut
from processing.pixels import Pixels
from processing.prepare_tokenizer import IMAGE_PROCESSOR_CLASS
from processing.processing_honeybee import resize_images
from tests.tiny import picture

SQUARE = {"size": {"height": 48, "width": 48}, "crop_size": {"height": 48, "width": 48}, "do_center_crop": False}
IMAGES = [picture(0, (40, 24)), picture(1, (48, 48)), picture(2, (300, 7)), picture(3, (1, 1))]


@pytest.mark.parametrize(
    "settings, has_table",
    [
        (SQUARE, True),
        ({**SQUARE, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.5, 0.7]}, True),
        ({**SQUARE, "do_normalize": False}, True),
        ({**SQUARE, "resample": Image.Resampling.BILINEAR}, True),
        ({**SQUARE, "size": {"height": 20, "width": 32}}, True),
        ({**SQUARE, "size": {"height": 8, "width": 8}}, False),
        ({**SQUARE, "size": {"shortest_edge": 48}, "do_center_crop": True}, False),
        ({**SQUARE, "do_center_crop": True, "crop_size": {"height": 40, "width": 40}}, False),
    ],
)
def test_equal_to_the_image_processor(settings, has_table):
    image_processor = IMAGE_PROCESSOR_CLASS(**settings)
    pixels = Pixels(image_processor)
    assert (pixels.table is not None) == has_table
    expected = image_processor(IMAGES, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    ours = pixels(IMAGES)
    assert ours.dtype == expected.dtype and torch.equal(ours, expected)
    if pixels.size is None:
        return  # such pictures are not cut
    cuts = [Cut(2, 1), WHOLE, Cut(3, 2, True), Cut(1, 1)]
    squares = resize_images(IMAGES, image_processor, cuts)
    expected = image_processor(squares, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    ours = pixels(IMAGES, cuts)
    assert len(ours) == 2 + 1 + 7 + 1 and torch.equal(ours, expected)
