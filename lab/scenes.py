# SPDX-License-Identifier: Apache-2.0
"""The lab's scenes: digits at free places, with the quickstart's questions, as tensors.

Shapes: S scenes, D digits a scene at most, M visual tokens (a square), T text tokens.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch

from lab.rows import Rows
from training.collator import padded
from training.quickstart.digit_scenes import CELL_NAMES, DIGIT_WORDS, EMPTY, GRID, MAX_DIGITS, SceneMaker
from training.quickstart.stand_ins import make_tokenizer

CELL_PIXELS = 18
SIZE = GRID * CELL_PIXELS
DIGIT_PIXELS = 16
PATCH_PIXELS = 6
NUM_PATCHES = (SIZE // PATCH_PIXELS) ** 2
# Content can be told without knowing where anything is; place cannot ("what" asks what is at a named cell).
GROUPS = {"content": ("exist", "count"), "place": ("what", "where", "leftmost", "topmost")}
KINDS = tuple(kind for group in GROUPS.values() for kind in group)
NO_DIGIT = len(DIGIT_WORDS)

VOCABULARY = make_tokenizer().get_vocab()
BOS, EOS = VOCABULARY["<s>"], VOCABULARY["</s>"]
DIGIT_IDS = torch.tensor([VOCABULARY[word] for word in (*DIGIT_WORDS, EMPTY)])
PLACEHOLDER = len(VOCABULARY)  # stands where a visual token goes; no row of the language model's embedding
CELL_IDS = torch.tensor([VOCABULARY[name] for name in CELL_NAMES])


# Kinds that are slow to learn are asked more often than in the quickstart.
TRAINING_WEIGHTS = {"exist": 0.1, "count": 0.2, "what": 0.2, "where": 0.15, "leftmost": 0.175, "topmost": 0.175}
QUESTIONS_A_ROW = 3


@dataclass
class Scenes:
    """`pixels` (S, SIZE, SIZE) uint8; `digits` (S, D), `NO_DIGIT` where there is none; `cells` (S, D); `centers`
    (S, D, 2), (x, y) in pixels; `contents` as the quickstart's."""

    pixels: np.ndarray
    digits: torch.Tensor
    cells: torch.Tensor
    centers: torch.Tensor
    contents: list[list[int | None]]

    def __len__(self) -> int:
        return len(self.contents)


def make_scenes(split: str, seed: int, number: int) -> Scenes:
    """Scenes whose digits have their centers anywhere in their cells: they lie across the lines of every grid of tokens."""
    maker = SceneMaker(split, seed)
    pixels = np.zeros((number, SIZE, SIZE), dtype=np.uint8)
    digits = torch.full((number, MAX_DIGITS), NO_DIGIT)
    cells = torch.zeros(number, MAX_DIGITS, dtype=torch.long)
    centers = torch.full((number, MAX_DIGITS, 2), -SIZE)
    all_contents = []
    for scene in range(number):
        contents = maker.contents()
        all_contents.append(contents)
        filled = [cell for cell, digit in enumerate(contents) if digit is not None]
        for slot, cell in enumerate(filled):
            x, y = _free_place(cell, centers[scene, :slot].tolist(), maker.random)
            small = maker.random.choice(maker.by_digit[contents[cell]])
            left, top = x - DIGIT_PIXELS // 2, y - DIGIT_PIXELS // 2
            area = pixels[scene, top : top + DIGIT_PIXELS, left : left + DIGIT_PIXELS]
            np.maximum(area, np.kron(small * 15, np.ones((2, 2))).astype(np.uint8), out=area)
            digits[scene, slot], cells[scene, slot] = contents[cell], cell
            centers[scene, slot] = torch.tensor([x, y])
    return Scenes(pixels, digits, cells, centers.float(), all_contents)


def _free_place(cell: int, others: list, draw: random.Random) -> tuple[int, int]:
    """A center in the cell whose digit covers no other by more than its blank margin, as far as a few tries find one."""
    half, gap = DIGIT_PIXELS // 2, DIGIT_PIXELS - 2
    column, row = cell % GRID, cell // GRID
    for _ in range(20):
        x, y = (
            draw.randrange(max(i * CELL_PIXELS, half), min((i + 1) * CELL_PIXELS, SIZE - half + 1))
            for i in (column, row)
        )
        if all(abs(x - a) >= gap or abs(y - b) >= gap for a, b in others):
            break
    return x, y


class Asker(SceneMaker):
    """Questions about scenes that exist already; the same seed asks the same."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)  # all that asking needs; whoever draws scenes loads digits, too

    def conversation(self, contents: list[int | None], questions: int) -> tuple[list[int], list[int]]:
        """(ids, labels) of questions in a row; answers, each with its end, are learned."""
        ids, labels = [], []
        kinds = list(TRAINING_WEIGHTS)
        while questions:
            kind = self.random.choices(kinds, TRAINING_WEIGHTS.values())[0]
            if (asked := self.ask(contents, kind)) is None:
                continue
            words = [VOCABULARY[word] for word in asked[0].split()]
            answer = [VOCABULARY[asked[1]], EOS]
            ids += words + answer
            labels += [-100] * len(words) + answer
            questions -= 1
        return ids, labels


def training_rows(scenes: Scenes, chosen: list[int], seed: str, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `labels` (len(chosen), 1 + M + T): bos, M placeholders, questions with their answers."""
    asker, head = Asker(seed), [BOS] + [PLACEHOLDER] * num_tokens
    rows = [asker.conversation(scenes.contents[scene], QUESTIONS_A_ROW) for scene in chosen]
    ids = padded([head + row[0] for row in rows], EOS)
    return ids, padded([[-100] * len(head) + row[1] for row in rows], -100)


def test_rows(scenes: Scenes, seed: str, num_tokens: int) -> Rows:
    """One question of each kind about each scene. A scene that does not allow a kind (where all its digits are in one
    column, none is the leftmost) goes without it."""
    asker, head = Asker(seed), [BOS] + [PLACEHOLDER] * num_tokens
    ids, labels, images, kinds = [], [], [], []
    for scene, contents in enumerate(scenes.contents):
        for kind in KINDS:
            asked = next(filter(None, (asker.ask(contents, kind) for _ in range(8))), None)
            if asked is not None:
                words = [VOCABULARY[word] for word in asked[0].split()]
                ids.append(head + words + [VOCABULARY[asked[1]]])
                labels.append([-100] * len(head + words) + [VOCABULARY[asked[1]]])
                images.append(scene)
                kinds.append(kind)
    return Rows(padded(ids, EOS), padded(labels, -100), torch.tensor(images), kinds)
