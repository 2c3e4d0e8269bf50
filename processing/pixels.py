# SPDX-License-Identifier: Apache-2.0
"""Images to `pixel_values`, bit for bit as the image processor makes them and several times as fast.

An 8-bit value has 256 possible results in each channel. They are taken once from the image processor itself and looked up
from then on, where it converts every image anew through float64.

Shapes: B squares, one an image unless it is cut; S side of the model's square.
"""

from functools import partial

import numpy as np
import torch
from PIL import Image

from processing.crops_honeybee import WHOLE, Cut, cut_image
from processing.processing_honeybee import resize_image, resize_images


class Pixels:
    """Cuts, resizes and normalises RGB images.

    Args:
        image_processor: decides. One that does more than resize to a square, rescale and normalise, which a probe picture
            shows, does all the work itself.
    """

    def __init__(self, image_processor):
        self.image_processor = image_processor
        size = image_processor.size
        self.size = (size["width"], size["height"]) if "height" in size and "width" in size else None
        self.table = None
        if self.size is None:
            return
        # All values in all channels, as an image that needs no resizing.
        values = np.resize(np.arange(256, dtype=np.uint8), self.size[::-1])
        if values.size < 256:
            return
        results = self._slow([Image.fromarray(np.stack([values] * 3, axis=-1))])[0].numpy()
        if results.shape != (3, *self.size[::-1]):
            return
        self.table = np.ascontiguousarray(results.reshape(3, -1)[:, :256])
        width, height = self.size
        noise = np.random.default_rng(0).integers(0, 256, (3 * height + 1, width + 5, 3), dtype=np.uint8)
        probes = [Image.fromarray(noise), Image.fromarray(noise[: height // 2 + 3])]  # a tall picture and a wide one
        if not torch.equal(self(probes), self._slow(probes)):
            self.table = None

    def _slow(self, images: list[Image.Image], cuts: list[Cut] | None = None) -> torch.Tensor:
        squares = resize_images(images, self.image_processor, cuts)
        return self.image_processor(squares, return_tensors="pt", input_data_format="channels_last")["pixel_values"]

    def __call__(self, images: list[Image.Image], cuts: list[Cut] | None = None) -> torch.Tensor:
        """RGB images as (B, 3, S, S), float32.

        Args:
            cuts: how each becomes squares. Default: one square each.
        """
        if self.table is None:
            return self._slow(images, cuts)
        width, height = self.size
        cuts = cuts or [WHOLE] * len(images)
        resize = partial(resize_image, resample=self.image_processor.resample)
        pixels = np.empty((sum(cut.num_crops for cut in cuts), 3, height, width), dtype=self.table.dtype)
        place = 0
        for image, cut in zip(images, cuts):  # one at a time: the squares of all would be as much memory again
            for square in cut_image(image, cut, self.size, resize):
                values = np.asarray(square)
                for channel in range(3):
                    np.take(self.table[channel], values[..., channel], out=pixels[place, channel], mode="clip")
                place += 1
        return torch.from_numpy(pixels)
