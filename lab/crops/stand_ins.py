# SPDX-License-Identifier: Apache-2.0
"""The two pretrained parts of the experiment with crops.

- The vision tower, of CLIP's kind, has learned which digit a patch holds: in squares with small digits, as crops are, and in
  whole scenes that were squeezed, with small and with large digits.
- The language model answers questions about symbolic scenes. A crop does not say where it comes from, so that it has learned
  two kinds of scenes: *named* symbols, each with the name of its cell, in any order, and *ordered* ones without names, where
  the place in the row says which cell it is. It is an OPT: with positions that are learned, the place of a symbol is
  looked up like a name.

Shapes: B scenes of a batch, T tokens, M symbols a scene, N patches, D width.
"""

import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel, OPTConfig, OPTForCausalLM

from lab.crops.scenes import GRID_OF, GRIDS, LARGE_DIGIT_PIXELS, NAMES, SIDE, LargeScenes, squeezed
from lab.loop import write_text
from lab.stand_ins import train_part
from processing import HoneybeeProcessor, prepare_tokenizer
from processing.prepare_tokenizer import square_image_processor
from processing.processing_honeybee import make_tokenizer_portable
from training.collator import HoneybeeDataCollator, padded
from training.quickstart.digit_scenes import DIGIT_WORDS, EMPTY, cell_names
from training.quickstart.stand_ins import PATCH_PIXELS, WIDTH, make_tokenizer, start_by_looking_up, vision_config

READER_WIDTH = 96
RATE = 2e-3  # of learning, of both
NOTHING, UNREADABLE = 10, 11  # beside the ten digits
PIECES = 4  # of a batch of conversations
FILLED = 0.5  # of the cells, in the squares that the tower learns from
# Visual tokens of a symbolic scene: named (how many), or ordered (how many a cell, how many named ones behind them).
NAMED, ORDERED = (16, 25), ((1, 0), (4, 0), (1, 9))


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- the vision tower


def _labels(contents: list[int | None], middles: dict, scale: tuple[float, float], pixels: int) -> np.ndarray:
    """(N,) the digit whose middle a patch holds, `NOTHING`, or -100 where another digit reaches into it."""
    side = SIDE // PATCH_PIXELS
    labels, left = np.full((side, side), NOTHING), np.arange(side) * PATCH_PIXELS
    across, down = (pixels / 2 * each for each in scale)
    middles = {cell: (x * scale[0], y * scale[1]) for cell, (x, y) in middles.items()}
    for x, y in middles.values():
        columns = (x + across > left) & (x - across < left + PATCH_PIXELS)
        rows = (y + down > left) & (y - down < left + PATCH_PIXELS)
        labels[np.ix_(rows, columns)] = -100
    for cell, (x, y) in middles.items():
        labels[int(y) // PATCH_PIXELS, int(x) // PATCH_PIXELS] = contents[cell]
    return labels.ravel()


def tower_squares(seed: int, number: int, split: str = "train") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By kind, squares (n, SIDE, SIDE) uint8 and the labels (n, N) of their patches."""
    small, large = LargeScenes(split, seed), LargeScenes(split, seed, LARGE_DIGIT_PIXELS)

    def draw(maker: LargeScenes, columns: int, rows: int, side: int):
        filled = [maker.random.random() < FILLED for _ in range(columns * rows)]
        contents = [maker.random.randrange(10) if each else None for each in filled]
        picture, middles = maker.place(contents, columns, rows, side)
        scale = (SIDE / picture.width, SIDE / picture.height)
        return np.asarray(squeezed(picture)), _labels(contents, middles, scale, maker.pixels)

    kinds = {
        "crops": (0.6, lambda: draw(small, 2, 2, SIDE // 2)),
        "crops of one digit": (0.1, lambda: draw(small, 1, 1, SIDE)),
        "squeezed": (0.2, lambda: draw(small, *small.random.choice(GRIDS), SIDE)),
        "squeezed, large digits": (0.1, lambda: draw(large, *large.random.choice(GRIDS), SIDE)),
    }
    found = {}
    for kind, (share, draw_one) in kinds.items():
        drawn = [draw_one() for _ in range(int(share * number))]
        found[kind] = tuple(np.stack(column) for column in zip(*drawn))
    return found


def make_tower(folder: str, seed: int, steps: int, squares: int, batch_size: int = 128) -> None:
    """Trains and saves a CLIP vision model."""
    torch.manual_seed(seed)
    head = nn.Linear(WIDTH, NOTHING + 1)
    modules = nn.ModuleDict({"tower": CLIPVisionModel(vision_config()), "head": head}).to(device())
    pixels, labels = (np.concatenate(each) for each in zip(*tower_squares(seed, squares).values()))
    pixels, labels = torch.from_numpy(pixels).to(device()), torch.from_numpy(labels).to(device())
    image_processor = square_image_processor(SIDE)

    def loss_at(step: int) -> torch.Tensor:
        rows = torch.from_numpy(np.random.default_rng((seed, step)).integers(len(pixels), size=batch_size))
        said = head(tower_features(modules["tower"], pixels[rows], image_processor))
        return F.cross_entropy(said.flatten(0, 1), labels[rows].flatten())

    def save() -> None:
        image_processor.save_pretrained(folder)
        torch.save(head.cpu().state_dict(), os.path.join(folder, "head.pt"))
        modules["tower"].cpu().save_pretrained(folder)

    os.makedirs(folder, exist_ok=True)
    train_part(modules, RATE, loss_at, steps, folder, save)


def tower_features(tower: CLIPVisionModel, squares: torch.Tensor, image_processor) -> torch.Tensor:
    """(B, SIDE, SIDE) uint8 -> (B, N, D) of the layer that Honeybee reads."""
    mean, std = (
        torch.tensor(each, device=squares.device).view(3, 1, 1)
        for each in (image_processor.image_mean, image_processor.image_std)
    )
    pixels = (squares.float().div(255).unsqueeze(1) - mean) / std
    return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


@torch.inference_mode()
def tower_reads(folder: str, seed: int, number: int, split: str) -> dict[str, float]:
    """By kind of square, the share of digits that the tower reads right."""
    tower, head = CLIPVisionModel.from_pretrained(folder).eval(), nn.Linear(WIDTH, NOTHING + 1)
    head.load_state_dict(torch.load(os.path.join(folder, "head.pt"), weights_only=True))
    read = {}
    for kind, (squares, labels) in tower_squares(seed, number, split).items():
        features = tower_features(tower, torch.from_numpy(squares), square_image_processor(SIDE))
        right, digits = head(features).argmax(-1).numpy() == labels, (labels >= 0) & (labels < NOTHING)
        read[kind] = float(right[digits].mean())
    return read


# --- the language model


class SymbolicScenes:
    """Symbolic scenes with questions or a caption, in the prompts that Honeybee uses.

    Args:
        number: of scenes, each of which is seen in many forms.
    """

    def __init__(self, tokenizer, split: str, seed: int, number: int):
        maker = LargeScenes(split, seed)
        processor = HoneybeeProcessor(square_image_processor(SIDE), prepare_tokenizer(tokenizer), num_image_tokens=1)
        self.image_id, ids_of = processor.image_token_id, processor.tokenizer.convert_tokens_to_ids
        self.digit_ids = torch.tensor(ids_of([*DIGIT_WORDS, EMPTY]))
        self.name_ids = {cells: np.array(ids_of(list(cell_names(*grid)))) for cells, grid in GRID_OF.items()}
        self.contents, self.rows, collator = [], [], HoneybeeDataCollator(processor)
        while len(self.rows) < number:
            contents = [maker.contents() for _ in range(min(100, number - len(self.rows)))]
            self.rows += collator.tokenize([maker.conversation(cells, caption_share=0.2) for cells in contents])
            self.contents += [np.array([NOTHING if digit is None else digit for digit in cells]) for cells in contents]

    def symbols(self, contents: np.ndarray, form: int | tuple[int, int], draw: np.random.Generator):
        """(M,) digits, `NOTHING` or `UNREADABLE`, and (M,) ids of names of cells, 0 for none."""
        names = self.name_ids[len(contents)]
        if isinstance(form, int):
            places = draw.permutation(form)[: len(contents)]
            if draw.random() < 0.5:
                places.sort()
            return self._named(form, places, contents, names)
        each, behind = form
        digits = np.full((len(contents), each), NOTHING)
        digits[np.arange(len(contents)), draw.integers(each, size=len(contents))] = contents
        ids = np.zeros(digits.size, dtype=int)
        if not behind:
            return digits.ravel(), ids
        filled = np.flatnonzero(contents != NOTHING)
        places = draw.permutation(behind)[: len(filled)]
        # Half of them do not say which digits they are: an overview is what cannot be read.
        said = contents[filled] if draw.random() < 0.5 else np.full(len(filled), UNREADABLE)
        whole, whole_ids = self._named(behind, places, said, names[filled])
        return np.concatenate([digits.ravel(), whole]), np.concatenate([ids, whole_ids])

    @staticmethod
    def _named(number: int, places: np.ndarray, said: np.ndarray, names: np.ndarray):
        digits, ids = np.full(number, NOTHING), np.zeros(number, dtype=int)
        digits[places], ids[places] = said, names
        return digits, ids

    def length(self, row: int, form: int | tuple[int, int]) -> int:
        """Tokens, less the one that the symbols replace."""
        symbols = form if isinstance(form, int) else form[0] * len(self.contents[row]) + form[1]
        return len(self.rows[row]["input_ids"]) + symbols - 1

    def batch(self, rows, forms: list, draw: np.random.Generator, embeddings: nn.Embedding, noise: float = 0.1):
        """`inputs_embeds` (B, T, D), `attention_mask` (B, T), `labels` (B, T)."""
        symbols = [self.symbols(self.contents[row], form, draw) for row, form in zip(rows, forms)]
        ids, labels = [], []
        for row, (digits, _) in zip(rows, symbols):
            own, learned = self.rows[row]["input_ids"], self.rows[row]["labels"]
            place, number = own.index(self.image_id), len(digits)
            ids.append(own[:place] + [self.image_id] * number + own[place + 1 :])
            labels.append(learned[:place] + [-100] * number + learned[place + 1 :])
        table = embeddings.weight
        ids, labels = padded(ids, -1).to(table.device), padded(labels, -100).to(table.device)
        digits, names = (torch.from_numpy(np.concatenate(each)).to(table.device) for each in zip(*symbols))
        said = torch.cat([table[self.digit_ids.to(table.device)], torch.zeros_like(table[:1])])[digits]
        said = said + table[names] * (names > 0).unsqueeze(-1)
        said = said + noise * said.detach().std() * torch.randn_like(said)  # projectors do not speak as cleanly
        is_symbol, mask = ids == self.image_id, (ids != -1).long()
        embeds = embeddings(ids.masked_fill(is_symbol | (ids == -1), 0))
        return embeds.masked_scatter(is_symbol.unsqueeze(-1), said), mask, labels


def make_reader(folder: str, seed: int, steps: int, scenes: int, batch_size: int = 64) -> None:
    """Trains and saves an OPT that answers questions about symbolic scenes. It never sees a picture."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(NAMES)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=READER_WIDTH,
        word_embed_proj_dim=READER_WIDTH,
        ffn_dim=2 * READER_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        dropout=0.0,
        init_std=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = OPTForCausalLM(config)
    start_by_looking_up(model)
    model.to(device())
    symbolic = SymbolicScenes(make_tokenizer(NAMES), "train", seed, scenes)

    def loss_at(step: int) -> torch.Tensor:
        draw = np.random.default_rng((seed, step))
        forms = [(*NAMED, *ORDERED)[each] for each in draw.integers(len(NAMED) + len(ORDERED), size=batch_size)]
        rows = draw.integers(scenes, size=batch_size)
        hidden, learned = [], []
        # In pieces of like lengths, which are from 60 to 140: half of a whole batch would be padding.
        order = np.argsort([symbolic.length(row, form) for row, form in zip(rows, forms)], kind="stable")
        for piece in np.array_split(order, PIECES):
            embeds, mask, labels = symbolic.batch(
                rows[piece], [forms[each] for each in piece], draw, model.get_input_embeddings()
            )
            counts = labels[:, 1:] != -100
            hidden.append(model.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[:, :-1][counts])
            learned.append(labels[:, 1:][counts])
        return F.cross_entropy(model.lm_head(torch.cat(hidden)), torch.cat(learned))

    def save() -> None:
        tokenizer.save_pretrained(folder)
        make_tokenizer_portable(folder)
        model.cpu().save_pretrained(folder)

    os.makedirs(folder, exist_ok=True)
    train_part(nn.ModuleDict({"reader": model}), RATE, loss_at, steps, folder, save)


@torch.inference_mode()
def reader_answers(folder: str, seed: int, number: int, split: str) -> dict[str, float]:
    """By form of the symbols, the share of conversations in which every word of the answers is right, each after the right
    ones before it."""
    model, draw = OPTForCausalLM.from_pretrained(folder).eval(), np.random.default_rng(seed)
    symbolic, found = SymbolicScenes(make_tokenizer(NAMES), split, seed, number), {}
    for form in (*NAMED, *ORDERED):
        right = 0
        for rows in np.array_split(np.arange(number), max(1, number // 100)):
            embeds, mask, labels = symbolic.batch(rows, [form] * len(rows), draw, model.get_input_embeddings())
            labels = labels[:, 1:]
            said = model(inputs_embeds=embeds, attention_mask=mask).logits[:, :-1].argmax(-1)
            right += int(((said == labels) | (labels == -100)).all(1).sum())
        found[f"{form} named" if isinstance(form, int) else f"{form[0]} a cell, {form[1]} named behind"] = (
            right / number
        )
    return found


def check_parts(folder: str, reader: str, seed: int, split: str, number: int) -> None:
    """Writes what the tower of a seed and the language model know, asked about `number` squares and conversations, to
    `parts_path`."""
    found = {
        "tower": tower_reads(os.path.join(folder, "tower"), seed, number, split),
        "reader": reader_answers(reader, seed, number, split),
    }
    write_text(parts_path(folder, split), json.dumps(found))


def parts_path(folder: str, split: str) -> str:
    return os.path.join(folder, f"parts-{split}.json")
