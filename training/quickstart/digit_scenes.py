# SPDX-License-Identifier: Apache-2.0
"""Digit scenes: pictures of handwritten digits on a grid, with questions about what is where.

The digits are scikit-learn's bundled set (1,797 real handwritten digits, 8 x 8 pixels). The first 1,200 make training
scenes, the next 150 the scenes that choices are made on, and the rest those of the one final test.
"""

import random
import string
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

GRID = 4
CELL_PIXELS = 16
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EMPTY = "nothing"
SPLITS = {"train": slice(0, 1200), "validation": slice(1200, 1350), "test": slice(1350, None)}
MAX_DIGITS = 6
QUESTIONS_A_SCENE = 4  # in a training conversation; tests ask one
# How often each kind is asked. Kinds with two possible answers are rare, so that guessing does not pay.
QUESTION_WEIGHTS = {"what": 0.30, "where": 0.25, "count": 0.15, "exist": 0.10, "leftmost": 0.10, "topmost": 0.10}


def cell_names(columns: int, rows: int) -> tuple[str, ...]:
    """`a1`, `b1` and so on, in reading order."""
    return tuple(f"{column}{row}" for row in range(1, rows + 1) for column in string.ascii_lowercase[:columns])


CELL_NAMES = cell_names(GRID, GRID)


@dataclass
class Scene:
    """`contents[i]` is the digit in the cell with the i-th of the scene's names, or None."""

    contents: list[int | None]
    image: Image.Image


class SceneMaker:
    """Draws scenes and questions of one split; the same seed gives the same sequence."""

    def __init__(self, split: str, seed: int):
        digits = load_digits()
        images, labels = digits.images[SPLITS[split]], digits.target[SPLITS[split]]
        self.by_digit = [images[labels == digit] for digit in range(10)]
        self.random = random.Random(f"{split} {seed}")

    def grid(self, contents: list[int | None]) -> tuple[int, int]:
        """Columns and rows of a scene."""
        return GRID, GRID

    def names(self, contents: list[int | None]) -> tuple[str, ...]:
        """Of its cells."""
        return cell_names(*self.grid(contents))

    def contents(self, number: int = GRID**2) -> list[int | None]:
        """Of so many cells."""
        cells: list[int | None] = [None] * number
        for cell in self.random.sample(range(number), self.random.randint(2, MAX_DIGITS)):
            cells[cell] = self.random.randrange(10)
        return cells

    def draw(self, contents: list[int | None]) -> Image.Image:
        """64 x 64 RGB, each digit at twice its size in its cell."""
        picture = np.zeros((GRID * CELL_PIXELS, GRID * CELL_PIXELS), dtype=np.uint8)
        for cell, digit in enumerate(contents):
            if digit is None:
                continue
            small = self.by_digit[digit][self.random.randrange(len(self.by_digit[digit]))]
            top, left = (cell // GRID) * CELL_PIXELS, (cell % GRID) * CELL_PIXELS
            picture[top : top + CELL_PIXELS, left : left + CELL_PIXELS] = np.kron(small * 15, np.ones((2, 2)))
        return Image.fromarray(picture).convert("RGB")

    def scene(self) -> Scene:
        contents = self.contents()
        return Scene(contents, self.draw(contents))

    def question(self, contents: list[int | None], kind: str | None = None) -> tuple[str, str, str]:
        """(kind, question, answer); `kind` is drawn by weight, and again where the scene does not allow it."""
        while True:
            chosen = kind or self.random.choices(list(QUESTION_WEIGHTS), QUESTION_WEIGHTS.values())[0]
            asked = self.ask(contents, chosen)
            if asked is not None:
                return chosen, *asked

    def conversation(self, contents: list[int | None], caption_share: float) -> tuple[list[dict], str]:
        """(messages, chat template): the caption, or `QUESTIONS_A_SCENE` questions about one image in a row."""
        image = {"type": "image", "text": None}

        def says(role, text, *before):
            return {"role": role, "content": [*before, {"type": "text", "text": text}]}

        if self.random.random() < caption_share:
            return [
                {"role": "user", "content": [image]},
                says("assistant", caption(contents, self.names(contents))),
            ], "caption"
        messages = []
        for turn in range(QUESTIONS_A_SCENE):
            _, question, answer = self.question(contents)
            messages += [says("user", question, *([image] if turn == 0 else [])), says("assistant", answer)]
        return messages, "default"

    def ask(self, contents: list[int | None], kind: str) -> tuple[str, str] | None:
        """(question, answer) of a kind; None where the scene does not allow one."""
        draw, names, (columns, _) = self.random, self.names(contents), self.grid(contents)
        filled = [cell for cell, digit in enumerate(contents) if digit is not None]
        unique = [cell for cell in filled if contents.count(contents[cell]) == 1]

        def word(cell):
            return DIGIT_WORDS[contents[cell]]

        if kind == "what":
            empty = [cell for cell, digit in enumerate(contents) if digit is None]
            cell = draw.choice(empty if draw.random() < 0.15 else filled)
            return f"what is at {names[cell]} ?", EMPTY if contents[cell] is None else word(cell)
        if kind == "where" and unique:
            cell = draw.choice(unique)
            return f"where is the {word(cell)} ?", names[cell]
        if kind == "count":
            return "how many digits are there ?", DIGIT_WORDS[len(filled)]
        if kind == "exist":
            absent = [digit for digit in range(10) if digit not in contents]
            present = draw.random() < 0.5
            digit = contents[draw.choice(filled)] if present else draw.choice(absent)
            return f"is there a {DIGIT_WORDS[digit]} ?", "yes" if present else "no"
        if kind in ("leftmost", "topmost") and len(unique) >= 2:
            first, second = draw.sample(unique, 2)
            place = [cell % columns if kind == "leftmost" else cell // columns for cell in (first, second)]
            if place[0] != place[1]:
                answer = word(first if place[0] < place[1] else second)
                return f"which is {kind} , the {word(first)} or the {word(second)} ?", answer
        return None


def caption(contents: list[int | None], names: tuple[str, ...] = CELL_NAMES) -> str:
    """All digits in reading order: `five at b1 , two at a3`."""
    named = [f"{DIGIT_WORDS[digit]} at {names[i]}" for i, digit in enumerate(contents) if digit is not None]
    return " , ".join(named)


def vocabulary(names: tuple[str, ...] = CELL_NAMES) -> list[str]:
    """Every word of captions, questions and answers about cells with these names."""
    words = "what is at ? where the how many digits are there a which leftmost topmost , or yes no"
    return [*dict.fromkeys([*words.split(), EMPTY, *DIGIT_WORDS, *names])]
