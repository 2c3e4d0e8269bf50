# SPDX-License-Identifier: Apache-2.0
"""Tokens of each process in a step, with as many samples for each and with `--max_tokens_per_batch`.

    python -m benchmarks.balance

On the lengths of the fine-tuning mixture, steps of 128 samples. A step takes as long as its slowest process, so the longest
over the mean is the time that the others wait.
"""

import argparse

import numpy as np

from benchmarks import lengths as stand_ins
from benchmarks.batching import GLOBAL_BATCH, MAX_LENGTH
from benchmarks.measure import markdown
from training.collator import HoneybeeDataCollator
from training.trainer.length_grouping import WINDOW, mixture_lengths
from training.trainer.token_batches import TokenBatches

STEPS = 4 * WINDOW


def row(way: str, tokens: np.ndarray) -> dict[str, str]:
    """`tokens`: (steps, batches of a process, processes)."""
    of_process = tokens.sum(axis=1)
    slowest = of_process.max(axis=1) / of_process.mean(axis=1)
    return {
        "batches": way,
        "batches a process": str(tokens.shape[1]),
        "longest batch": f"{tokens.max():,} tokens",
        "slowest process / mean": f"{slowest.mean():.3f}",
        "worst step": f"{slowest.max():.3f}",
        "padding": "0.0%",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="draw from these files instead of made-up records of the same lengths")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    args = parser.parse_args()
    number = STEPS * GLOBAL_BATCH
    mixture = stand_ins.mixture(number, args.recipe)
    lengths = mixture_lengths(mixture, HoneybeeDataCollator(stand_ins.processor(), MAX_LENGTH), WINDOW * GLOBAL_BATCH)
    found = np.array(lengths(list(range(number))))
    rows = [
        row(f"{GLOBAL_BATCH // args.processes} samples each", found.reshape(STEPS, 1, args.processes, -1).sum(axis=3))
    ]
    for most in args.max_tokens:
        batches = TokenBatches(
            lambda samples: found[samples].tolist(), number, GLOBAL_BATCH, most, args.processes, shuffle=False
        )
        tokens = np.array([found[batch].sum() for batch in batches]).reshape(STEPS, -1, args.processes)
        assert tokens.sum() == found.sum()
        rows.append(row(f"at most {most:,} tokens", tokens))
    print(f"{args.processes} processes, {STEPS} steps, {found.mean():.0f} tokens a sample.\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
