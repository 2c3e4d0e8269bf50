# SPDX-License-Identifier: Apache-2.0
"""Ways in which a large scene becomes visual tokens, and what is done with each: trained with the quickstart's two stages
through `training/run/launch.py`, asked about held-out scenes, and timed."""

import io
import json
import os
import resource
import sys
import time
from dataclasses import dataclass, field
from statistics import median

import torch
from datasets import Dataset, load_from_disk
from PIL import Image

from lab.crops.scenes import DIGIT_PIXELS, GRIDS, LARGE_DIGIT_PIXELS, SIDE, LargeScenes
from lab.loop import write_text
from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor
from training.collator import HoneybeeDataCollator
from training.quickstart.run import BATCH_SIZE, CAPTION_SHARE, FEATURES, PROJECTOR, Questions, is_model, train_stage
from training.stages import freeze_for_stage

STAGES = ("align", "instruct")


@dataclass(frozen=True)
class Way:
    """
    Args:
        name: in the report.
        num_query_tokens: M, of the square or of each crop; the default one where several are learned.
        settings: of the run, beside the projector's.
        asked: M that it is asked with; () for the default alone.
        digit_pixels: of the scenes that it is about.
    """

    name: str
    num_query_tokens: int
    settings: dict = field(default_factory=dict)
    asked: tuple[int, ...] = ()
    digit_pixels: int = DIGIT_PIXELS

    def rows(self) -> list[tuple[str, dict]]:
        """What stands in the report, and with which settings of the processor it is asked."""
        if not self.asked:
            return [(self.name, {})]
        return [(f"{self.name}, asked with {number}", {"num_query_tokens": number}) for number in self.asked]


CUT = {"max_crops": 16, "overview": False}
WAYS = {
    "squeezed-16": Way("squeezed, M = 16", 16),
    "squeezed-25": Way("squeezed, M = 25", 25),
    "crops-1": Way("crops, M = 1", 1, CUT),
    "crops-1-overview-9": Way(
        "crops, M = 1, and an overview of 9", 1, {**CUT, "overview": True, "overview_num_query_tokens": 9}
    ),
    "crops-elastic": Way("crops, elastic M of 1 and 4", 4, {**CUT, "elastic": "1,4"}, asked=(1, 4)),
    "squeezed-16-large": Way(
        "control: squeezed, M = 16, digits of four times the size", 16, digit_pixels=LARGE_DIGIT_PIXELS
    ),
}


def write_samples(folder: str, stage: str, seed: int, number: int, digit_pixels: int) -> None:
    """The samples of a stage, the same for every way."""
    maker = LargeScenes("train", seed + STAGES.index(stage), digit_pixels)
    caption_share = 1.0 if stage == "align" else CAPTION_SHARE

    def sample() -> dict:
        scene, file = maker.scene(), io.BytesIO()
        scene.image.save(file, "png", compress_level=1)  # noise does not become much smaller
        messages, chat_template = maker.conversation(scene.contents, caption_share)
        image = {"bytes": file.getvalue(), "path": None}
        return {"messages": messages, "images": [image], "chat_template": chat_template}

    Dataset.from_list([sample() for _ in range(number)], features=FEATURES).save_to_disk(folder)


def samples_folder(folder: str, stage: str, digit_pixels: int) -> str:
    return os.path.join(folder, f"{stage}-{digit_pixels}")


def train_and_ask(name: str, folder: str, reader: str, seed: int, split: str, questions: int) -> None:
    """Trains a way, or what is left of it, below `folder`, which holds tower and samples, and writes its answers."""
    way = WAYS[name]
    parts = {
        "vision_model": os.path.join(folder, "tower"),
        "text_model": reader,
        "projector": {**PROJECTOR, "num_query_tokens": way.num_query_tokens},
    }
    for stage in STAGES:
        target = model_folder(folder, name, stage)
        data = samples_folder(folder, stage, way.digit_pixels)
        # Packed batches, the default, are not known to keep samples apart in an OPT.
        train_stage(target, stage, data, seed, batching="padded", **parts, **(way.settings if stage == "align" else {}))
        if not is_model(target):
            raise RuntimeError(f"{target} holds no model; the training was stopped")
        parts = {"model_name_or_path": target}
        if "elastic" in way.settings:
            parts["elastic"] = way.settings["elastic"]
    asked, found = Questions(LargeScenes(split, seed, way.digit_pixels), questions), []
    processor, sizes = HoneybeeProcessor.from_pretrained(target), [scene.image.size for scene in asked.scenes]
    for row, settings in way.rows():
        given = asked.ask(target, batch_size=50, **settings)
        found.append(
            {
                "row": row,
                "way": name,
                "seed": seed,
                "kinds": asked.kinds,
                "wide": [width != height for width, height in sizes],
                "right": [answer == truth for answer, truth in zip(given, asked.answers)],
                "tokens": {
                    "square" if columns == rows else "wide": count_tokens(processor, (columns * SIDE, rows * SIDE), settings)
                    for columns, rows in GRIDS
                },
            }
        )  # fmt: skip
    write_text(record_path(folder, name, split), json.dumps(found))


def model_folder(folder: str, name: str, stage: str) -> str:
    return os.path.join(folder, "models", f"{name}-{stage}")


def record_path(folder: str, name: str, split: str) -> str:
    return os.path.join(folder, f"{name}-{split}.json")


def count_tokens(processor: HoneybeeProcessor, size: tuple[int, int], settings: dict) -> int:
    """Visual tokens of a picture of a size (width, height) in a call with `settings`."""
    inputs = processor(images=Image.new("RGB", size), text="<image>", **settings)
    return inputs["input_ids"][0].count(processor.image_token_id)


def measure(name: str, row: str, settings: dict, folder: str, path: str, steps: int) -> None:
    """Seconds and memory of a trained way, asked with `settings`, in a process that does nothing else, while nothing else runs.

    A step of training is that of the second stage, `BATCH_SIZE` samples with what they become in the collator, and an answer
    is one of a batch of 50. Seconds are medians. Memory is the most that a step of training takes, the model included, on a
    GPU; without one it is what the process grew by at most.
    """
    way, target, cuda = WAYS[name], model_folder(folder, name, "instruct"), torch.cuda.is_available()
    rows = load_from_disk(samples_folder(folder, "instruct", way.digit_pixels))
    collator, times = HoneybeeDataCollator(HoneybeeProcessor.from_pretrained(target)), []
    model = HoneybeeForConditionalGeneration.from_pretrained(target).to("cuda" if cuda else "cpu").train()
    freeze_for_stage(model, "instruct")
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(steps + 2):
        numbers = [(step * BATCH_SIZE + each) % len(rows) for each in range(BATCH_SIZE)]
        samples = [{**rows[number], **settings} for number in numbers]
        started = time.perf_counter()
        model(**{key: value.to(model.device) for key, value in collator(samples).items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    memory = torch.cuda.max_memory_allocated() if cuda else grown
    asked, answering = Questions(LargeScenes("validation", 0, way.digit_pixels), 50), []
    for _ in range(3):
        started = time.perf_counter()
        asked.ask(target, batch_size=50, **settings)
        answering.append(time.perf_counter() - started)
    cost = {
        "row": row,
        "step": median(times[2:]),
        "answer": median(answering) / 50,
        "mib": memory / 2**20,
        "cuda": cuda,
    }
    write_text(path, json.dumps(cost))
