# SPDX-License-Identifier: Apache-2.0
"""Digit scenes as a task of the lab, with the stand-ins that belong to a seed."""

import math
import os
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import torch

from lab.experiment import Task, evaluate
from lab.loop import write_whole
from lab.plan import Preset
from lab.rows import SPLITS, Rows
from lab.scenes import NO_DIGIT, PLACEHOLDER, Scenes, make_scenes, test_rows, training_rows
from lab.stand_ins import (
    language_model_config,
    load_language_model,
    make_language_model,
    make_tower,
    symbols,
    tower_config,
    tower_features,
)

SCOPE = """\
Digit scenes of 72 x 72 pixels, 144 patches; the digits lie across the lines of every grid of tokens. The tower and the
language model are small stand-ins that stay as they are; only the projector learns. What is found here is found about these
scenes: it says what a projector makes easy to learn, not how it ranks at 7B on real pictures."""


def scene_tasks(preset: Preset, first_seed: int, folder: str) -> list["SceneTask"]:
    """Those of a run: for each seed and tower one; the first has the first of both."""
    sizes = preset.images, preset.tower_steps, preset.language_model_steps
    return [
        SceneTask(folder, tower, seed, seed if preset.own_stand_ins else first_seed, *sizes)
        for seed in range(first_seed, first_seed + preset.seeds)
        for tower in preset.towers
    ]


@lru_cache(maxsize=8)
def _scenes(split: str, seed: int, number: int) -> Scenes:
    return make_scenes(split, seed, number)


@dataclass(frozen=True)
class SceneTask(Task):
    """
    Args:
        folder: of stand-ins and features; what is there is not made again.
        tower: `clip` or `siglip`.
        seed: of projectors and of the order of the data.
        stand_ins: seed of the scenes and stand-ins.
        scenes: how many of `train`, `validation` and `test`.
        tower_steps, language_model_steps: how long the stand-ins are trained.
    """

    folder: str = field(repr=False)
    tower: str
    seed: int
    stand_ins: int
    scenes: tuple[int, ...]
    tower_steps: int
    language_model_steps: int

    placeholder = PLACEHOLDER

    @property
    def images(self) -> int:
        return self.stand_ins

    def _path(self, name: str) -> str:
        """Of a file, whose name has all the settings that it follows from."""
        settings = f"seed{self.stand_ins}-{'-'.join(map(str, self.scenes))}"
        if name == "language_model":
            return os.path.join(self.folder, f"{settings}-language_model{self.language_model_steps}.pt")
        return os.path.join(self.folder, f"{settings}-{self.tower}{self.tower_steps}{name}.pt")

    def _scenes(self, split: str) -> Scenes:
        return _scenes(split, self.stand_ins, self.scenes[SPLITS.index(split)])

    def preparations(self) -> dict:
        return {self._path("language_model"): self._make_language_model, self._path("-test"): self._make_tower}

    def _make_language_model(self) -> None:
        path = self._path("language_model")
        if not os.path.isfile(path):
            os.makedirs(self.folder, exist_ok=True)
            make_language_model(self._scenes("train"), self.stand_ins, self.language_model_steps, path)

    def _make_tower(self) -> None:
        """And the features of all splits."""
        os.makedirs(self.folder, exist_ok=True)
        if not os.path.isfile(self._path("")):
            make_tower(self.tower, self._scenes("train"), self.stand_ins, self.tower_steps, self._path(""))
        for split in SPLITS:
            if not os.path.isfile(self._path(f"-{split}")):
                features = tower_features(self.tower, self._path(""), self._scenes(split))
                write_whole(self._path(f"-{split}"), partial(torch.save, features))

    def check(self) -> None:
        """Everything is made here, so nothing can be missing."""

    def configs(self) -> tuple:
        return tower_config(self.tower), language_model_config()

    def language_model(self):
        return load_language_model(self._path("language_model"))

    def features(self, split: str) -> torch.Tensor:
        return torch.load(self._path(f"-{split}"), weights_only=True, mmap=True)

    def batch(self, step: int, size: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen = np.random.default_rng((self.seed, step)).integers(self.scenes[0], size=size)
        ids, labels = training_rows(self._scenes("train"), chosen.tolist(), f"{self.seed} {step}", num_tokens)
        return ids, labels, torch.from_numpy(chosen)

    def rows(self, split: str, num_tokens: int) -> Rows:
        return test_rows(self._scenes(split), f"{split} {self.stand_ins}", num_tokens)

    def ceiling(self, num_tokens: int) -> dict[str, str]:
        language_model, scenes, side = self.language_model(), self._scenes("test"), math.isqrt(num_tokens)
        embeddings, draw = language_model.get_input_embeddings(), torch.Generator()
        right, _ = evaluate(
            lambda images: symbols(scenes, images, side, "map", embeddings, draw),
            language_model,
            self.rows("test", num_tokens),
            self.placeholder,
            self.device,
        )
        return right

    def picture(self) -> tuple[int, np.ndarray]:
        scenes = self._scenes("test")
        fullest = int((scenes.digits != NO_DIGIT).sum(1).argmax())
        return fullest, scenes.pixels[fullest]
