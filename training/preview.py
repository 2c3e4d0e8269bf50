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
import os
import sys
from collections import Counter
from contextlib import suppress
from itertools import islice

import numpy as np
import yaml

from processing import HoneybeeProcessor
from training.collator import CROPS, HoneybeeDataCollator, crops_of
from training.elastic import ElasticDraw, elastic_draw
from training.recipe.balancing import sampling_weights
from training.recipe.config import RecipeError, load_recipe
from training.recipe.mixture import Source
from training.recipe.page import html_page
from training.recipe.sources import open_sources
from training.recipe.table import format_table, mixture_table
from training.recipe.texts import conversation_text, rendered, samples_of, write_jsonl
from training.samples import BadSampleError

MEASURED = 64  # samples of a dataset whose tokens are counted
DEMO = "outputs/recipe"


def mean_length(
    source: Source, seed: int, processor: HoneybeeProcessor | None, elastic: ElasticDraw | None = None
) -> float:
    """Mean tokens of the first samples, with those of their images; mean characters where there is no processor."""
    samples = list(islice(samples_of(source, seed, Counter(), elastic=elastic), MEASURED))
    if not samples:
        return float("nan")
    if processor is None:
        return float(np.mean([sum(len(part) for part, _ in rendered(sample)) for sample in samples]))
    collator, measured = HoneybeeDataCollator(processor, image_root=source.image_root), []
    for sample in samples:
        with suppress(BadSampleError, FileNotFoundError):  # the run takes another record, too
            measured.append({**sample, "image_sizes": collator.image_sizes(sample["images"])})
    return float(np.mean(collator.lengths(measured))) if measured else float("nan")


def load_processor(args: argparse.Namespace) -> HoneybeeProcessor | None:
    """The processor that the arguments name, with the crops of the run; None where they name none.

    Raises:
        ValueError: crops that cannot be.
    """
    if not args.processor:
        return None
    processor = HoneybeeProcessor.from_pretrained(args.processor)
    for name, value in crops_of(processor, args).items():
        setattr(processor, name, value)
    processor.check_crops()
    return processor


def run_settings(path: str) -> dict:
    """The settings of the run in a YAML file."""
    with open(path, encoding="utf-8") as file:
        return yaml.safe_load(file)


def run_length(settings: dict, processes: int) -> int:
    """Samples of the run; of the paper's short schedule where it has no `max_steps`."""
    if "max_steps" not in settings:
        return 4000 * 128
    batch = settings.get("per_device_train_batch_size", 8) * settings.get("gradient_accumulation_steps", 1) * processes
    return settings["max_steps"] * settings.get("global_batch_size", batch)


def preview(
    sources: list[Source],
    weights: np.ndarray,
    seed: int,
    args: argparse.Namespace,
    processor: HoneybeeProcessor | None,
) -> None:
    """Prints and writes what the arguments ask for."""
    elastic = elastic_draw(args.elastic, processor.elastic_num_query_tokens) if processor else None
    lengths = {source.name: mean_length(source, seed, processor, elastic) for source in sources}
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
    parser.add_argument(
        "--elastic", metavar="M,M,...", help="with --processor: as in training; else from the config or the processor"
    )
    parser.add_argument(
        "--max_crops", type=int, help="with --processor: as in training; else from the config or the processor"
    )
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
            from training.quickstart.recipe_data import write_recipe_data  # loads scikit-learn

            write_recipe_data(DEMO)
        args.html = args.html or os.path.join(DEMO, "preview.html")
    try:
        recipe = load_recipe(args.config, args.set)
        sources = open_sources(recipe, args.config)
        settings = run_settings(args.config)
        args.elastic = args.elastic or (settings.get("elastic") if args.processor else None)
        elastic_draw(args.elastic, None)
        for name in ("elastic", "max_crops"):
            if getattr(args, name) and not args.processor:
                raise ValueError(f"--{name} {getattr(args, name)} counts tokens, which takes a --processor; give one")
        for name in CROPS:
            if getattr(args, name, None) is None:
                setattr(args, name, settings.get(name))
        processor = load_processor(args)
    except (RecipeError, ValueError) as error:
        sys.exit(f"error: {error}")
    args.samples = args.samples or run_length(settings, args.processes)
    preview(sources, sampling_weights(sources, recipe.balancing, recipe.weights), recipe.seed, args, processor)


if __name__ == "__main__":
    main()
