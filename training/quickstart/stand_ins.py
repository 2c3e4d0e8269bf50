# SPDX-License-Identifier: Apache-2.0
"""Tiny stand-ins for the two pretrained backbones, made on the spot because nothing is downloaded.

- The vision tower is a CLIP vision model that has learned which digit each patch belongs to.
- The language model is a Llama that has learned to answer questions about *symbolic* scenes: in front of the question
  stand sixteen embeddings, one a cell, each the sum of the embeddings of a digit's and a cell's name. It has never seen
  an image; what a projector must learn is to say in its embedding space what the tower sees.

The loops here make the stand-ins only. The training of the Honeybee runs through `training/run/launch.py`.
"""

import multiprocessing
import os
from contextlib import suppress

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from processing import HoneybeeProcessor, prepare_tokenizer
from processing.prepare_tokenizer import square_image_processor
from processing.processing_honeybee import SYSTEM_BASE, make_tokenizer_portable
from training.collator import HoneybeeDataCollator
from training.quickstart.digit_scenes import CELL_NAMES, CELL_PIXELS, DIGIT_WORDS, EMPTY, GRID, SceneMaker, vocabulary

WIDTH = 64
PATCH_PIXELS = 8


def vision_config() -> CLIPVisionConfig:
    """Of a tower for scenes in a square of 64 x 64 pixels."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=GRID * CELL_PIXELS,
        patch_size=PATCH_PIXELS,
    )


def make_vision_tower(folder: str, seed: int, steps: int = 400, batch_size: int = 48) -> None:
    """Trains and saves a CLIP vision model that tells the digit (or nothing) behind each patch."""
    torch.manual_seed(seed)
    tower, head = CLIPVisionModel(vision_config()), nn.Linear(WIDTH, len(DIGIT_WORDS) + 1)
    image_processor = square_image_processor(GRID * CELL_PIXELS)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    maker = SceneMaker("train", seed)
    patches_a_cell = CELL_PIXELS // PATCH_PIXELS
    for _ in tqdm(range(steps), desc="Stand-in vision tower"):
        scenes = [maker.scene() for _ in range(batch_size)]
        pixels = image_processor([scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
        cells = torch.tensor([[10 if digit is None else digit for digit in scene.contents] for scene in scenes])
        cells = cells.view(-1, GRID, GRID)
        labels = cells.repeat_interleave(patches_a_cell, 1).repeat_interleave(patches_a_cell, 2).flatten(1)
        # The layer that Honeybee reads, so that the blocks below it are the ones that learn.
        features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        loss = nn.functional.cross_entropy(head(features).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tower.save_pretrained(folder)
    image_processor.save_pretrained(folder)


def make_tokenizer(names: tuple[str, ...] = CELL_NAMES) -> PreTrainedTokenizerFast:
    """One token a word; `names` are those of cells."""
    words = ["<unk>", "<s>", "</s>", *dict.fromkeys([*SYSTEM_BASE.replace(".", " .").split(), "Human", "AI", ":"])]
    words += [word for word in vocabulary(names) if word not in words]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    markers = [decoders.Replace(Regex(f" ?{role} : ?"), f"\n{role}: ") for role in ("Human", "AI")]
    backend.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), *markers])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )


class SymbolicScenes:
    """Batches of symbolic scenes with questions or a caption, in the prompts that Honeybee uses."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.maker = SceneMaker("train", seed + 1)
        processor = HoneybeeProcessor(
            square_image_processor(GRID * CELL_PIXELS), prepare_tokenizer(tokenizer), num_image_tokens=GRID**2
        )
        self.collator = HoneybeeDataCollator(processor)
        self.image_id = processor.image_token_id
        self.digit_ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids([*DIGIT_WORDS, EMPTY]))
        self.cell_ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(CELL_NAMES)))

    def batch(self, size: int, embeddings: nn.Embedding) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`inputs_embeds` (B, T, D), `attention_mask` (B, T), `labels` (B, T)."""
        contents = [self.maker.contents() for _ in range(size)]
        rows = self.collator.tokenize([self.maker.conversation(cells, caption_share=0.2) for cells in contents])
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
        labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        is_cell, mask = ids == self.image_id, (ids != -1).long()
        embeds = embeddings(ids.masked_fill(is_cell | (ids == -1), 0))
        digits = torch.tensor([[10 if digit is None else digit for digit in cells] for cells in contents])
        cells = embeddings(self.digit_ids[digits]) + embeddings(self.cell_ids)  # (B, cells, D)
        return embeds.masked_scatter(is_cell.unsqueeze(-1), cells), mask, labels


@torch.no_grad()
def start_by_looking_up(model: LlamaForCausalLM | OPTForCausalLM) -> None:
    """Heads that start by attending to what is like the query (keys equal queries, slow rotation) and by copying what they
    find (output undoes value) learn to look things up in a minute; usual weights do not."""
    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        output = attention.out_proj if isinstance(model, OPTForCausalLM) else attention.o_proj
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        nn.init.orthogonal_(attention.v_proj.weight)
        output.weight.copy_(attention.v_proj.weight.T)


def make_language_model(folder: str, seed: int, steps: int = 1200, batch_size: int = 32) -> None:
    """Trains and saves a Llama that answers questions about symbolic scenes."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=32,  # the smallest that vLLM's attention on CPUs takes
        max_position_embeddings=256,
        initializer_range=0.1,
        rope_theta=1e6,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    start_by_looking_up(model)
    scenes = SymbolicScenes(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="Stand-in language model"):
        embeds, mask, labels = scenes.batch(batch_size, model.get_input_embeddings())
        loss = model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_tokenizer_portable(folder)


def make_stand_ins(folder: str, seed: int) -> tuple[str, str]:
    """Paths of the vision tower and the language model below `folder`; what is there already is kept.

    A second process makes the tower while this one makes the language model, which takes longer.

    Raises:
        RuntimeError: the second process failed; it has said why.
    """
    vision, text = os.path.join(folder, "vision"), os.path.join(folder, "text")
    second = multiprocessing.get_context("spawn").Process(
        target=_make_vision_tower, args=(vision, seed, torch.get_num_threads()), daemon=True
    )
    missing = [path for path in (vision, text) if not os.path.isfile(os.path.join(path, "config.json"))]
    if vision in missing:
        second.start()
    if text in missing:
        make_language_model(text, seed)
    if vision in missing:
        second.join()
        if second.exitcode:
            raise RuntimeError(f"the stand-in vision tower was not made; its process ended with code {second.exitcode}")
    return vision, text


def _make_vision_tower(folder: str, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    with suppress(KeyboardInterrupt):  # the first process says so
        make_vision_tower(folder, seed)
