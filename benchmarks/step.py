# SPDX-License-Identifier: Apache-2.0
"""A stage-2 step of the 7B shape with random weights: samples/s, tokens/s, peak memory, model FLOPs use.

    python -m benchmarks.step                    # a GPU of 80 GB: 7B, bfloat16
    python -m benchmarks.step --shape toy        # anything, in float32, to see that it runs

Vision tower CLIP-L/14 at 224 px (frozen), C-Abs with M = 144, Llama 7B; AdamW with states in bfloat16, gradient
checkpointing. Padded to 1024 and packed take turns on the same samples of the fine-tuning mixture. Model FLOPs count what the
model needs for the tokens that are not padding (6 a parameter and token, attention within a conversation, the tower forward
only) and nothing that is recomputed; use is their share of `--peak-tflops`.
"""

import argparse
import time

import torch
from transformers.utils import is_flash_attn_2_available

from benchmarks import lengths as stand_ins
from benchmarks.batching import MAX_LENGTH, Samples
from benchmarks.measure import build, machine, markdown
from training.collator import HoneybeeDataCollator
from training.stages import freeze_for_stage
from training.trainer.packed_attention import use_packed_attention

SHAPES = {
    "7b": {
        "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        "projector": {"projector_type": "c-abs", "num_query_tokens": 144, "hidden_size": 1024},
    },
    "toy": {
        "text": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 2000},
        "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
        "projector": {"projector_type": "c-abs", "num_query_tokens": 144, "hidden_size": 64},
    },
}  # fmt: skip


def model_flops(model, batch: dict, lengths: list[int]) -> float:
    """Of a forward and backward of the samples, without padding."""
    text = model.config.text_config
    trained = sum(p.numel() for p in model.model.language_model.layers.parameters())
    tokens = sum(lengths)
    flops = 6 * trained * tokens
    flops += 6 * text.num_hidden_layers * text.hidden_size * sum(length**2 for length in lengths)  # causal: half of 12
    flops += 6 * model.lm_head.weight.numel() * int((batch["labels"] != -100).sum())
    if "pixel_values" in batch:
        images, patches = len(batch["pixel_values"]), model.config.num_patches
        tower = sum(p.numel() for p in model.model.vision_tower.parameters())
        projector = sum(p.numel() for p in model.model.projector.parameters())
        flops += images * patches * (2 * tower + 6 * projector)
    return float(flops)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--samples", type=int, default=16, help="of a batch")
    parser.add_argument("--steps", type=int, default=5, help="timed for each way, after one to warm up")
    parser.add_argument(
        "--peak-tflops", type=float, default=989, help="of the device in bfloat16 (H100 SXM: 989, A100: 312)"
    )
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    # A processor without instructions for bfloat16 would take minutes even for the toy.
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    if args.shape == "7b" and not cuda:
        parser.error("--shape 7b needs a GPU of 80 GB and there is none; use --shape toy")

    shape = SHAPES[args.shape]
    text = {**shape["text"], "max_position_embeddings": 2048}
    vision = {**shape["vision"], "image_size": 224, "patch_size": 14}
    collator = HoneybeeDataCollator(stand_ins.processor(), MAX_LENGTH)
    count = args.samples * (args.steps + 1)
    samples = Samples(stand_ins.mixture(count), collator, count)
    model = build(text, vision, shape["projector"], collator.processor.image_token_id, dtype, device)
    freeze_for_stage(model, "instruct")
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=cuda)
    flash = cuda and is_flash_attn_2_available()

    def step(number: int, way: str) -> dict:
        draws = list(range(number * args.samples, (number + 1) * args.samples))
        batch = samples.collate(draws, way)
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        language_model = model.model.language_model
        language_model.set_attn_implementation("flash_attention_2" if flash else "sdpa")
        if way == "packed" and not flash:
            use_packed_attention(language_model)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        lengths = [samples.lengths[draw] for draw in draws]
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        return {"seconds": seconds, "tokens": sum(lengths), "flops": model_flops(model, batch, lengths), "peak": peak}

    rows, rates = [], {}
    results = {"padded": [], "packed": []}
    for number in range(args.steps + 1):
        for way, found in results.items():
            found.append(step(number, way))
    for way, found in results.items():
        found = found[1:]
        seconds = sum(one["seconds"] for one in found)
        rates[way] = args.samples * len(found) / seconds
        use = sum(one["flops"] for one in found) / seconds / (args.peak_tflops * 1e12)
        rows.append(
            {"batches": {"padded": "padded to 1024", "packed": "packed"}[way], "s a step": f"{seconds / len(found):.2f}",
             "samples/s": f"{rates[way]:.2f}", "tokens/s": f"{sum(one['tokens'] for one in found) / seconds:.0f}",
             "peak memory": f"{max(one['peak'] for one in found):.1f} GiB" if cuda else "-", "model FLOPs use": f"{use:.1%}" if cuda else "-",
             "speed-up": f"{rates[way] / rates['padded']:.2f}"}
        )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    attention = "flash attention 2" if flash else "sdpa"
    print(
        f"Shape {args.shape}, {parameters:.0f}M parameters, {args.samples} samples a batch, {attention}. {machine()}."
    )
    print(f"\n{markdown(rows)}")


if __name__ == "__main__":
    main()
