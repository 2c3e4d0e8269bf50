# SPDX-License-Identifier: Apache-2.0
"""Models, tokenizers and images small enough to be made in every test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration, projectors_honeybee
from processing import HoneybeeProcessor, prepare_tokenizer, processor_from_vision_text_pretrained
from processing.prepare_tokenizer import square_image_processor
from tests.forked import ENVIRONMENT, TIMEOUT, run_forked

PROJECTORS = tuple(projectors_honeybee.PROJECTORS)
IMAGE_SIZE, PATCH_SIZE = 32, 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
REPOSITORY = Path(__file__).parent.parent
SFT = REPOSITORY / "training" / "sft.py"
# Set by .ci/run: Pythons with other releases of transformers, separated as in PATH.
OTHER_PYTHONS = [python for python in os.environ.get("HONEYBEE_OTHER_PYTHONS", "").split(os.pathsep) if python]
NO_OTHER_PYTHONS = "HONEYBEE_OTHER_PYTHONS names no Pythons with other releases of transformers (.ci/run sets it)"


def projector_settings(projector_type: str, **settings) -> dict:
    tiny = {"hidden_size": 32, "depth": 1, "num_hidden_layers": 2, "num_attention_heads": 4, "num_query_tokens": 4}
    if projector_type in ("linear", "mlp"):
        tiny = {}
    return {"projector_type": projector_type, **tiny, **settings}


def clip_config(**settings) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            **settings,
        }
    )


def llama_config(**settings) -> LlamaConfig:
    # Weights and rope base away from the defaults, so that what is lost on the way shows.
    config = LlamaConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "rope_theta": 50000.0,
            **settings,
        }
    )
    return config


def tiny_config(projector_type: str = "c-abs", *, config: dict | None = None, **settings) -> HoneybeeConfig:
    return HoneybeeConfig(
        clip_config(),
        llama_config(),
        projector_settings(projector_type, **settings),
        **{"image_token_id": 299, **(config or {})},
    )


def tiny_model(projector_type: str = "c-abs", seed: int = 0, **settings) -> HoneybeeForConditionalGeneration:
    torch.manual_seed(seed)
    return HoneybeeForConditionalGeneration(tiny_config(projector_type, **settings)).eval()


def tiny_inputs(model, rows=((5, "image", 7, 8),), seed: int = 0, numbers=None) -> dict[str, torch.Tensor]:
    """Left-padded rows of token ids in which "image" stands for the placeholders of one image. `numbers` are the M of the
    images, where it is not the model's default."""
    config = model.config
    projector = config.projector_config
    left, ids = iter(numbers or ()), []
    for row in rows:
        out = [1]
        for token in row:
            count = next(left, projector.num_query_tokens) + projector.num_eos_tokens if token == "image" else 0
            out += [config.image_token_id] * count if token == "image" else [token]
        ids.append(out)
    width = max(map(len, ids))
    inputs = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
    }
    images = sum(token == "image" for row in rows for token in row)
    if images:
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    if numbers:
        inputs["num_query_tokens"] = torch.tensor(numbers)
    return inputs


def logits_and_gradients(model, batches: list[dict]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Logits of each row without its padding, and the gradient of a sum over rows."""
    model.zero_grad()
    logits = []
    for inputs in batches:
        output = model(**inputs).logits
        mask = inputs.get("attention_mask", torch.ones(output.shape[:2])).bool()
        logits += [row[kept] for row, kept in zip(output, mask)]
    sum(row.sin().mean() for row in logits).backward()
    return logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    """That two results of [`logits_and_gradients`] agree."""
    for ours, theirs in zip(got[0], expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, atol=1e-5, rtol=0, msg=name)


def losses_and_gradients(model, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """Of batches that are one step: the loss, a mean over all that is learned in them, and the gradient."""
    model.zero_grad()
    learned = sum((batch["labels"] != -100).sum() for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=learned).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def word_tokenizer(vocab_size: int = 290) -> PreTrainedTokenizerFast:
    """A sentencepiece-like BPE, the kind that Llama has."""
    from tokenizers import normalizers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = token_decoders.Sequence(
        [token_decoders.Replace("▁", " "), token_decoders.Fuse(), token_decoders.Strip(" ", 1, 0)]
    )
    alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    corpus = ["What is in the picture ? a brown dog The following is a conversation between a curious human"] * 4
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without bos, the kind that Qwen has."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["AI: yes AI: no Human: is it red"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=512
    )


def image_processor():
    return square_image_processor(IMAGE_SIZE)


def tiny_processor(num_image_tokens: int = 4, tokenizer=None, **numbers) -> HoneybeeProcessor:
    tokenizer = prepare_tokenizer(tokenizer or word_tokenizer())
    return HoneybeeProcessor(image_processor(), tokenizer, num_image_tokens=num_image_tokens, **numbers)


# An elastic model: one more visual token an image than its M.
ELASTIC = {"num_query_tokens": 9, "elastic_num_query_tokens": [4, 9, 16], "num_eos_tokens": 1}


def elastic_processor(tokenizer=None) -> HoneybeeProcessor:
    return tiny_processor(10, tokenizer, elastic_num_query_tokens=[4, 9, 16], num_eos_tokens=1)


def save_tiny(folder, elastic: bool = False) -> Path:
    """A model with random weights, and its processor."""
    processor = elastic_processor() if elastic else tiny_processor()
    settings = ELASTIC if elastic else {}
    tiny_model(config={"image_token_id": processor.image_token_id}, **settings).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def picture(seed: int = 0, size: tuple[int, int] = (40, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save_clip(folder) -> str:
    torch.manual_seed(1)
    CLIPVisionModel(clip_config()).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return str(folder)


def save_siglip(folder) -> str:
    torch.manual_seed(1)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return str(folder)


def save_llama(folder) -> str:
    torch.manual_seed(2)
    tokenizer = word_tokenizer()
    LlamaForCausalLM(llama_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_qwen2(folder) -> str:
    """Tied embeddings, and more rows in the embedding than tokens in the tokenizer."""
    torch.manual_seed(2)
    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 10,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        rope_theta=1000000.0,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# A new projector, and what a short run of training/sft.py is given.
NEW_PROJECTOR = {"projector_type": "c-abs", "num_query_tokens": 4, "hidden_size": 32, "depth": 1}
SHORT_RUN = [
    "--per_device_train_batch_size", 2, "--learning_rate", 1e-2, "--bf16", "False", "--report_to", "none",
    "--save_strategy", "no", "--dataloader_pin_memory", "False", "--use_cpu",
]  # fmt: skip


def new_model(root) -> list:
    """Flags of training/sft.py for a new model from the parts in `vision` and `text`."""
    parts = ["--vision_model", root / "vision", "--text_model", root / "text"]
    return [*parts, "--projector", json.dumps(NEW_PROJECTOR)]


def save_joined(root) -> None:
    """Pretrained parts in `vision` and `text`, and in `model` the model that they make, with its processor."""
    vision, text = save_clip(root / "vision"), save_llama(root / "text")
    model = HoneybeeForConditionalGeneration.from_vision_text_pretrained(vision, text, **NEW_PROJECTOR)
    model.save_pretrained(root / "model")
    processor_from_vision_text_pretrained(vision, text, 4).save_pretrained(root / "model")


def run_script(*arguments, python: str = sys.executable, cwd=None, check: bool = True, env=None):
    """Runs a Python file or module as a user would; its output is in `.stdout`."""
    arguments = list(map(str, arguments))
    if arguments[0] == str(SFT) and python == sys.executable and not env:
        result = run_forked(arguments, cwd)
    else:
        result = subprocess.run(
            [python, *arguments],
            cwd=cwd,
            env={**os.environ, **ENVIRONMENT, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
    assert not check or result.returncode == 0, result.stdout[-4000:]
    return result


def sample(index: int, image: bool = True, images: int = 1) -> dict:
    """A row of a dataset in conversational format."""
    content = [{"type": "image"}] * images if image else []
    return {
        "messages": [
            {"role": "user", "content": [*content, {"type": "text", "text": f"What is {index}?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"a brown dog {index}"}]},
        ],
        "images": [f"images/{index}.png"] * images if image else [],
    }


def write_dataset(folder: Path, samples: list[dict]) -> Path:
    """The rows as `data.jsonl`, and the pictures that they name."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for row in samples:
        for image in row["images"]:
            if not image.startswith("images/no_such"):
                picture(len(image)).save(folder / image)
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in samples))
    return path
