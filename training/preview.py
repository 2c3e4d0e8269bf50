# SPDX-License-Identifier: Apache-2.0
"""Shows what a data recipe trains on, before anything is trained.

    python training/preview.py                       # a small recipe, made on the spot from pictures of digits
    python training/preview.py --config training/configs/recipes/recipe.yaml
    python training/preview.py --config X --set balancing=per-task --processor outputs/align --html preview.html
    python training/preview.py --config X --jsonl samples.jsonl --limit 100

Prints the mixture as a table and some conversations of each dataset; what is learned is green, or between « and »
where the output is not a terminal. The end-of-sequence token behind each answer, which is learned too, is not shown.
"""

import argparse
import base64
import html
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice, product

import numpy as np
import yaml

from processing import HoneybeeProcessor, open_image
from processing.processing_honeybee import CAPTION_TEMPLATE, CHAT_TEMPLATE, GUARD
from training.collator import HoneybeeDataCollator
from training.quickstart.recipe_data import write_recipe_data
from training.recipe.config import RecipeError, load_recipe
from training.recipe.mixture import (
    Source,
    Stream,
    UnusableRecordError,
    make_sample,
    sample_random,
    sampling_weights,
    unusable,
)
from training.recipe.sources import open_sources
from training.rendering import render

MEASURED = 64  # samples of a dataset whose tokens are counted
THUMBNAIL = 224
DEMO = "outputs/recipe"
NO_PROMPT = "[NO_PROMPT] <image> "


def samples_of(source: Source, seed: int, skipped: Counter, epoch: int = 0) -> Iterator[dict]:
    """The usable samples of a dataset in the order of its records, worded as in an epoch, images unopened.

    Args:
        skipped: (dataset, reason) -> number, added to.
    """
    if isinstance(source.records, Stream):
        records = source.records.one_pass()
    else:
        records = (source.records[index] for index in range(len(source.records)))
    for index, record in enumerate(records):
        try:
            sample = make_sample(source, index, record, sample_random(seed, source.name, index, epoch))
        except UnusableRecordError as error:
            skipped[source.name, error.reason] += 1
            continue
        skipped.update((source.name, reason) for reason in sample["skipped"])
        yield sample


def rendered(sample: dict, processor: HoneybeeProcessor | None = None) -> list[tuple[str, bool]]:
    """The text of a sample, without bos, eos and expanded placeholders, in parts, and whether each is learned."""
    templates = processor.chat_templates if processor else {"default": CHAT_TEMPLATE, "caption": CAPTION_TEMPLATE}
    pieces = render(sample["messages"], templates[sample["chat_template"]], "", "")
    return [(piece.replace(GUARD, ""), is_learned) for piece, is_learned in pieces]


def image_names(sample: dict) -> str | list[str | None] | None:
    """The path of the sample's image, None without one, and a list where there are several."""
    names = [image if isinstance(image, str) else (image.get("path") if isinstance(image, dict) else None)
             for image in sample["images"]]  # fmt: skip
    return names if len(names) > 1 else next(iter(names), None)


def mixture_table(
    sources: list[Source],
    weights: np.ndarray,
    num_samples: int,
    lengths: dict[str, float] | None = None,
    unit: str = "tokens",
) -> list[list[str]]:
    """Head and rows: dataset, task, samples, weight, expected draws and epochs in the run, and, where `lengths` are
    given, mean length in `unit`s."""
    rows = [["dataset", "task", "samples", "weight", "draws", "epochs", *([unit] if lengths else [])]]
    for source, weight in zip(sources, weights):
        draws, size = weight * num_samples, source.size
        rows.append(
            [
                source.name,
                source.task,
                "stream" if size is None else f"{size:,}",
                f"{weight:.4f}",
                f"{draws:,.0f}",
                "-" if size is None else f"{draws / size:,.2f}",
                *([f"{lengths[source.name]:.0f}"] if lengths else []),
            ]
        )
    return rows


def format_table(rows: list[list[str]]) -> str:
    """Columns aligned, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" if place < 2 else f"{cell:>{width}}" for place, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    )  # fmt: skip


def mean_length(source: Source, seed: int, processor: HoneybeeProcessor | None) -> float:
    """Tokens of a sample, its image's among them, on average over the first ones; characters without a processor."""
    samples = list(islice(samples_of(source, seed, Counter()), MEASURED))
    if not samples:
        return float("nan")
    if processor is None:
        return float(np.mean([sum(len(part) for part, _ in rendered(sample)) for sample in samples]))
    rows = HoneybeeDataCollator(processor).tokenize(
        [(sample["messages"], sample["chat_template"]) for sample in samples]
    )
    return float(np.mean([len(row["input_ids"]) for row in rows]))


def official_text(sample: dict, processor: HoneybeeProcessor | None = None) -> str:
    """The text of a sample as the official code writes it: there a caption begins with a mark of its own."""
    text = "".join(part for part, _ in rendered(sample, processor))
    return text.replace("<image>", NO_PROMPT, 1) if sample["chat_template"] == "caption" else text


def write_jsonl(
    path: str, sources: list[Source], seed: int, limit: int | None, epochs: int, processor, skipped: Counter
) -> int:
    """Each sample, or the first `limit` of each dataset, as a line, once an epoch; returns the number of lines."""
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


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}h2{margin:2rem 0 .5rem}h2 small{font-weight:normal;color:#777}
article{display:flex;gap:1.2rem;margin:.6rem 0;padding:.8rem;border:1px solid #ddd;border-radius:6px;align-items:start}
figure{margin:0;flex:0 0 160px}img{width:160px;border-radius:3px}figcaption,.none{color:#777;font-size:.8rem;overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:inherit}mark{background:#bfe8bf;padding:0 .15em;border-radius:3px}
.no{color:#b00}"""


def html_page(table: list[list[str]], shown: dict[str, list[dict]], roots: dict[str, str], processor=None) -> str:
    """One page with the table and the samples, images in it; what is learned is marked."""
    head, *rows = [[html.escape(cell) for cell in row] for row in table]
    body = [
        "<!doctype html><meta charset=utf-8><title>Recipe preview</title>",
        f"<style>{STYLE}</style><h1>Recipe preview</h1>",
        "<p>What is learned is <mark>marked</mark>, and so is the end of each marked part. The model sees the images resized to "
        "its square.</p>",
        "<table><tr><th>" + "<th>".join(head) + "".join("<tr><td>" + "<td>".join(row) for row in rows) + "</table>",
    ]
    for (name, samples), (_, task, *_) in zip(shown.items(), rows):
        body.append(f"<h2>{html.escape(name)} <small>{task}</small></h2>")
        for sample in samples:
            figures = (
                "".join(_figure(image, roots[name]) for image in sample["images"]) or '<p class="none">no image</p>'
            )
            text = "".join(
                f"<mark>{html.escape(part)}</mark>" if learned else html.escape(part)
                for part, learned in rendered(sample, processor)
            )
            label = f"<figcaption>sample {sample['index']}</figcaption>"
            body.append(f"<article><figure>{figures}{label}</figure><pre>{text}</pre></article>")
    return "\n".join(body) + "\n"


def _figure(image, root: str) -> str:
    try:
        image = open_image(image, root)
    except Exception as error:  # whatever it is, the page shows it in the image's place
        return f'<p class="no">{html.escape(str(unusable("corrupt image", error)))}</p>'
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def conversation_text(sample: dict, processor, colored: bool) -> str:
    """A sample for the terminal."""
    marks = ("\033[32m", "\033[0m") if colored else ("«", "»")
    text = "".join(marks[0] + part + marks[1] if learned else part for part, learned in rendered(sample, processor))
    return f"--- {sample['dataset']} {sample['index']} {image_names(sample) or '(no image)'}\n{text}\n"


def run_length(path: str, processes: int) -> int:
    """Samples of the run that the YAML file configures, or of the paper's short schedule where it sets no `max_steps`."""
    with open(path, encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    if "max_steps" not in settings:
        return 4000 * 128
    batch = settings.get("per_device_train_batch_size", 8) * settings.get("gradient_accumulation_steps", 1) * processes
    return settings["max_steps"] * settings.get("global_batch_size", batch)


def preview(sources: list[Source], weights: np.ndarray, seed: int, args: argparse.Namespace) -> None:
    """Prints and writes what the arguments ask for."""
    processor = HoneybeeProcessor.from_pretrained(args.processor) if args.processor else None
    lengths = {source.name: mean_length(source, seed, processor) for source in sources}
    table = mixture_table(sources, weights, args.samples, lengths, "tokens" if processor else "characters")
    print(
        f"The mixture in a run of {args.samples:,} samples; the last column is a mean over the first {MEASURED} samples"
    )
    if processor is None:
        print("(for tokens, give --processor a Hub name or the folder of a model)")
    print(f"\n{format_table(table)}\n")
    skipped: Counter = Counter()
    shown = {source.name: list(islice(samples_of(source, seed, skipped), args.show)) for source in sources}
    for samples in shown.values():
        for sample in samples:
            print(conversation_text(sample, processor, sys.stdout.isatty()))
    if args.html:
        with open(args.html, "w", encoding="utf-8") as file:
            file.write(html_page(table, shown, {source.name: source.image_root for source in sources}, processor))
        print(f"Wrote {args.html}")
    if args.jsonl:
        skipped.clear()
        written = write_jsonl(args.jsonl, sources, seed, args.limit, args.epochs, processor, skipped)
        print(f"Wrote {written:,} samples to {args.jsonl}")
    for (name, reason), number in sorted(skipped.items()):
        print(f"Skipped in {name}: {number:,} {reason}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help=f"YAML file with a mixture: section; without it, scenes of digits in {DEMO}")
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE", help="override; repeatable")
    parser.add_argument("--samples", type=int, help="length of the run; else from the config, or 4,000 steps of 128")
    parser.add_argument(
        "--processes", type=int, default=1, help="of the run, each with the config's batch (%(default)s)"
    )
    parser.add_argument("--processor", help="Hub name or folder of a processor: its templates, and mean tokens")
    parser.add_argument("--show", type=int, default=2, help="conversations of each dataset (%(default)s)")
    parser.add_argument("--html", metavar="FILE", help="write the table and the shown conversations with their images")
    parser.add_argument("--jsonl", metavar="FILE", help="write each sample as a line")
    parser.add_argument("--limit", type=int, help="samples of each dataset in the JSONL file; all without it")
    parser.add_argument(
        "--epochs", type=int, default=1, help="draw what is random this many times in the JSONL file (%(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None):
    args = parse_arguments(arguments)
    if args.config is None:
        args.config = os.path.join(DEMO, "recipe.yaml")
        # Written last. Files that are made again are new to the cache of `datasets`, which would grow with each run.
        if not os.path.isfile(args.config):
            write_recipe_data(DEMO)
        args.html = args.html or os.path.join(DEMO, "preview.html")
    try:
        recipe = load_recipe(args.config, args.set)
        sources = open_sources(recipe, args.config)
    except RecipeError as error:
        sys.exit(f"error: {error}")
    args.samples = args.samples or run_length(args.config, args.processes)
    preview(sources, sampling_weights(sources, recipe.balancing, recipe.weights), recipe.seed, args)


if __name__ == "__main__":
    main()
