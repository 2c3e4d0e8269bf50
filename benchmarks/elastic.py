# SPDX-License-Identifier: Apache-2.0
"""What it costs that images of one batch have different M: 8 images of 16, 64, 100 and 144 visual tokens against 8 of 81,
which are as many in all. Forward and backward.

    python -m benchmarks.elastic

`projector` is the projector alone, at its real width; `step` is the whole model with a frozen tower, all images in one row.
The settings take turns.
"""

import json

import torch

from benchmarks.measure import arguments, build, in_turn, machine, markdown

TEXT = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
VISION = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
MIXED = [16, 64, 100, 144] * 2
ALIKE = 81
PLACEHOLDER = 999


def functions_of(projector_type: str) -> dict:
    projector = {"projector_type": projector_type, "num_hidden_layers": 2}  # the latter of d-abs and resampler
    projector |= {"num_query_tokens": ALIKE, "elastic_num_query_tokens": [16, ALIKE, 144]}
    vision = {**VISION, "image_size": 224, "patch_size": 14}
    model = build({**TEXT, "vocab_size": 1000, "max_position_embeddings": 1024}, vision, projector, PLACEHOLDER).train()
    model.model.vision_tower.requires_grad_(False)
    features, pixel_values = torch.randn(8, 256, VISION["hidden_size"]), torch.randn(8, 3, 224, 224)
    ids = torch.cat([torch.full((sum(MIXED),), PLACEHOLDER), torch.arange(100)])[None]

    def project(numbers):
        model.model.projector(features, numbers).square().mean().backward()

    def step(numbers):
        model(input_ids=ids, pixel_values=pixel_values, num_query_tokens=numbers, labels=ids).loss.backward()

    return {
        ("projector", "alike"): lambda: project(ALIKE),
        ("projector", "mixed"): lambda: project(MIXED),
        ("step", "alike"): lambda: step(ALIKE),
        ("step", "mixed"): lambda: step(torch.tensor(MIXED)),
    }


def main():
    args = arguments(__doc__, rounds=5)
    rows = []
    for projector_type in ("c-abs", "d-abs", "resampler"):
        times = in_turn(functions_of(projector_type), args.rounds)
        row = {"projector": projector_type}
        for part in ("projector", "step"):
            alike, mixed = times[part, "alike"], times[part, "mixed"]
            row |= {f"{part}, one M": f"{alike:.2f} s", f"{part}, four M": f"{mixed:.2f} s ({mixed / alike:.2f} x)"}
        rows.append(row)
    print(json.dumps(rows) if args.json else f"{machine()}.\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
