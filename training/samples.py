# SPDX-License-Identifier: Apache-2.0
"""The columns of a sample, and why one cannot be used. Loads nothing, so that settings are checked before torch is there."""

import os

# What is read of a dataset: `messages`, or `prompt` and `completion`; `images` or `image`; and `system`.
COLUMNS = ("messages", "images", "image", "prompt", "completion", "system")
# Why a sample cannot be used, in the order in which a checkpoint counts them.
REASONS = (
    "missing image",
    "corrupt image",
    "decompression bomb",
    "empty answer",
    "malformed record",
    "malformed conversation",
    "too long",
)


class BadSampleError(ValueError):
    """A sample that nothing can be learned from.

    Args:
        message: what is wrong with it.
        reason: one of `REASONS`, to be counted by. (It has a default because torch makes the error of a worker anew from
            its message alone.)
    """

    def __init__(self, message: str, reason: str = "malformed record"):
        super().__init__(message)
        self.reason = reason


class TooManyBadSamplesError(RuntimeError):
    """More samples than allowed could not be used."""


BUFFER_SIZE = 1000  # records of a stream that are shuffled together, as many as in `datasets`
PATTERN = "*?["  # what makes a name a pattern of files


def looks_local(name: str) -> bool:
    """Whether the name of a dataset means something on this disk, also where it is not there."""
    return (
        os.path.isabs(name)
        or name.startswith(".")
        or name.endswith((".json", ".jsonl", ".parquet"))
        or is_pattern(name)
    )


def is_pattern(name: str) -> bool:
    """Whether a name stands for files that match it."""
    return any(sign in name for sign in PATTERN)
