# SPDX-License-Identifier: Apache-2.0
"""All benchmarks of this folder that need no GPU, one after the other, as Markdown.

python -m benchmarks.run > tables.md
"""

import subprocess
import sys

BENCHMARKS = {
    "batching": "Batches: padding and time of a step",
    "balance": "Tokens of each process in a step",
    "logits": "Logits where a label is learned",
    "prefill": "Visual tokens and the time to the first answer token",
    "elastic": "Images of different M in one batch",
    "preparation": "Samples made ready by a core",
    "loading": "Memory of from_pretrained",
}


def main():
    for name, title in BENCHMARKS.items():
        print(f"## {title}\n\n`python -m benchmarks.{name}`\n", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
        print(flush=True)


if __name__ == "__main__":
    main()
