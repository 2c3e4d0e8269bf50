# SPDX-License-Identifier: Apache-2.0
"""A stage-2 step of the 7B shape with random weights: samples/s, tokens/s, peak memory, model FLOPs use.

    python -m benchmarks.step                    # a GPU of 80 GB: 7B, bfloat16
    python -m benchmarks.step --shape toy        # anything, in float32, to see that it runs
    python -m benchmarks.step --ways packed,compiled,liger

Vision tower CLIP-L/14 at 224 px (frozen), C-Abs with M = 144, Llama 7B; AdamW with states in bfloat16, gradient
checkpointing. Each way takes the same samples of the fine-tuning mixture, with a model of its own that starts with the same
weights: padded to 1024; packed, as `training/sft.py` does by default; then with the LLM's blocks compiled
(`--torch_compile`), and with Liger's kernels (`--use_liger_kernel`, needs a GPU and liger-kernel). Model FLOPs count what the
model needs for the tokens that are not padding (6 a parameter and token, attention within a conversation, the tower forward
only) and nothing that is recomputed; use is their share of `--peak-tflops`.
"""

import argparse
import gc
import time

import numpy as np
import torch
from transformers.utils import is_flash_attn_2_available

from benchmarks import lengths as stand_ins
from benchmarks.batching import MAX_LENGTH, Samples
from benchmarks.measure import build, machine, markdown
from modeling_honeybee.processes import use_attention_for_any_shape
from training.collator import HoneybeeDataCollator
from training.stages import freeze_for_stage
from training.trainer.kernels import compile_blocks, use_liger_kernels
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
WAYS = {
    "padded": "padded to 1024",
    "packed": "packed",
    "compiled": "packed, compiled",
    "liger": "packed, Liger",
}


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


class Way:
    """One way to make a step, with a model of its own."""

    def __init__(self, name: str, shape: str, samples: Samples):
        self.samples, cuda = samples, torch.cuda.is_available()
        # A processor without instructions for bfloat16 would take minutes even for the toy.
        self.device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
        self.batching = "padded" if name == "padded" else "packed"
        parts = SHAPES[shape]
        text = {**parts["text"], "max_position_embeddings": 2048}
        vision = {**parts["vision"], "image_size": 224, "patch_size": 14}
        self.model = build(
            text, vision, parts["projector"], samples.collator.processor.image_token_id, dtype, self.device
        )
        freeze_for_stage(self.model, "instruct")
        self.model.train()
        self.model.gradient_checkpointing_enable()
        language_model = self.model.model.language_model
        language_model.set_attn_implementation(attention())
        if self.batching == "packed":
            use_packed_attention(language_model)
        if "liger" in name:
            use_liger_kernels(language_model)
        if "compiled" in name:
            compile_blocks(language_model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=cuda)

    def step(self, draws: list[int]) -> dict[str, float]:
        batch = self.samples.collate(draws, self.batching)
        batch = {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in batch.items()}
        cuda = self.device == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        lengths = [self.samples.lengths[draw] for draw in draws]
        return {
            "seconds": seconds,
            "tokens": sum(lengths),
            "loss": loss.item(),
            "flops": model_flops(self.model, batch, lengths),
            "peak": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        }


def attention() -> str:
    return "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--ways", default="padded,packed", help=f"comma-separated, of {', '.join(WAYS)}")
    parser.add_argument("--samples", type=int, default=16, help="of a batch")
    parser.add_argument("--steps", type=int, default=5, help="timed for each way")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before; some compile")
    parser.add_argument(
        "--peak-tflops", type=float, default=989, help="of the device in bfloat16 (H100 SXM: 989, A100: 312)"
    )
    args = parser.parse_args()
    ways = args.ways.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"--ways {', '.join(unknown)}: use {', '.join(WAYS)}")
    if not torch.cuda.is_available() and (args.shape == "7b" or any("liger" in way for way in ways)):
        parser.error("--shape 7b needs a GPU of 80 GB, and liger any GPU, and there is none; use --shape toy")

    collator = HoneybeeDataCollator(stand_ins.processor(), MAX_LENGTH)
    count = args.samples * (args.steps + args.warm_up)
    samples = Samples(stand_ins.mixture(count), collator, count)
    batches = np.arange(count).reshape(-1, args.samples).tolist()
    use_attention_for_any_shape()
    rows, rates = [], {}
    for name in ways:
        way = Way(name, args.shape, samples)
        found = [way.step(draws) for draws in batches]
        parameters = sum(p.numel() for p in way.model.parameters()) / 1e6
        del way
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        timed = found[args.warm_up :]
        seconds = sum(one["seconds"] for one in timed)
        rates[name] = args.samples * len(timed) / seconds
        use = sum(one["flops"] for one in timed) / seconds / (args.peak_tflops * 1e12)
        cuda = torch.cuda.is_available()
        rows.append(
            {"way": WAYS[name], "s a step": f"{seconds / len(timed):.2f}", "samples/s": f"{rates[name]:.2f}",
             "tokens/s": f"{sum(one['tokens'] for one in timed) / seconds:.0f}",
             "peak memory": f"{max(one['peak'] for one in timed):.1f} GiB" if cuda else "-",
             "model FLOPs use": f"{use:.1%}" if cuda else "-", "loss": f"{found[0]['loss']:.4f} -> {found[-1]['loss']:.4f}",
             "speed-up": f"{rates[name] / rates[ways[0]]:.2f}"}
        )  # fmt: skip
    print(
        f"Shape {args.shape}, {parameters:.0f}M parameters, {args.samples} samples a batch, {attention()}. {machine()}."
    )
    print(f"\n{markdown(rows)}")


if __name__ == "__main__":
    main()
