# SPDX-License-Identifier: Apache-2.0
"""The entries of a large JSON file, one at a time.

An annotation file of some hundred megabytes becomes several gigabytes as Python objects, so it is never held whole.
"""

import json
from collections.abc import Iterator

CHUNK = 1 << 20
_DECODER = json.JSONDecoder()
_BLANK = " \t\n\r"
_FOLLOWING = tuple(_BLANK + ",:]}")


class _Reader:
    """A text file, and in memory the part of it that is being parsed."""

    def __init__(self, file, chunk: int):
        self.file, self.chunk = file, chunk
        self.buffer, self.position, self.ended = "", 0, False

    def more(self, size: int) -> bool:
        text = self.file.read(size)
        self.ended = not text
        self.buffer = self.buffer[self.position :] + text
        self.position = 0
        return not self.ended

    def peek(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            while self.position < len(self.buffer):
                if self.buffer[self.position] not in _BLANK:
                    return self.buffer[self.position]
                self.position += 1
            if not self.more(self.chunk):
                return ""

    def expect(self, choices: str) -> str:
        found = self.peek()
        if not found or found not in choices:
            raise ValueError(
                f"{self.file.name!r} is not valid JSON: expected one of {choices!r}, found "
                f"{found or 'the end of the file'!r}; the file may be cut short, fetch it again"
            )
        self.position += 1
        return found

    def value(self):
        """The next value, decoded whole."""
        self.peek()
        size = self.chunk
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.position)
                # "0." at the edge of the buffer is read as 0: a value has ended where something else follows.
                if self.ended or self.buffer[end : end + 1] in _FOLLOWING:
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                if self.ended:
                    raise ValueError(
                        f"{self.file.name!r} is not valid JSON ({error.msg}); the file may be cut short, fetch it again"
                    ) from error
            self.more(size)
            size *= 2  # a long value is not parsed anew for every chunk of it

    def entries(self) -> Iterator:
        """The elements of the next array, or the (name, value) pairs of the next object."""
        closing = {"[": "]", "{": "}"}[self.expect("[{")]
        if self.peek() == closing:
            self.position += 1
            return
        while True:
            if closing == "}":
                name = self.value()
                self.expect(":")
                yield name, self.value()
            else:
                yield self.value()
            if self.expect("," + closing) == closing:
                return

    def skip(self):
        if self.peek() in ("[", "{"):
            for _ in self.entries():
                pass
        else:
            self.value()


def stream_json(path: str, member: str | None = None, chunk: int = CHUNK) -> Iterator:
    """Elements of the array, or (name, value) pairs of the object, that a JSON file holds.

    Args:
        path: a UTF-8 file.
        member: name of a member of the top object, whose entries are given in place of the object's.
        chunk: characters read at a time.

    Raises:
        ValueError: the file is not JSON, is cut short, or has no such member.
    """
    with open(path, encoding="utf-8") as file:
        reader = _Reader(file, chunk)
        if member is None:
            yield from reader.entries()
            return
        reader.expect("{")
        names = []
        while reader.peek() != "}":
            names.append(reader.value())
            reader.expect(":")
            if names[-1] == member:
                yield from reader.entries()
                return
            reader.skip()
            if reader.expect(",}") == "}":
                break
        raise ValueError(f"{path!r} has no member {member!r}; it has {', '.join(names) or 'none'}")
