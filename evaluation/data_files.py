# SPDX-License-Identifier: Apache-2.0
"""Where a benchmark's files are, and how its pictures are read.

A data root has one folder for each benchmark, named in the benchmark's `Task`. The folder holds the files that the
authors distribute, or the parquet files of the benchmark's copy on the Hub in any subfolder.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


def picture(read: Callable) -> Callable:
    """A question's image: a function that opens what `read` returns, bytes or a row's field, when the question is asked."""

    def opened():
        from processing import open_image  # loads for seconds, and saved answers are scored without it

        return open_image(read())

    return opened


@dataclass(frozen=True)
class DataFolder:
    """A benchmark's folder, as its reader gets it.

    Attributes:
        task: name of the task, for errors.
        root: the data root.
        path: the benchmark's own folder below the root.
        hub: repository on the Hub with the same questions as parquet files, or None.
    """

    task: str
    root: Path
    path: Path
    hub: str | None = None

    def files(self, *names: str) -> list[Path] | None:
        """The original files if all of them are there, None if there are parquet files instead.

        Raises:
            ValueError: neither.
        """
        paths = [self.path / name for name in names]
        if all(path.exists() for path in paths):
            return paths
        if self.hub and self.path.is_dir() and next(self.path.rglob("*.parquet"), None):
            return None
        missing = next(path for path in paths if not path.exists())
        raise ValueError(
            f"{self.task}: {missing} does not exist; put the benchmark's own files there"
            + (f", or the parquet files of {self.hub} anywhere in {self.path}" if self.hub else "")
        )

    def parquet_rows(self, only: str = "") -> Iterator[tuple[dict, Callable | None]]:
        """(row without its images, function that decodes its image or None) of the parquet files.

        Args:
            only: pattern of the paths to read below the folder, where any path has it.

        Raises:
            ValueError: files that cannot be read, or without a column of images.
        """
        from datasets import Dataset, List
        from datasets import Image as ImageFeature
        from datasets.exceptions import DatasetGenerationError

        files = sorted(self.path.rglob("*.parquet"))
        chosen = [path for path in files if re.search(only, path.relative_to(self.path).as_posix())] or files
        try:
            table = Dataset.from_parquet([str(path) for path in chosen])
        except (DatasetGenerationError, OSError, ValueError) as error:
            reason = error.__cause__ or error
            raise ValueError(
                f"the parquet files in {self.path} cannot be read ({reason}); download them again"
            ) from error
        column = "image" if "image" in table.column_names else "image_1"
        if column not in table.column_names:
            raise ValueError(f"{chosen[0]} has no column image; its columns are {', '.join(table.column_names)}")
        several = isinstance(table.features[column], (list, List))
        # The bytes of an image are read when its question is asked. Here only a mask of the missing ones is read.
        feature = ImageFeature(decode=False)
        images = table.select_columns([column]).cast_column(column, List(feature) if several else feature)
        present = table.data.column(column).is_valid().to_pylist()

        def field_of(number: int) -> Callable:
            return lambda: images[number][column][0] if several else images[number][column]

        questions = table.remove_columns([n for n in table.column_names if re.fullmatch(r"image(_\d+)?", n)])
        for number, row in enumerate(questions):
            yield row, picture(field_of(number)) if present[number] else None
