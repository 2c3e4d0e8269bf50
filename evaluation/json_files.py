# SPDX-License-Identifier: Apache-2.0
"""JSON and JSONL files: read with errors that name the line, written whole or not at all."""

import json
import os
from pathlib import Path


def read_json(path: Path):
    """What a benchmark's JSON file holds.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error


def write_json(path: Path, data) -> None:
    _replace(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def read_lines(path: Path, torn: bool = False, remedy: str = "repair or remove the line") -> list[dict]:
    """The objects of a JSONL file; empty lines are passed over.

    Args:
        torn: a killed run may have left the last line incomplete. Such a line is cut off the file.
        remedy: the end of the error.

    Raises:
        ValueError: a line is no JSON object.
    """
    data = path.read_bytes()
    if torn and data and not data.endswith(b"\n"):
        last = data.rfind(b"\n") + 1
        try:
            json.loads(data[last:])
            data += b"\n"  # complete but for the line end
        except ValueError:
            data = data[:last]
        _replace(path, data)
    records = []
    # Not splitlines: it also parts lines at characters that JSON allows inside a text.
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not a JSON object ({error}); {remedy}") from error
        records.append(record)
    return records


def write_lines(path: Path, records: list[dict]) -> None:
    _replace(path, _as_lines(records))


def append_lines(path: Path, records: list[dict]) -> None:
    """In one write, and on the disk when this returns."""
    with path.open("ab") as file:
        file.write(_as_lines(records))
        file.flush()
        os.fsync(file.fileno())


def _as_lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
