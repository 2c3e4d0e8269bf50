# SPDX-License-Identifier: Apache-2.0
"""A stream of a million rows: time to the first sample, rows a second, memory on the way, and the time to go on in its middle.

    python -m benchmarks.stream

The rows are short conversations without images, in one file of each type; a sample is drawn and checked as in training, in one
process. Rows a second are of CPU time. Memory is what the system could not reclaim of the process, with the libraries. `zst` needs the package zstandard.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.json
import pyarrow.parquet

from benchmarks.measure import markdown

MARKS = (0.01, 0.5, 1.0)  # parts of the rows after which memory is read


def write_rows(folder: Path, count: int) -> list[Path]:
    lines = folder / "rows.jsonl"
    with open(lines, "w", encoding="utf-8") as file:
        for row in range(count):
            asked = {
                "role": "user",
                "content": f"What is the thing number {row} behind the table, and who put it there?",
            }
            said = {"role": "assistant", "content": f"A box of {row % 977} nails; the carpenter left it."}
            file.write(json.dumps({"messages": [asked, said]}) + "\n")
    table = pyarrow.json.read_json(lines)
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=10_000)
    files = [lines, folder / "rows.parquet"]
    if importlib.util.find_spec("zstandard"):
        import zstandard

        with open(lines, "rb") as source, open(folder / "rows.jsonl.zst", "wb") as target:
            zstandard.ZstdCompressor().copy_stream(source, target)
        files.append(folder / "rows.jsonl.zst")
    return files


def megabytes() -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return int(re.search(r"RssAnon:\s+(\d+)", file.read())[1]) // 1024


def read(path: str, count: int) -> dict:
    """A pass over the stream, and a start in its middle."""
    from training.recipe.sources import open_streamed

    start = time.perf_counter()
    mixture = open_streamed(path, "train", 1000, count, seed=0)
    mixture[0]
    found = {"first sample": f"{time.perf_counter() - start:.2f} s"}
    marks = {int(part * count) - 1 for part in MARKS}
    start = time.process_time()
    for draw in range(count):
        mixture[draw]
        if draw in marks:
            found[f"memory at {draw + 1:,}"] = f"{megabytes()} MB"
    found["rows / s / core"] = f"{count / (time.process_time() - start):,.0f}"
    start = time.perf_counter()
    open_streamed(path, "train", 1000, count, seed=0)[count // 2]
    found[f"to go on at {count // 2:,}"] = f"{time.perf_counter() - start:.2f} s"
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="in each file (%(default)s)")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.read, args.rows)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for file in write_rows(Path(folder), args.rows):
            command = [sys.executable, "-m", "benchmarks.stream", "--rows", str(args.rows), "--read", str(file)]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            size = f"{file.stat().st_size / 1e6:,.0f} MB"
            rows.append({"file": file.name, "size": size, **json.loads(result.stdout.splitlines()[-1])})
    print(markdown(rows))


if __name__ == "__main__":
    main()
