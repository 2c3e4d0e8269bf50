# SPDX-License-Identifier: Apache-2.0
"""The report of the experiment with crops: one table of what each way gets right and costs."""

import json
import os

import numpy as np

from lab.crops.scenes import DIGIT_PIXELS, LARGE_DIGIT_PIXELS
from lab.loop import write_text
from lab.results import Results, estimate
from training.quickstart.digit_scenes import QUESTION_WEIGHTS

TEXT = """\
# Crops of large scenes

Scenes of 256 x 256 and 384 x 128 with digits of {small} pixels; the tower's square has 64 x 64. {questions} questions a seed about
scenes of {split} digits, which nothing was {done} on; seeds {seeds}, each with a tower and training data of its own, and
one language model for all. Every way has the same steps of the same samples. Accuracy is the share of exact answers; [in brackets] its 95 %
interval, a bootstrap over seeds and, within a seed, over scenes.

{accuracy}

`where`, `what` and `exist` are about one digit, `count`, `leftmost` and `topmost` about the whole. The control has the same
scenes with digits of {large} pixels, which squeezed are as large as the small ones in a crop.

{differences}

## What they cost

Measured alone, one after the other{device}. A step of training has 32 pictures, half of them wide, with reading and cutting
them; an answer is one of a batch of 50. Visual tokens are those of a picture of 256 x 256 / of 384 x 128.

{costs}

## The parts

What the tower reads of the digits in held-out squares, told by a linear layer, and the share of symbolic conversations that
the language model answers without a mistake:

{parts}
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy(records: list[dict], minus: list[dict] = ()) -> str:
    """Mean and interval of the answers of a row, or of their difference to another row's of the same seeds."""
    images = {("", each["seed"]): {"all": np.arange(len(each["right"]))} for each in records}
    units = [{"projector": "", "num_tokens": 1, "width": "", "tower": tower, "seed": seed} for tower, seed in images]
    results = Results(units, images)
    right, other = (
        {("", each["seed"]): {"all": np.array(each["right"], dtype=float)} for each in of} for of in (records, minus)
    )
    return str(estimate(results.difference(right, other) if other else results.draws(right)))


def share(records: list[dict], kind: str | None = None, wide: bool | None = None) -> str:
    """Mean over seeds of the answers to a kind of question, or about pictures of a shape."""
    by_seed = [
        [
            right
            for right, asked, is_wide in zip(each["right"], each["kinds"], each["wide"])
            if kind in (None, asked) and wide in (None, is_wide)
        ]
        for each in records
    ]
    return f"{np.mean([np.mean(each) for each in by_seed if each]):.2f}" if any(by_seed) else ""


def accuracy_table(rows: dict[str, list[dict]]) -> str:
    """Args: records by row of the table."""
    kinds = list(QUESTION_WEIGHTS)
    cells = [
        [
            row,
            accuracy(of),
            *(share(of, kind=kind) for kind in kinds),
            share(of, wide=False),
            share(of, wide=True),
            ", ".join(f"{np.mean(each['right']):.3f}" for each in of),
        ]
        for row, of in rows.items()
    ]
    return table(["", "all", *kinds, "256 x 256", "384 x 128", "by seed"], cells)


def difference_table(rows: dict[str, list[dict]]) -> str:
    """Crops minus squeezed at the same number of visual tokens of a square picture."""
    cells = [
        [f"{first} - {second}", accuracy(of, others)]
        for first, of in rows.items()
        for second, others in rows.items()
        if first.startswith("crops")
        and second.startswith("squeezed")
        and of[0]["tokens"]["square"] == others[0]["tokens"]["square"]
    ]
    return table(["with as many visual tokens for 256 x 256", "difference of all"], cells)


def cost_table(rows: dict[str, list[dict]], costs: list[dict]) -> str:
    costs_of = {cost["row"]: cost for cost in costs}
    cells = [
        [
            row,
            f"{of[0]['tokens']['square']} / {of[0]['tokens']['wide']}",
            f"{1000 * costs_of[row]['step']:.0f}",
            f"{1000 * costs_of[row]['answer']:.1f}",
            f"{costs_of[row]['mib']:.0f}",
        ]
        for row, of in rows.items()
    ]
    return table(["", "visual tokens", "step, ms", "answer, ms", "memory of a step, MiB"], cells)


def part_table(parts: dict) -> str:
    cells = [
        [what, ", ".join(f"{found[part][what]:.3f}" for found in parts.values())]
        for part in ("tower", "reader")
        for what in next(iter(parts.values()))[part]
    ]
    return table(["", "by seed"], cells)


def write_report(folder: str, split: str, records: list[dict], costs: list[dict], parts: dict) -> str:
    """Writes `report-SPLIT.md` and `results-SPLIT.jsonl`; returns the path of the report."""
    rows = {}
    for record in records:
        rows.setdefault(record["row"], []).append(record)
    text = TEXT.format(
        small=DIGIT_PIXELS,
        large=LARGE_DIGIT_PIXELS,
        split=split,
        done="trained or chosen" if split == "test" else "trained",
        questions=len(records[0]["right"]),
        seeds=", ".join(sorted({str(record["seed"]) for record in records})),
        accuracy=accuracy_table(rows),
        differences=difference_table(rows),
        device=" on a GPU" if costs[0]["cuda"] else " on one core",
        costs=cost_table(rows, costs),
        parts=part_table(parts),
    )
    results = "".join(json.dumps(each) + "\n" for each in [*records, *costs])
    write_text(os.path.join(folder, f"results-{split}.jsonl"), results)
    path = os.path.join(folder, f"report-{split}.md")
    write_text(path, text)
    return path
