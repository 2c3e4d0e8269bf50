# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of a Honeybee to the questions of a benchmark, in batches, over one or several processes."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import BatchFeature

from evaluation.prompts import Question, render
from modeling_honeybee import HoneybeeForConditionalGeneration
from modeling_honeybee.processes import use_attention_for_any_shape
from processing import HoneybeeProcessor, check_processor

# Files of a model that say what it computes; preprocessor_config.json is there where transformers 4 saved it.
SETTINGS = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json",
)  # fmt: skip


def fingerprint(folder: str | Path) -> str:
    """12 hexadecimal digits that tell models apart: settings, tokenizer, and a sample of every tensor.

    Weights are read in part only, a few rows of each tensor, so that a 13B model takes seconds. Chat templates are not
    in it: predictions carry the prompts that they make.
    """
    digest = hashlib.sha256()
    folder = Path(folder)
    for name in SETTINGS:
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                shape = part.get_shape()
                digest.update(f"{name} {shape} {part.get_dtype()}".encode())
                if not shape:
                    digest.update(str(file.get_tensor(name).item()).encode())
                for row in sorted({0, shape[0] // 2, shape[0] - 1}) if shape and shape[0] else ():
                    digest.update(repr(part[row : row + 1].flatten()[:256].tolist()).encode())
    if not weights:
        for path in sorted(folder.glob("*.bin")):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                for at in range(0, path.stat().st_size, max(1, path.stat().st_size // 256)):
                    file.seek(at)
                    digest.update(file.read(1024))
    return digest.hexdigest()[:12]


def load(folder: Path, dtype: str, device: torch.device, device_map: str | None):
    """Model in eval mode, and processor.

    Raises:
        ValueError: the two do not belong together.
    """
    use_attention_for_any_shape()
    processor = HoneybeeProcessor.from_pretrained(folder)
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    model = HoneybeeForConditionalGeneration.from_pretrained(folder, dtype=dtype, device_map=device_map)
    if device_map is None:
        model.to(device)
    check_processor(model.config, processor)
    return model.eval(), processor


def batches_of_rank(
    questions: list[Question], prompts: dict[str, str], batch_size: int, rank: int, processes: int
) -> list[list[Question]]:
    """The batches of one process. All questions are sorted, longest first, and the processes take batches in turn."""
    ordered = sorted(questions, key=lambda q: (-len(prompts[q.id]), q.image is None))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return batches[rank::processes]


@torch.no_grad()  # and not inference mode: what a model in training keeps from in there could not be trained with
def answer(
    model,
    processor,
    batches: list[list[Question]],
    max_new_tokens: int,
    template: str = "task",
    settings: dict | None = None,
) -> Iterator[list[tuple[Question, str]]]:
    """For each batch its questions with the model's answers. They are greedy, whatever generation settings the checkpoint
    has.

    Args:
        settings: of the processor's call, such as `num_query_tokens`.

    Raises:
        ValueError: an image cannot be read; names the questions of its batch.
    """
    # `generate` takes from here what it is not given: sampling, penalties, beams, minimum lengths.
    own, model.generation_config = model.generation_config, model.greedy_generation_config()
    try:
        for batch in batches:
            inputs = prepare(processor, batch, template, settings or {})
            yield list(zip(batch, _answer_batch(model, processor, inputs, max_new_tokens)))
    finally:
        model.generation_config = own


def prepare(processor, batch: list[Question], template: str, settings: dict) -> BatchFeature:
    """Model inputs of a batch.

    Raises:
        ValueError: as [`answer`].
    """
    try:
        images = [q.image() if callable(q.image) else q.image for q in batch if q.image is not None]
        return processor(
            images=images or None,
            text=[render(q, processor, template) for q in batch],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **settings,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"one of the questions {', '.join(repr(q.id) for q in batch)}: {error}") from error


def _answer_batch(model, processor, inputs: BatchFeature, max_new_tokens: int) -> list[str]:
    ends, pad = model.generation_config.eos_token_id, processor.tokenizer.pad_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), processor.tokenizer.eos_token_id} - {None}
    inputs = inputs.to(next(model.parameters()).device, model.dtype)
    # Under ZeRO-3 transformers would keep the processes in step, which have other questions and a whole model each.
    settings = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": sorted(ends),
        "pad_token_id": pad,
        "synced_gpus": False,
    }
    output = model.generate(**inputs, **settings)
    new = output[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(new, skip_special_tokens=True)
