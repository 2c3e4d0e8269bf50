# SPDX-License-Identifier: Apache-2.0
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from processing.prepare_tokenizer import square_image_processor
from tests.golden import FULL
from tests.tiny import tiny_processor

FOLDER = FULL / "preprocess"


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference images at {FOLDER}")
def test_pixel_values():
    processor = tiny_processor()
    rows = json.loads((FOLDER / "index.json").read_text())["images"]
    assert len(rows) > 10
    for row in rows:
        processor.image_processor = square_image_processor(row["image_size"])
        pixels = processor(images=str(FOLDER / row["file"]), return_tensors="pt")["pixel_values"][0]
        assert list(pixels.shape) == row["shape"]
        # The official float values are these bytes, scaled and normalised; equal bytes show an equal resize.
        image = processor.image_processor
        mean, std = (torch.tensor(v)[:, None, None] for v in (image.image_mean, image.image_std))
        bytes_ = ((pixels * std + mean) * 255).round().to(torch.uint8)
        assert hashlib.sha256(np.ascontiguousarray(bytes_.numpy()).tobytes()).hexdigest() == row["sha256_uint8_chw"]
        exact = (bytes_.float() / 255 - mean) / std
        torch.testing.assert_close(pixels, exact, atol=1e-5, rtol=0)
        torch.testing.assert_close(pixels.double().sum().item(), row["sum"], atol=0.05, rtol=1e-5)
        Image.open(FOLDER / row["file"]).close()
