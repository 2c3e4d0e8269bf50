# SPDX-License-Identifier: Apache-2.0
"""A pretrained vision tower, a pretrained language model and a dataset of conversations about images, as a task of the lab.

The language model is frozen, as in stage 1; a row is right where every token of its answers is the likeliest one.
"""

import hashlib
import os
from dataclasses import dataclass, field, fields
from functools import cache, cached_property, partial
from typing import Literal, get_args, get_origin

import numpy as np
import torch
from tqdm.auto import tqdm

from lab.experiment import Task
from lab.loop import write_whole
from lab.plan import Preset
from lab.rows import SPLITS, Rows
from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor, open_image, processor_from_vision_text_pretrained
from processing.pixels import Pixels
from training.collator import HoneybeeDataCollator, padded
from training.conversations import image_root, load_conversations, normalize_conversation
from training.yaml_file import is_of_type, read_yaml

# Settings of a preset that are of scenes and stand-ins, or follow from the parts.
NOT_REAL = ("towers", "own_stand_ins", "tower_steps", "language_model_steps")


@dataclass(frozen=True)
class RealParts:
    """What a file for `--config` says beside the settings of a preset.

    Args:
        vision_tower, language_model, data: names on the Hub, or paths. Samples are as for training, with one image each;
            a column `kind` groups them.
        columns: our name -> the dataset's, where they differ.
        image_size: pixels a side; None: the tower's own.
        device: of projector, tower and language model.
        dtype: of tower and language model.
        processes: experiments at the same time.
    """

    vision_tower: str
    language_model: str
    data: str
    columns: dict | None = field(default=None, hash=False)
    image_size: int | None = None
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    processes: int = field(default=1, repr=False)

    @property
    def scope(self) -> str:
        return (
            f"{self.vision_tower} and {self.language_model}, both frozen, on {self.data}. A row is right where every token "
            "of its answers is the likeliest one."
        )


def read_config(path: str) -> tuple[RealParts, Preset]:
    """
    Raises:
        ValueError: naming the setting, and what is known.
        OSError: the file cannot be read.
    """
    given, twice = read_yaml(path)
    if twice or not isinstance(given, dict):
        raise ValueError(f"{path}: {'; '.join(twice) or 'a list of settings is needed'}")
    own = {each.name: each for each in fields(RealParts)}
    of_preset = {each.name: each for each in fields(Preset) if each.name not in NOT_REAL}
    known = own | of_preset
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"{path}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    if missing := [name for name in ("vision_tower", "language_model", "data") if name not in given]:
        raise ValueError(f"{path}: {', '.join(missing)} missing; each is a name on the Hub or a path")
    for name, value in given.items():
        hint = list[get_args(known[name].type)[0]] if get_origin(known[name].type) is tuple else known[name].type
        if not is_of_type(value, hint):
            raise ValueError(f"{path}: {name}={value!r} is no {hint}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    parts = RealParts(**{name: value for name, value in given.items() if name in own})
    preset = Preset(
        towers=(os.path.basename(parts.vision_tower.rstrip("/")),),
        **{name: value for name, value in given.items() if name in of_preset},
    )
    return parts, preset


@cache
def _processor(parts: RealParts, num_tokens: int) -> HoneybeeProcessor:
    return processor_from_vision_text_pretrained(parts.vision_tower, parts.language_model, num_tokens, parts.image_size)


@dataclass(frozen=True)
class DatasetTask(Task):
    """
    Args:
        folder: of features; what is there is not made again.
        seed: of projectors, of the order of the data, and of who is in which split.
        sizes: images of `train`, `validation` and `test`.
    """

    folder: str = field(repr=False)
    parts: RealParts
    seed: int
    sizes: tuple[int, ...]

    @property
    def tower(self) -> str:
        return os.path.basename(self.parts.vision_tower.rstrip("/"))

    @property
    def images(self) -> int:
        return self.seed

    @property
    def device(self) -> str:
        return self.parts.device

    @property
    def placeholder(self) -> int:
        return _processor(self.parts, 1).image_token_id

    def preparations(self) -> dict:
        return {self._path("test"): self._make_features}

    def _path(self, split: str) -> str:
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:8]
        return os.path.join(self.folder, f"{self.name}-{digest}-{split}.pt")

    def _model(self) -> HoneybeeForConditionalGeneration:
        """Both parts, joined; the projector in it is nobody's."""
        parts = self.parts
        return HoneybeeForConditionalGeneration.from_vision_text_pretrained(
            parts.vision_tower,
            parts.language_model,
            dtype=getattr(torch, parts.dtype),
            image_size=parts.image_size,
            projector_type="linear",
        ).to(parts.device)

    @torch.inference_mode()
    def _make_features(self) -> None:
        model, pixels = self._model(), Pixels(_processor(self.parts, 1).image_processor)
        os.makedirs(self.folder, exist_ok=True)
        for split in SPLITS:
            if os.path.isfile(self._path(split)):
                continue
            rows, features = self._samples[split], []
            for start in tqdm(range(0, len(rows), 16), desc=f"Features ({split})"):
                images = [open_image(self._sample(row)[1], self._root) for row in rows[start : start + 16]]
                batch = pixels(images).to(self.device, model.dtype)
                features.append(model.model.get_patch_features(batch).half().cpu())
            write_whole(self._path(split), partial(torch.save, torch.cat(features)))

    @property
    def _root(self) -> str:
        return image_root(self.parts.data)

    @cached_property
    def _dataset(self):
        dataset = load_conversations(self.parts.data, columns=self.parts.columns)
        if len(dataset) < sum(self.sizes):
            raise ValueError(
                f"{self.parts.data} has {len(dataset)} samples and images={list(self.sizes)} takes {sum(self.sizes)}"
            )
        return dataset

    @cached_property
    def _samples(self) -> dict[str, list[int]]:
        """By split, rows of the dataset."""
        order = np.random.default_rng(self.seed).permutation(len(self._dataset)).tolist()
        ends = np.cumsum(self.sizes)
        return {split: order[end - size : end] for split, size, end in zip(SPLITS, self.sizes, ends)}

    def _sample(self, row: int) -> tuple:
        """(messages, image, kind). The image is not opened."""
        example = self._dataset[row]
        messages, images = normalize_conversation(example)
        if len(images) != 1:
            raise ValueError(f"{self.parts.data}: row {row} has {len(images)} images; the lab takes one for each")
        return messages, images[0], example.get("kind") or "all"

    def check(self) -> None:
        for rows in self._samples.values():
            for row in rows:
                self._sample(row)

    def configs(self) -> tuple:
        config = HoneybeeForConditionalGeneration.config_from_vision_text_pretrained(
            self.parts.vision_tower,
            self.parts.language_model,
            image_size=self.parts.image_size,
            projector_type="linear",
        )
        return config.vision_config, config.text_config

    def language_model(self) -> torch.nn.Module:
        return self._model().eval().requires_grad_(False)

    def features(self, split: str) -> torch.Tensor:
        return torch.load(self._path(split), weights_only=True, mmap=True)

    def _tokenized(self, samples: list[tuple], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = HoneybeeDataCollator(_processor(self.parts, num_tokens)).tokenize(
            [(row[0], "default") for row in samples]
        )
        return padded([row["input_ids"] for row in rows], 0), padded([row["labels"] for row in rows], -100)

    def batch(self, step: int, size: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen = np.random.default_rng((self.seed, step)).integers(self.sizes[0], size=size)
        samples = [self._sample(self._samples["train"][image]) for image in chosen]
        return *self._tokenized(samples, num_tokens), torch.from_numpy(chosen)

    def rows(self, split: str, num_tokens: int) -> Rows:
        samples = [self._sample(row) for row in self._samples[split]]
        kinds = [kind for *_, kind in samples]
        return Rows(*self._tokenized(samples, num_tokens), torch.arange(len(samples)), kinds)

    def picture(self) -> tuple[int, np.ndarray]:
        size = _processor(self.parts, 1).image_processor.size
        image = open_image(self._sample(self._samples["test"][0])[1], self._root)
        return 0, np.asarray(image.resize((size["width"], size["height"])))


def dataset_tasks(parts: RealParts, preset: Preset, first_seed: int, folder: str) -> list[DatasetTask]:
    """One for each seed."""
    return [DatasetTask(folder, parts, seed, preset.images) for seed in range(first_seed, first_seed + preset.seeds)]
