# SPDX-License-Identifier: Apache-2.0
"""How many samples a second one core makes ready: open, resize and normalise the image; render and tokenize the text.

    python -m benchmarks.preparation

Images are JPEGs of 640 x 480 as in COCO, texts those of the fine-tuning mixture. A training step's demand is its samples
over its seconds; more workers (`--dataloader_num_workers`) make as many more.
"""

import io
import json

import numpy as np
from PIL import Image

from benchmarks import lengths as stand_ins
from benchmarks.measure import arguments, in_turn, machine, markdown
from processing import open_image
from training.collator import HoneybeeDataCollator

BATCH = 32


def jpeg(seed: int, size: tuple[int, int] = (640, 480)) -> bytes:
    # Smooth like a photo: noise would not compress, and decoding would take longer than it does.
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def main():
    args = arguments(__doc__, rounds=5)
    processor = stand_ins.processor()
    collator = HoneybeeDataCollator(processor, 1024, pack=True)
    mixture = stand_ins.mixture(BATCH)
    samples = [mixture.glance(draw) for draw in range(BATCH)]
    for number, sample in enumerate(samples):
        sample["images"] = [{"bytes": jpeg(number), "path": None} for _ in sample["images"]]
    images = [image for sample in samples for image in sample["images"]]
    times = in_turn(
        {
            "open images": lambda: [open_image(image) for image in images],
            "images, ready for the tower": lambda: processor(images=[open_image(image) for image in images]),
            "text, ready for the LLM": lambda: collator.lengths(samples),
            "samples, ready to train on": lambda: collator(samples),
        },
        args.rounds,
    )
    speeds = {name: (len(images) if "images" in name else BATCH) / seconds for name, seconds in times.items()}
    if args.json:
        print(json.dumps(speeds))
        return
    rows = [{"what": name, "a second and core": f"{speed:.0f}"} for name, speed in speeds.items()]
    print(f"{len(images)} images in {BATCH} samples. {machine()}.\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
