# SPDX-License-Identifier: Apache-2.0
"""The samples of a dataset as text: for the terminal, and as lines of a JSON file."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice, product

from processing import HoneybeeProcessor
from processing.processing_honeybee import CAPTION_TEMPLATE, CHAT_TEMPLATE, GUARD
from processing.rendering import render
from training.elastic import ElasticDraw
from training.recipe.mixture import Source, make_sample, sample_random
from training.recipe.stream import Stream
from training.samples import BadSampleError

NO_PROMPT = "[NO_PROMPT] <image> "


def samples_of(
    source: Source, seed: int, skipped: Counter, epoch: int = 0, elastic: ElasticDraw | None = None
) -> Iterator[dict]:
    """The samples of a dataset in the order of its records, as an epoch words them; images are not opened.

    Args:
        skipped: (dataset, reason) -> number of records and turns that are of no use; it is added to.
        elastic: draws the M of each sample.
    """
    if isinstance(source.records, Stream):
        records = source.records.one_pass()
    else:
        records = (source.records[index] for index in range(len(source.records)))
    for index, record in enumerate(records):
        try:
            rng = sample_random(seed, source.name, index, epoch)
            number = None if elastic is None else elastic.of(seed, source.name, index, epoch)
            sample = make_sample(source, index, record, rng, number)
        except BadSampleError as error:
            skipped[source.name, error.reason] += 1
            continue
        skipped.update((source.name, reason) for reason in sample["skipped"])
        yield sample


def rendered(sample: dict, processor: HoneybeeProcessor | None = None) -> list[tuple[str, bool]]:
    """The text of a sample in parts, and whether each is learned. Without bos and eos; a placeholder is one "<image>"."""
    templates = processor.chat_templates if processor else {"default": CHAT_TEMPLATE, "caption": CAPTION_TEMPLATE}
    pieces = render(sample["messages"], templates[sample["chat_template"]], "", "")
    return [(piece.replace(GUARD, ""), is_learned) for piece, is_learned in pieces]


def image_names(sample: dict) -> str | list[str | None] | None:
    """The path of the sample's image; None without an image, a list where there are several."""
    names = [image if isinstance(image, str) else (image.get("path") if isinstance(image, dict) else None)
             for image in sample["images"]]  # fmt: skip
    return names if len(names) > 1 else next(iter(names), None)


def conversation_text(sample: dict, processor: HoneybeeProcessor | None, colored: bool) -> str:
    """A sample for the terminal; what is learned is green, or between « and »."""
    marks = ("\033[32m", "\033[0m") if colored else ("«", "»")
    text = "".join(marks[0] + part + marks[1] if learned else part for part, learned in rendered(sample, processor))
    return f"--- {sample['dataset']} {sample['index']} {image_names(sample) or '(no image)'}\n{text}\n"


def official_text(sample: dict, processor: HoneybeeProcessor | None = None) -> str:
    """The text of a sample as the official code writes it, with its mark in front of a caption."""
    text = "".join(part for part, _ in rendered(sample, processor))
    return text.replace("<image>", NO_PROMPT, 1) if sample["chat_template"] == "caption" else text


def write_jsonl(
    path: str,
    sources: list[Source],
    seed: int,
    limit: int | None,
    epochs: int,
    processor: HoneybeeProcessor | None,
    skipped: Counter,
) -> int:
    """Writes each sample as a line, once an epoch, and returns the number of lines.

    Args:
        limit: samples of each dataset; None for all.
        skipped: as in [`samples_of`].
    """
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for source, epoch in product(sources, range(epochs)):
            for sample in islice(samples_of(source, seed, skipped, epoch), limit):
                line = {
                    "dataset": sample["dataset"],
                    "index": sample["index"],
                    "messages": sample["messages"],
                    "image": image_names(sample),
                    "text": official_text(sample, processor),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += 1
    return written
