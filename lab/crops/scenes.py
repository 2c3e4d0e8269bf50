# SPDX-License-Identifier: Apache-2.0
"""Large scenes: the quickstart's questions about digits in cells of 64 pixels, in pictures of 256 x 256 and 384 x 128 that
the tower's square of 64 x 64 holds squeezed only."""

import numpy as np
from PIL import Image

from processing.processing_honeybee import resize_image
from training.quickstart.digit_scenes import SceneMaker, cell_names

SIDE = 64  # of a cell, and of the tower's square
GRIDS = ((4, 4), (6, 2))  # columns, rows
GRID_OF = {columns * rows: (columns, rows) for columns, rows in GRIDS}
NAMES = tuple(dict.fromkeys(name for grid in GRIDS for name in cell_names(*grid)))
DIGIT_PIXELS, LARGE_DIGIT_PIXELS = 8, 32  # too small once squeezed, and as large as the small ones then
RASTER = 8  # small digits begin at multiples of this, as patches do: at any pixel, a small tower learns for hours
INK = (0.5, 1.0)  # share of the full brightness, drawn for each digit
NOISE = 24  # standard deviation, of 255
LEVELS = 16  # between two grays of a picture. Coarse ones make small files


class LargeScenes(SceneMaker):
    """Scenes of the grids in turn by chance, each digit anywhere in its cell.

    Args:
        digit_pixels: width and height of a digit.
    """

    def __init__(self, split: str, seed: int, digit_pixels: int = DIGIT_PIXELS):
        super().__init__(split, seed)
        self.pixels = digit_pixels
        self.raster = RASTER * digit_pixels // DIGIT_PIXELS
        self.noise = np.random.default_rng(self.random.getrandbits(64))
        for digit, images in enumerate(self.by_digit):
            small = (Image.fromarray(np.uint8(image * 15)) for image in images)
            sized = [np.asarray(each.resize((digit_pixels, digit_pixels), Image.Resampling.BICUBIC)) for each in small]
            self.by_digit[digit] = np.stack(sized).astype(np.float32)

    def grid(self, contents: list[int | None]) -> tuple[int, int]:
        return GRID_OF[len(contents)]

    def contents(self) -> list[int | None]:
        return super().contents(self.random.choice(list(GRID_OF)))

    def draw(self, contents: list[int | None]) -> Image.Image:
        """256 x 256 or 384 x 128, gray."""
        return self.place(contents, *self.grid(contents))[0]

    def place(
        self, contents: list[int | None], columns: int, rows: int, side: int = SIDE
    ) -> tuple[Image.Image, dict[int, tuple[float, float]]]:
        """The picture of a grid of cells with `side` pixels, and where, by cell, the middle of its digit is: (x, y)."""
        picture, middles = np.zeros((rows * side, columns * side), dtype=np.float32), {}
        places = (side - self.pixels) // self.raster + 1
        for cell, digit in enumerate(contents):
            if digit is None:
                continue
            drawn = self.by_digit[digit][self.random.randrange(len(self.by_digit[digit]))]
            top, left = (
                of_cell * side + self.random.randrange(places) * self.raster
                for of_cell in (cell // columns, cell % columns)
            )
            picture[top : top + self.pixels, left : left + self.pixels] = drawn * self.random.uniform(*INK)
            middles[cell] = (left + self.pixels / 2, top + self.pixels / 2)
        picture += NOISE * self.noise.standard_normal(picture.shape, dtype=np.float32)
        return Image.fromarray(np.uint8(picture.clip(0, 255)) // LEVELS * LEVELS), middles


def squeezed(picture: Image.Image) -> Image.Image:
    """As the processor squeezes what it does not cut."""
    return resize_image(picture, (SIDE, SIDE), Image.Resampling.BICUBIC)
