# SPDX-License-Identifier: Apache-2.0
"""Large and wide pictures as several squares of the vision tower's size: which grid, and the squares themselves.

Travels with every checkpoint: Pillow's images are cut with their own methods, and nothing is imported.

Shapes: S side of the tower's square, a columns, b rows.
"""

from typing import NamedTuple


class Cut(NamedTuple):
    """How a picture becomes squares: a grid of crops, row by row, and behind them the whole picture where `overview` says so."""

    columns: int = 1
    rows: int = 1
    overview: bool = False

    @property
    def num_crops(self) -> int:
        """Squares of the picture, the overview among them."""
        return self.columns * self.rows + self.overview


WHOLE = Cut()  # the picture as one square, as the model without crops sees it


def plan_cut(
    size: tuple[int, int], square: tuple[int, int], max_crops: int, min_crops: int = 1, overview: bool = True
) -> Cut:
    """The grid that keeps the most detail of a picture.

    The picture is resized to `a * S` x `b * S`, which enlarges it to at most twice its pixels, so small pictures stay one
    square. Of the grids with `min_crops <= a * b <= max_crops` those count that keep the most detail, or at least nine tenths
    of it (of the scale of the coarser direction; beyond the picture's own pixels nothing is gained). Of these it is the one
    with the least change of aspect ratio, then that with the fewest crops, then that with the fewest columns. Where a
    minimum leaves only grids that enlarge more, these are taken as well.

    Args:
        size, square: width and height in pixels, of the picture and of a square.
    """
    (width, height), (side, tall) = size, square
    most = max(1, 2 * width * height // (side * tall))  # more would enlarge it to over twice its pixels
    most = min(most, max_crops) if most >= min_crops else max_crops
    grids = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
        if columns * rows >= min_crops
    ]

    # Scales as whole numbers over width * height: fractions would tell grids apart that are alike.
    scales = {(a, b): (a * side * height, b * tall * width) for a, b in grids}
    detail = {grid: min(*scale, width * height) for grid, scale in scales.items()}
    most_detail = max(detail.values())
    fine = [grid for grid in grids if 10 * detail[grid] >= 9 * most_detail]
    columns, rows = min(fine, key=lambda grid: (max(scales[grid]) / min(scales[grid]), grid[0] * grid[1], grid[0]))
    return Cut(columns, rows, overview and columns * rows > 1)


def cut_image(image, cut: Cut, square: tuple[int, int], resize) -> list:
    """The squares of a PIL image, in the order of [`Cut`].

    Args:
        square: width and height of each, in pixels.
        resize: makes of an image and a size (width, height) the resized image.
    """
    if cut.columns * cut.rows == 1:
        return [resize(image, square)]
    (width, height), squares = square, []
    large = resize(image, (cut.columns * width, cut.rows * height))
    for row in range(cut.rows):
        for column in range(cut.columns):
            left, top = column * width, row * height
            squares.append(large.crop((left, top, left + width, top + height)))
    return [*squares, resize(image, square)] if cut.overview else squares
