# SPDX-License-Identifier: Apache-2.0
"""How samples become batches: padding share, and time of a training step, on lengths drawn from the fine-tuning mixture.

    python -m benchmarks.batching

The padding shares are those of 2,048 samples in batches of 16, as in `training/configs/instruct.yaml`. The times are of
whole steps (tower, projector, LLM, loss, backward, AdamW) of a small model, 8 samples a batch; the ways take turns batch by
batch, on the same samples (but `grouped`, which is a choice of samples), and what is compared is the time of one core for
each token that is not padding.
"""

import argparse
import json
import time

import numpy as np
import torch

from benchmarks import lengths as stand_ins
from benchmarks.measure import build, machine, markdown
from training.collator import HoneybeeDataCollator
from training.recipe.mixture import Mixture
from training.stages import freeze_for_stage
from training.trainer.length_grouping import LengthGroupedSampler, mixture_lengths
from training.trainer.packed_attention import NAME as PACKED
from training.trainer.packed_attention import use_packed_attention

MAX_LENGTH, DRAWN, BATCH, GLOBAL_BATCH = 1024, 2048, 16, 128

TEXT = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3, "num_attention_heads": 8}
VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
PROJECTOR = {"projector_type": "c-abs", "num_query_tokens": 144, "hidden_size": 128}

WAYS = {
    "padded to 1024 (official)": "padded",
    "padded to the longest": "longest",
    "grouped by length": "grouped",
    "packed, dense mask": "dense",
    "packed (default)": "packed",
}


class Samples:
    """The mixture's draws with blank images in the place of files: what is measured is the step."""

    def __init__(self, mixture: Mixture, collator: HoneybeeDataCollator, count: int):
        self.mixture, self.collator = mixture, collator
        self.lengths = mixture_lengths(mixture, collator, GLOBAL_BATCH)(list(range(count)))

    def collate(self, draws: list[int], way: str) -> dict[str, torch.Tensor]:
        conversations = [(s["messages"], s["chat_template"]) for s in map(self.mixture.glance, draws)]
        rows = self.collator.tokenize(conversations)
        batch = self.collator._packed(rows) if way in ("packed", "dense") else self.collator._padded(rows)
        if way == "padded":
            missing = MAX_LENGTH - batch["input_ids"].shape[1]
            for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
                batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=value)
        processor = self.collator.processor
        images = int((batch["input_ids"] == processor.image_token_id).sum()) // processor.num_image_tokens
        if images:
            size = processor.image_processor.size["height"]
            batch["pixel_values"] = torch.zeros(images, 3, size, size)
        return batch


def padding_shares(lengths: list[int]) -> dict[str, float]:
    """Padding of the samples in drawn order, and in the order of the sampler."""

    def share(order, longest=None):
        batches = np.array(lengths)[order].reshape(-1, BATCH)
        slots = batches.size * longest if longest else BATCH * batches.max(axis=1).sum()
        return 1 - batches.sum() / slots

    drawn = np.arange(len(lengths))
    sampler = LengthGroupedSampler(lambda draws: [lengths[d] for d in draws], len(lengths), GLOBAL_BATCH, shuffle=False)
    grouped = share(np.array(list(sampler)))
    shares = {
        "padded": share(drawn, MAX_LENGTH),
        "longest": share(drawn),
        "grouped": grouped,
        "dense": 0.0,
        "packed": 0.0,
    }
    return {name: float(value) for name, value in shares.items()}


def step_times(samples: Samples, batches: int, size: int) -> dict[str, float]:
    """Microseconds for each token that is not padding."""
    processor = samples.collator.processor
    vocabulary = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 1024}
    model = build(
        {**TEXT, **vocabulary}, {**VISION, "image_size": 224, "patch_size": 14}, PROJECTOR, processor.image_token_id
    )
    freeze_for_stage(model, "instruct")
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    drawn = np.arange(batches * size).reshape(batches, size)
    # Of all batches that grouping makes, as many, evenly spaced in length.
    by_length = np.argsort(samples.lengths, kind="stable").reshape(-1, size)
    grouped = by_length[((np.arange(batches) + 0.5) / batches * len(by_length)).astype(int)]

    def step(draws, way):
        batch = samples.collate(draws.tolist(), way)
        language_model = model.model.language_model
        language_model.set_attn_implementation("sdpa")
        if way == "packed":
            assert use_packed_attention(language_model) and language_model.config._attn_implementation == PACKED
        start = time.process_time()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    for way in WAYS.values():
        step(drawn[0][:2], way)
    seconds, tokens = dict.fromkeys(WAYS.values(), 0.0), dict.fromkeys(WAYS.values(), 0)
    for number in range(batches):
        for way in WAYS.values():
            draws = (grouped if way == "grouped" else drawn)[number]
            seconds[way] += step(draws, way)
            tokens[way] += sum(samples.lengths[draw] for draw in draws)
    return {way: seconds[way] / tokens[way] * 1e6 for way in WAYS.values()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="draw from these files instead of made-up records of the same lengths")
    parser.add_argument("--batches", type=int, default=8, help="steps timed for each way")
    parser.add_argument("--size", type=int, default=8, help="samples of a timed batch")
    parser.add_argument("--json", action="store_true", help="the numbers instead of the table")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that CPU time is the time of a step, whatever else the machine does
    collator = HoneybeeDataCollator(stand_ins.processor(), MAX_LENGTH)
    samples = Samples(stand_ins.mixture(DRAWN, args.recipe), collator, DRAWN)
    shares = padding_shares(samples.lengths)
    times = step_times(samples, args.batches, args.size)
    if args.json:
        print(json.dumps({way: {"padding": shares[way], "speed_up": times["padded"] / times[way]} for way in times}))
        return
    rows = [
        {"batches": name, "padding": f"{shares[way]:.1%}", "µs a token": f"{times[way]:.0f}",
         "speed-up of a step": f"{times['padded'] / times[way]:.2f}"}
        for name, way in WAYS.items()
    ]  # fmt: skip
    print(f"Mean length {np.mean(samples.lengths):.0f} tokens. {machine()}.\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
