#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Large scenes of small digits: squeezed into one square, or cut into crops.

    python lab/crops/run.py
    python lab/crops/run.py --seeds 11,12,13 --processes 4 --output_dir outputs/crops

Writes `full/report-test.md` and `full/results-test.jsonl`, or what preset and split are called, below `--output_dir`, after an
hour and a half on two cores. The same command again goes on where an earlier one was stopped, and one with another split asks the
models that are there.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))


@dataclass(frozen=True)
class Preset:
    """Sizes of a run: steps of the two parts and what they learn from, samples of the two stages, questions a seed, and steps
    that are timed."""

    tower: tuple[int, int]
    reader: tuple[int, int]
    samples: tuple[int, int]
    questions: int
    timed: int


PRESETS = {
    "full": Preset(tower=(1200, 40_000), reader=(2500, 40_000), samples=(250 * 32, 350 * 32), questions=800, timed=10),
    "smoke": Preset(tower=(2, 40), reader=(2, 40), samples=(64, 64), questions=50, timed=1),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="full", choices=tuple(PRESETS), help="smoke: whether everything runs")
    parser.add_argument("--ways", help="names of lab/crops/ways.py, with commas between them; default: all")
    parser.add_argument(
        "--seeds", default="0,1,2", help="with commas between them; each has a tower and samples of its own"
    )
    parser.add_argument(
        "--split", default="test", choices=("validation", "test"), help="of the digits that are asked about"
    )
    parser.add_argument(
        "--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="default: half the cores"
    )
    parser.add_argument("--output_dir", default=os.path.join("outputs", "crops"), help="default: outputs/crops")
    return parser.parse_args()


def run(preset: Preset, seeds: list[int], names: str | None, split: str, processes: int, folder: str) -> str:
    """Does what is left to do, and writes the report. Returns its path.

    Raises:
        ValueError: a way that is not one.
    """
    from lab.crops.report import write_report
    from lab.crops.stand_ins import check_parts, make_reader, make_tower, parts_path
    from lab.crops.ways import STAGES, WAYS, measure, record_path, samples_folder, train_and_ask, write_samples
    from lab.workers import Workers
    from training.quickstart.run import is_model

    unknown = sorted(set(names.split(",") if names else ()) - set(WAYS))
    if unknown:
        raise ValueError(f"--ways {', '.join(unknown)}: unknown; known are {', '.join(WAYS)}")
    chosen = {name: WAYS[name] for name in (names.split(",") if names else WAYS)}
    folders = {seed: os.path.join(folder, f"seed{seed}") for seed in seeds}
    reader = os.path.join(folder, "reader")
    parts, ways = [], []
    if not is_model(reader):
        parts.append((make_reader, (reader, 0, *preset.reader)))
    for seed, own in folders.items():
        tower = os.path.join(own, "tower")
        if not is_model(tower):
            parts.append((make_tower, (tower, seed, *preset.tower)))
        for pixels in sorted({way.digit_pixels for way in chosen.values()}):
            for stage, number in zip(STAGES, preset.samples):
                data = samples_folder(own, stage, pixels)
                if not os.path.isfile(os.path.join(data, "dataset_info.json")):  # written last
                    parts.append((write_samples, (data, stage, seed * len(STAGES), number, pixels)))
    # The longest first.
    for name in sorted(chosen, key=lambda name: "max_crops" not in WAYS[name].settings):
        for seed, own in folders.items():
            if not os.path.isfile(record_path(own, name, split)):
                ways.append((train_and_ask, (name, own, reader, seed, split, preset.questions)))
    with Workers(processes) as workers:
        workers.do(parts, "Parts and samples")
        ways += [
            (check_parts, (own, reader, seed, split, preset.questions))
            for seed, own in folders.items()
            if not os.path.isfile(parts_path(own, split))
        ]
        workers.do(ways, "Ways")
    first, costs = folders[seeds[0]], []
    for name, way in chosen.items():
        for place, (row, settings) in enumerate(way.rows()):
            path = os.path.join(folder, f"cost-{name}-{place}.json")
            if not os.path.isfile(path):
                with Workers(1) as alone:
                    alone.do([(measure, (name, row, settings, first, path, preset.timed))], f"Cost of {row}")
            costs.append(read(path))
    records = [each for own in folders.values() for name in chosen for each in read(record_path(own, name, split))]
    parts_of = {seed: read(parts_path(own, split)) for seed, own in folders.items()}
    return write_report(folder, split, records, costs, parts_of)


def read(path: str):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in lab/run.py
    arguments = parse_arguments()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    preset, folder = PRESETS[arguments.preset], os.path.join(arguments.output_dir, arguments.preset)
    try:
        report = run(preset, seeds, arguments.ways, arguments.split, arguments.processes, folder)
        print(f"\nReport: {report}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; the same command goes on behind what is finished")


if __name__ == "__main__":
    main()
