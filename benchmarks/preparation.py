# SPDX-License-Identifier: Apache-2.0
"""How many samples a second one core makes ready: open, resize and normalise the image; render and tokenize the text.

    python -m benchmarks.preparation

Images are JPEGs of 640 x 480 as in COCO, texts those of the fine-tuning mixture. A training step's demand is its samples
over its seconds; more workers (`--dataloader_num_workers`) make as many more. Cut pictures are of 1280 x 960, at most nine crops
and the whole; the plain loop cuts and resizes the same way with Pillow and normalises with NumPy.
"""

import io
import json

import numpy as np
from PIL import Image

from benchmarks import lengths as stand_ins
from benchmarks.measure import arguments, in_turn, machine, markdown
from processing import open_image
from processing.crops_honeybee import Cut
from processing.image_size import image_size
from processing.pixels import Pixels
from training.collator import HoneybeeDataCollator

BATCH = 32
CUT = 8  # pictures that are cut


def jpeg(seed: int, size: tuple[int, int] = (640, 480)) -> bytes:
    # Smooth like a photo: noise would not compress, and decoding would take longer than it does.
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def plain_loop(pictures: list[bytes], image_processor, cut: Cut) -> np.ndarray:
    """The squares of pictures, normalised, (squares, 3, S, S), without any code of ours."""
    side, resample = image_processor.size["height"], image_processor.resample
    mean, std = (np.array(values, np.float32) for values in (image_processor.image_mean, image_processor.image_std))
    squares = []
    for content in pictures:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        large = image.resize((cut.columns * side, cut.rows * side), resample)
        boxes = [
            (side * i, side * j, side * (i + 1), side * (j + 1)) for j in range(cut.rows) for i in range(cut.columns)
        ]
        for square in [*map(large.crop, boxes), image.resize((side, side), resample)]:
            squares.append(((np.asarray(square, np.float32) / 255 - mean) / std).transpose(2, 0, 1))
    return np.stack(squares)


def crops(rounds: int) -> tuple[dict[str, float], Cut]:
    """Pictures a second of the plain loop and of ours; of the headers that lengths are known by; and how each is cut."""
    processor = stand_ins.processor()
    processor.max_crops = 9
    pictures = [jpeg(number, (1280, 960)) for number in range(CUT)]
    (cut,) = processor.plan_cuts([image_size(pictures[0])])  # all are of one size, each in a prompt of its own
    pixels = Pixels(processor.image_processor)

    def ours():
        images = [open_image(content) for content in pictures]
        return pixels(images, [plan for image in images for plan in processor.plan_cuts([image.size])])

    np.testing.assert_allclose(ours().numpy(), plain_loop(pictures, processor.image_processor, cut), atol=0.05)
    headers = pictures * 32
    work = {
        "cut pictures, plain loop": (len(pictures), lambda: plain_loop(pictures, processor.image_processor, cut)),
        "cut pictures, ready for the tower": (len(pictures), ours),
        "sizes of pictures, from their headers": (len(headers), lambda: [image_size(content) for content in headers]),
    }
    times = in_turn({name: run for name, (_, run) in work.items()}, rounds)
    return {name: work[name][0] / seconds for name, seconds in times.items()}, cut


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
    of_crops, cut = crops(args.rounds)
    speeds |= of_crops
    if args.json:
        print(json.dumps(speeds))
        return
    rows = [{"what": name, "a second and core": f"{speed:.0f}"} for name, speed in speeds.items()]
    print(
        f"{len(images)} images in {BATCH} samples; {cut.columns} x {cut.rows} crops. {machine()}.\n\n{markdown(rows)}"
    )


if __name__ == "__main__":
    main()
