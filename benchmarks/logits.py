# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of a step with logits everywhere and only where a label is learned, at a 32k vocabulary.

    python -m benchmarks.logits

One padded batch of the fine-tuning mixture's lengths, and a model whose LLM is one thin layer, so that the head and the
loss are most of it. Memory is what the process gains in forward and backward, each way in a process of its own,
gradients made before. `learned` is what the model does by itself; `TRL` is the head that TRL's trainer puts in its place;
`TRL, learned` is that of `training/sft.py`. (With a GPU, TRL leaves out by itself what is not learned.)
"""

import argparse
import json

import torch
from trl.trainer.utils import add_fused_lm_head

from benchmarks import lengths as stand_ins
from benchmarks.batching import BATCH, PROJECTOR, VISION, Samples
from benchmarks.measure import PeakMemory, build, in_a_process, in_turn, machine, markdown
from training.collator import HoneybeeDataCollator
from training.stages import freeze_for_stage
from training.trainer.trainer import learned_only

VOCABULARY = 32000
TEXT = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
WAYS = {
    "full": {"logits_to_keep": 0},
    "learned": {},
    "TRL": {"fused_lm_head": True},
    "TRL, learned": {"fused_lm_head": True},
}


def step_of(way: str, samples: int):
    """A step that is ready to run, and the batch's shape and number of learned labels."""
    torch.set_num_threads(1)
    collator = HoneybeeDataCollator(stand_ins.processor(), 1024)
    batch = Samples(stand_ins.mixture(samples), collator, samples).collate(list(range(samples)), "longest")
    shape = {"vocab_size": VOCABULARY, "max_position_embeddings": 1024}
    vision = {**VISION, "num_hidden_layers": 1, "image_size": 224, "patch_size": 14}
    model = build({**TEXT, **shape}, vision, PROJECTOR, collator.processor.image_token_id).train()
    freeze_for_stage(model, "instruct")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    inputs = {**batch, "use_cache": False, **WAYS[way]}
    if "TRL" in way:
        add_fused_lm_head(model)
    if way == "TRL, learned":
        inputs = learned_only(inputs)

    def step():
        output = model(**inputs)
        output.loss.backward()
        return output.loss.item()

    return step, tuple(batch["labels"].shape), int((batch["labels"] != -100).sum())


def one(way: str, samples: int, timed: bool) -> dict:
    step, shape, learned = step_of(way, samples)
    with PeakMemory() as memory:
        loss = step()
    seconds = in_turn({"step": step}, rounds=1)["step"] if timed else None
    return {
        "logits": way,
        "shape": shape,
        "learned": learned,
        "loss": loss,
        "peak_mb": memory.peak_mb,
        "seconds": seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=BATCH, help="of the batch")
    parser.add_argument("--no_times", action="store_true", help="memory alone")
    parser.add_argument("--one", choices=list(WAYS), help="one way, in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.samples, not args.no_times)))
        return
    found = [in_a_process("benchmarks.logits", "--one", way, "--samples", args.samples) for way in WAYS]
    full = found[0]
    rows = [
        {"logits": row["logits"], "peak memory": f"{row['peak_mb']:.0f} MB", "less than full": f"{full['peak_mb'] / row['peak_mb']:.1f} x",
         "time": f"{row['seconds']:.2f} s", "loss - full": f"{row['loss'] - full['loss']:.1e}"}
        for row in found
    ]  # fmt: skip
    share = full["learned"] / (full["shape"][0] * full["shape"][1])
    print(f"Batch {tuple(full['shape'])}, {share:.0%} learned, {VOCABULARY} tokens. {machine()}.\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
