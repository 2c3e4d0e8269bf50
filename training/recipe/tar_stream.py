# SPDX-License-Identifier: Apache-2.0
"""Reads webdataset tars a sample at a time.

`datasets` reads them too, but one member that cannot be decoded ends its stream, members that the first sample does not have
are dropped, and a list in the place of a text becomes its own source code.
"""

import logging
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator

import fsspec

logger = logging.getLogger(__name__)


def stream_tar(path: str, wanted: Callable[[str], bool]) -> Iterator[dict[str, tuple[str, bytes]]]:
    """The samples of a tar: neighbouring members whose names agree up to the first dot.

    A tar that ends too early gives an empty member, `{"": ("", b"")}`, as its last sample.

    Args:
        path: of the tar, or a URL that fsspec knows.
        wanted: extension -> whether the member is read; the others are there, empty.

    Returns:
        extension in lower case, behind the first dot -> name and content of the member.
    """
    key, files = None, {}
    try:
        with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, base = os.path.split(member.name)
                base, _, extension = base.partition(".")
                if files and (folder, base) != key:
                    yield files
                    files = {}
                key = folder, base
                extension = extension.lower()
                files[extension] = member.name, tar.extractfile(member).read() if wanted(extension) else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        logger.warning("%s: %s; what is left of it is one malformed record", path, error)
        files = {"": ("", b"")}
    if files:
        yield files
