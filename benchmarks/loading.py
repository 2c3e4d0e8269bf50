# SPDX-License-Identifier: Apache-2.0
"""Peak memory of `from_pretrained` that the system could not take back, over the size of the weights.

    python -m benchmarks.loading

Counted is anonymous memory (`RssAnon`): pages of the checkpoint file that are mapped can be dropped and read again. Each way
loads in a process of its own.
"""

import argparse
import json
import tempfile

import torch

from benchmarks.measure import PeakMemory, build, in_a_process, machine, markdown
from modeling_honeybee import HoneybeeForConditionalGeneration

TEXT = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8}
VISION = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
PROJECTOR = {"projector_type": "d-abs", "num_query_tokens": 144, "hidden_size": 512}
WAYS = {
    "one file": {"dtype": "auto"},
    "shards of 100 MB": {"dtype": "auto"},
    "one file, as bfloat16": {"dtype": torch.bfloat16},
}


def save(folder: str) -> None:
    text = {**TEXT, "vocab_size": 32000, "max_position_embeddings": 1024}
    model = build(text, {**VISION, "image_size": 224, "patch_size": 14}, PROJECTOR, 31999)
    model.save_pretrained(f"{folder}/one", max_shard_size="10GB")
    model.save_pretrained(f"{folder}/shards", max_shard_size="100MB")


def load(way: str, folder: str) -> dict:
    from safetensors import safe_open  # noqa: F401  imports are no part of loading

    path = f"{folder}/{'shards' if 'shards' in way else 'one'}"
    with PeakMemory("RssAnon") as memory:
        model = HoneybeeForConditionalGeneration.from_pretrained(path, **WAYS[way])
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return {"way": way, "weights_mb": weights, "peak_mb": memory.peak_mb, "ratio": memory.peak_mb / weights}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=list(WAYS), help="one way, in this process")
    parser.add_argument("--folder", help="where the checkpoints of --one are")
    parser.add_argument("--json", action="store_true", help="the numbers instead of the table")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(load(args.one, args.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        found = [in_a_process("benchmarks.loading", "--one", way, "--folder", folder) for way in WAYS]
    if args.json:
        print(json.dumps(found))
        return
    rows = [
        {"checkpoint": row["way"], "weights": f"{row['weights_mb']:.0f} MB", "peak": f"{row['peak_mb']:.0f} MB",
         "peak / weights": f"{row['ratio']:.2f}"}
        for row in found
    ]  # fmt: skip
    print(f"{machine()}.\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
