# SPDX-License-Identifier: Apache-2.0
"""Samples a second and core of the recipe's path, against a plain loop over the same files.

    python benchmarks/reader.py

All read the same JPEGs and the same words in one thread, in turn, several times in one run. The plain loop opens an image,
resizes it and tokenizes the finished prompt, one sample after the other. Ours draws, merges, words, checks and decodes, and
tokenizes with labels. Then both go on to the normalised tensor that a model takes; ours is a padded batch by then, as in
training.
"""

import argparse
import cProfile
import json
import os
import pstats
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from processing import HoneybeeProcessor, prepare_tokenizer
from processing.prepare_tokenizer import square_image_processor
from processing.processing_honeybee import resize_image
from training.collator import HoneybeeDataCollator
from training.recipe.config import parse_recipe
from training.recipe.sources import open_mixture

WORDS = tuple(
    "what color is the cat on a table near window and how many people are in front of red bus sign left right".split()  # noqa: SIM905
)


def make_processor(size: int) -> HoneybeeProcessor:
    """CLIP's pixels and a Llama-like tokenizer trained on the spot: nothing is downloaded."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    letters = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS), "Answer the question using a single word or phrase."], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )
    return HoneybeeProcessor(square_image_processor(size), prepare_tokenizer(tokenizer), num_image_tokens=144)


def make_data(root: Path, count: int, pixels: tuple[int, int], questions: int) -> None:
    """VQAv2's files: photo-like JPEGs (smooth shapes with some noise) and a few questions for each."""
    rng = np.random.default_rng(0)
    folder = root / "VQAv2" / "images"
    folder.mkdir(parents=True)
    asked, answered = [], []
    for image_id in range(count):
        coarse = rng.integers(0, 256, (pixels[1] // 16 + 1, pixels[0] // 16 + 1, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize(pixels, Image.Resampling.BICUBIC), dtype=np.int16)
        image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"COCO_train2014_{image_id:012}.jpg", quality=90)
        for number in range(questions):
            key = image_id * questions + number
            words = " ".join(rng.choice(WORDS, 7))
            asked.append({"image_id": image_id, "question": f"{words}?", "question_id": key})
            answered.append(
                {"image_id": image_id, "question_id": key, "multiple_choice_answer": str(rng.choice(WORDS))}
            )
    for name, member, rows in (
        ("v2_OpenEnded_mscoco_train2014_questions.json", "questions", asked),
        ("v2_mscoco_train2014_annotations.json", "annotations", answered),
    ):
        (root / "VQAv2" / name).write_text(json.dumps({"data_subtype": "train2014", member: rows}))


def plain_loop(rows: list[tuple[str, str]], processor: HoneybeeProcessor, size: int, floats: bool) -> int:
    """Opens, resizes and tokenizes; returns the number of tokens, so that nothing is left out."""
    mean, std = (
        torch.tensor(getattr(processor.image_processor, name)).view(3, 1, 1) for name in ("image_mean", "image_std")
    )
    tokens = 0
    for path, text in rows:
        image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        if floats:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
            assert ((pixels - mean) / std).shape == (3, size, size)
        tokens += len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    return tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512, help="images (%(default)s)")
    parser.add_argument(
        "--pixels", type=int, nargs=2, default=[224, 224], help="width and height of the JPEGs (224 224)"
    )
    parser.add_argument("--questions", type=int, default=3, help="a conversation's (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="samples in a batch (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each, in turn (%(default)s)")
    parser.add_argument("--profile", action="store_true", help="where our time goes, instead of the table")
    return parser.parse_args()


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    size = 224
    processor = make_processor(size)
    collator = HoneybeeDataCollator(processor, max_length=1024)
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), args.samples, tuple(args.pixels), args.questions)
        recipe = parse_recipe({"data_root": folder, "datasets": ["vqav2"], "balancing": "per-dataset"})
        mixture = open_mixture(recipe, args.samples, fits=collator.check_length)
        dataset = mixture.as_dataset()
        rows = []
        for draw in range(args.samples):
            sample = mixture[draw]
            index = sample["index"]
            text = processor.apply_chat_template(sample["messages"])
            text = text.replace(processor.image_token, processor.replace_image_token())
            rows.append((mixture.sources[0].records[index]["image"], text))

        def ours() -> int:
            loader = DataLoader(dataset, batch_size=args.batch, collate_fn=collator)
            return sum(int(batch["attention_mask"].sum()) for batch in loader)

        def ours_without_floats() -> int:
            tokens = 0
            for start in range(0, args.samples, args.batch):
                samples = [mixture[draw] for draw in range(start, min(start + args.batch, args.samples))]
                for sample in samples:
                    resize_image(sample["images"][0], (size, size), Image.Resampling.BICUBIC)
                rows = collator.tokenize([(sample["messages"], sample["chat_template"]) for sample in samples])
                tokens += sum(len(row["input_ids"]) for row in rows)
            return tokens

        def plain() -> int:
            return plain_loop(rows, processor, size, floats=True)

        def plain_without_floats() -> int:
            return plain_loop(rows, processor, size, floats=False)

        if args.profile:
            profile = cProfile.Profile()
            profile.runcall(ours)
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
            return
        runs = (plain_without_floats, ours_without_floats, plain, ours)
        assert len({run() for run in runs}) == 1, "all must read the same samples"
        seconds = {run: [] for run in runs}
        for _ in range(args.repeats):
            for run, times in seconds.items():
                start = time.process_time()
                run()
                times.append(time.process_time() - start)
    print(
        f"{args.samples} JPEGs of {args.pixels[0]} x {args.pixels[1]}, {args.questions} questions each, {size} px for the "
        f"model, batches of {args.batch}, one thread, CPU time, median of {args.repeats} runs in turn\n"
    )
    print("| | samples / s / core | of the plain loop above it (least to most) |\n|---|---|---|")
    for name, run, other in (
        ("plain loop: open, resize, tokenize", plain_without_floats, None),
        ("mixture, words, resize, tokenize with labels", ours_without_floats, plain_without_floats),
        ("plain loop: open, resize, tokenize, normalise", plain, None),
        ("mixture and collator: a padded batch to train on", ours, plain),
    ):
        ratios = sorted(theirs / own for own, theirs in zip(seconds[run], seconds[other or run]))
        share = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if other else ""
        print(f"| {name} | {args.samples / statistics.median(seconds[run]):.0f} | {share} |")


if __name__ == "__main__":
    main()
