# SPDX-License-Identifier: Apache-2.0
"""The lab's two pretrained parts, which nobody trains again: vision towers that know which digit a patch belongs to and
where its center is, and a language model that answers questions about symbolic scenes of every length.

Shapes: B scenes of a batch, D digits a scene at most, N patches, M visual tokens, D_v and D_lm the two widths.
"""

import math
import os
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lab.loop import train, write_whole
from lab.scenes import (
    BOS,
    CELL_IDS,
    CELL_PIXELS,
    DIGIT_IDS,
    DIGIT_PIXELS,
    EOS,
    NO_DIGIT,
    NUM_PATCHES,
    PATCH_PIXELS,
    PLACEHOLDER,
    SIZE,
    VOCABULARY,
    Scenes,
    training_rows,
)
from training.quickstart.digit_scenes import GRID
from training.quickstart.stand_ins import start_by_looking_up

WIDTH = 64
TOWERS = {"clip": (CLIPVisionConfig, CLIPVisionModel), "siglip": (SiglipVisionConfig, SiglipVisionModel)}
SIDES = range(2, 13)  # of the square of visual tokens; one after the other, so that all are seen equally often
FORMS = ("slots", "map", "hard")


def tower_config(kind: str):
    """Two blocks, all of which Honeybee reads."""
    return TOWERS[kind][0](
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH_PIXELS,
    )


class Tower(nn.Module):
    """A vision tower whose patches are made by four convolutions that overlap; with one convolution of a patch, towers as
    small as this learn in hours what they learn so in a minute."""

    def __init__(self, kind: str):
        super().__init__()
        config = tower_config(kind)
        self.tower = TOWERS[kind][1](config)
        stem = nn.Sequential(
            nn.Conv2d(3, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, WIDTH, 5, stride=PATCH_PIXELS // 2, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        )
        stem.weight = stem[0].weight  # whose dtype the embeddings ask for
        getattr(self.tower, "vision_model", self.tower).embeddings.patch_embedding = stem

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, SIZE, SIZE) uint8 -> patch features (B, N, D_v), without the class token where there is one."""
        pixels = ((pixels.float() / 255 - 0.1) / 0.3).unsqueeze(1).expand(-1, 3, -1, -1)
        return self.tower(pixels, output_hidden_states=True).hidden_states[-1][:, -NUM_PATCHES:]


def patch_labels(scenes: Scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each patch's center: the digit (S, N) that it lies in, and the offset (S, N, 2) from the digit's center, in
    halves of a digit."""
    side = torch.arange(SIZE // PATCH_PIXELS) * PATCH_PIXELS + PATCH_PIXELS / 2
    patches = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1).view(-1, 1, 2)
    offsets = patches - scenes.centers.unsqueeze(1)  # (S, N, D, 2)
    distance, nearest = offsets.abs().amax(-1).min(-1)
    digits = scenes.digits.gather(1, nearest).masked_fill(distance > DIGIT_PIXELS / 2, NO_DIGIT)
    index = nearest[..., None, None].expand(-1, -1, 1, 2)
    return digits, offsets.gather(2, index).squeeze(2) / (DIGIT_PIXELS / 2)


def one_cycle(steps: int, warmup: float = 0.1):
    """Share of the learning rate by step: a linear rise, then a cosine to 0."""

    def share(step: int) -> float:
        done = step / steps
        return done / warmup + 0.04 if done < warmup else 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))

    return share


def train_part(
    modules: nn.ModuleDict,
    rate: float,
    loss_at: Callable[[int], torch.Tensor],
    steps: int,
    path: str,
    save: Callable[[], None],
) -> None:
    """Trains a stand-in, or what is left of it, and saves it: `path` is where, and beside it is what goes on after a stop."""
    state = path + ".state"
    train(modules, rate, one_cycle(steps), loss_at, steps, range(100, steps, 100), lambda *_: None, state)
    save()
    os.remove(state)


def _train_and_save(modules: nn.ModuleDict, loss_at: Callable[[int], torch.Tensor], steps: int, path: str) -> None:
    """Writes the weights of the module `part` to `path`."""
    save = partial(write_whole, path, lambda part: torch.save(modules["part"].state_dict(), part))
    train_part(modules, 3e-3, loss_at, steps, path, save)


def make_tower(kind: str, scenes: Scenes, seed: int, steps: int, path: str, batch_size: int = 40) -> None:
    """Trains a tower and writes its weights to `path`."""
    torch.manual_seed(seed)
    modules = nn.ModuleDict({"part": Tower(kind), "head": nn.Linear(WIDTH, NO_DIGIT + 1 + 2)})
    digits, offsets = patch_labels(scenes)
    pixels = torch.from_numpy(scenes.pixels)

    def loss_at(step: int) -> torch.Tensor:
        rows = torch.from_numpy(np.random.default_rng((seed, step)).integers(len(scenes), size=batch_size))
        said = modules["head"](modules["part"](pixels[rows]))
        inside = digits[rows] != NO_DIGIT
        loss = F.cross_entropy(said[..., :-2].flatten(0, 1), digits[rows].flatten())
        return loss + F.mse_loss(said[..., -2:][inside], offsets[rows][inside])

    _train_and_save(modules, loss_at, steps, path)


@torch.inference_mode()
def tower_features(kind: str, path: str, scenes: Scenes) -> torch.Tensor:
    """(S, N, D_v) float16."""
    tower = Tower(kind).eval()
    tower.load_state_dict(torch.load(path, weights_only=True))
    return torch.cat([tower(pixels).half() for pixels in torch.from_numpy(scenes.pixels).split(100)])


def language_model_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.1,
        rope_theta=1e6,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
    )


def _coverage(centers: torch.Tensor, side: int) -> torch.Tensor:
    """(B, D) centers along one axis -> (B, D, side) share of each window that a digit covers."""
    width = SIZE / side
    left = torch.arange(side) * width
    centers, half = centers.unsqueeze(-1), DIGIT_PIXELS / 2
    covered = torch.minimum(centers + half, left + width) - torch.maximum(centers - half, left)
    return covered.clamp(min=0) / width


def symbols(
    scenes: Scenes, rows: torch.Tensor, side: int, form: str, embeddings: nn.Embedding, draw: torch.Generator
) -> torch.Tensor:
    """Symbolic visual tokens (B, side * side, D_lm): sums of the embeddings of digits and of the cells that they are in.

    Args:
        form: `slots`: each digit in a place of its own, drawn by chance; `map`: in each window of the grid the digits that
            it covers, by share; `hard`: the digit that it covers most.
    """
    centers, digits = scenes.centers[rows], scenes.digits[rows]
    here, nothing = digits != NO_DIGIT, embeddings(DIGIT_IDS[NO_DIGIT])
    names = embeddings(DIGIT_IDS[digits]) + embeddings(CELL_IDS[scenes.cells[rows]])  # (B, D, D_lm)
    if form == "slots":
        places = torch.rand(len(rows), max(side**2, digits.shape[1]), generator=draw).argsort(1)
        share = F.one_hot(places[:, : digits.shape[1]] % side**2, side**2) * here.unsqueeze(-1)
        share, nothing = share.transpose(1, 2).float(), nothing.expand(side**2, -1)
    else:
        share = _coverage(centers[..., 1], side).unsqueeze(-1) * _coverage(centers[..., 0], side).unsqueeze(-2)
        share = (share.flatten(2) * here.unsqueeze(-1)).transpose(1, 2)  # (B, M, D)
        share = share / share.amax(1, keepdim=True).clamp(min=1e-6)
        if form == "hard":
            share = ((share == share.amax(-1, keepdim=True)) & (share > 0.3)).float()
        share = share / share.sum(-1, keepdim=True).clamp(min=1)
        middle = ((torch.arange(side) + 0.5) * SIZE / side // CELL_PIXELS).long()
        cells = (middle.unsqueeze(1) * GRID + middle).flatten()
        nothing = nothing + embeddings(CELL_IDS[cells])
    return share @ names + (1 - share.sum(-1, keepdim=True)).clamp(min=0) * nothing


def make_language_model(scenes: Scenes, seed: int, steps: int, path: str, batch_size: int = 32) -> None:
    """Trains a Llama on symbolic scenes and writes its weights to `path`. It never sees a picture."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(language_model_config())
    start_by_looking_up(model)
    embeddings = model.get_input_embeddings()

    def loss_at(step: int) -> torch.Tensor:
        draw = random.Random(f"language model {seed} {step}")
        noise = torch.Generator().manual_seed(draw.randrange(2**31))
        side, form = SIDES[step % len(SIDES)], draw.choice(FORMS)
        rows = torch.randint(len(scenes), (batch_size,), generator=noise)
        ids, labels = training_rows(scenes, rows.tolist(), f"language model {seed} {step}", side**2)
        seen = symbols(scenes, rows, side, form, embeddings, noise)
        # Projectors speak as loudly as they like, and not as cleanly.
        seen = seen * (0.7 + 0.6 * torch.rand(1, generator=noise))
        seen = seen + 0.1 * seen.detach().std() * torch.randn(seen.shape, generator=noise)
        visual = ids == PLACEHOLDER
        embeds = embeddings(ids.masked_fill(visual, EOS)).masked_scatter(visual.unsqueeze(-1), seen)
        hidden = model.model(inputs_embeds=embeds).last_hidden_state[:, :-1]
        learned = labels[:, 1:] != -100
        return F.cross_entropy(model.lm_head(hidden[learned]), labels[:, 1:][learned])

    _train_and_save(nn.ModuleDict({"part": model}), loss_at, steps, path)


def load_language_model(path: str) -> LlamaForCausalLM:
    """The trained model, frozen."""
    model = LlamaForCausalLM(language_model_config())
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval().requires_grad_(False)
