# SPDX-License-Identifier: Apache-2.0
"""How long a recipe takes to open an annotation file of a million records, and how much memory.

    python benchmarks/startup.py

Writes files in the formats of VQAv2 (two of them) and LLaVA150K, each with a million records, and opens each twice in a fresh
process: first with an empty cache, then again. Images do not matter here and are not made. Time is wall-clock from the
settings to the first sample's words, without the imports that every training script pays; memory is the peak resident size of
the whole process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

OPEN = """
import random, resource, sys, time
from training.recipe.config import parse_recipe
from training.recipe.mixture import make_sample
from training.recipe.sources import open_sources
start, cpu = time.perf_counter(), time.process_time()
(source,) = open_sources(parse_recipe({"data_root": sys.argv[1], "datasets": [sys.argv[2]], "balancing": "per-dataset"}))
make_sample(source, 0, source.records[0], random.Random(0))
print(time.perf_counter() - start, time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def write_vqav2(root: Path, count: int) -> None:
    """About 5.4 questions an image, as in the original."""
    folder = root / "VQAv2"
    folder.mkdir(parents=True)
    with (
        open(folder / "v2_OpenEnded_mscoco_train2014_questions.json", "w") as questions,
        open(folder / "v2_mscoco_train2014_annotations.json", "w") as annotations,
    ):
        questions.write('{"data_subtype": "train2014", "questions": [')
        annotations.write('{"data_subtype": "train2014", "annotations": [')
        for key in range(count):
            comma = ", " if key else ""
            both = {"image_id": key * 10 // 54, "question_id": key}
            questions.write(
                comma + json.dumps({**both, "question": f"What is the thing number {key % 977} behind the table?"})
            )
            answers = [{"answer": "net", "answer_confidence": "maybe", "answer_id": person} for person in range(10)]
            annotation = {"question_type": "what is", "multiple_choice_answer": str(key % 91), "answers": answers}
            annotations.write(comma + json.dumps({**both, **annotation}))
        questions.write("]}")
        annotations.write("]}")


def write_llava150k(root: Path, count: int) -> None:
    """All in one of the three files: two questions with answers of some 200 characters."""
    folder = root / "llava_instruct_150k"
    folder.mkdir(parents=True)
    for name in ("conversation_58k.json", "detail_23k.json"):
        (folder / name).write_text("[]")
    with open(folder / "complex_reasoning_77k.json", "w") as file:
        file.write("[")
        for key in range(count):
            answer = f"The picture number {key} shows a street with people in front of a shop. " * 3
            said = [("human", "<image>\\nWhat is shown?"), ("gpt", answer), ("human", "Why?"), ("gpt", answer)]
            conversation = [{"from": role, "value": text} for role, text in said]
            row = {"id": f"{key:012}", "image": f"{key:012}.jpg", "conversations": conversation}
            file.write((", " if key else "") + json.dumps(row))
        file.write("]")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000, help="in each dataset (%(default)s)")
    args = parser.parse_args()
    print(
        "| annotations | size | first start (CPU) | peak memory | second start (CPU) | peak memory |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write_vqav2(root, args.records)
        write_llava150k(root, args.records)
        for name, files in (("vqav2", "VQAv2"), ("llava150k", "llava_instruct_150k")):
            size = sum(file.stat().st_size for file in (root / files).iterdir())
            cells = [f"{name}, {args.records:,} records", f"{size / 1e9:.2f} GB"]
            for _ in range(2):
                result = subprocess.run(
                    [sys.executable, "-c", OPEN, str(root), name],
                    env={**os.environ, "HF_HOME": f"{folder}/cache", "HF_DATASETS_CACHE": f"{folder}/cache"},
                    check=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                seconds, cpu, memory = map(float, result.stdout.split())
                cells += [f"{seconds:.1f} s ({cpu:.1f} s)", f"{memory:.2f} GiB"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
