# SPDX-License-Identifier: Apache-2.0
"""Converts a checkpoint and prints the peak of the memory that it could not give back (anonymous pages), in bytes.

python convert_with_memory.py CHECKPOINT OUTPUT TOKENIZER DTYPE MAX_SHARD_SIZE
"""

import gc
import re
import sys
import threading
from pathlib import Path

from hub_upload import convert_official


def anonymous_bytes() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main(checkpoint, output, tokenizer, dtype, max_shard_size):
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    write = convert_official.write_weights

    def watched(*args):
        gc.collect()
        before = anonymous_bytes()
        thread = threading.Thread(target=watch)
        thread.start()
        try:
            write(*args)
        finally:
            done.set()
            thread.join()
        print("peak", max(peak[0] - before, 0))

    convert_official.write_weights = watched
    convert_official.convert(Path(checkpoint), Path(output), tokenizer, dtype, max_shard_size)


main(*sys.argv[1:])
