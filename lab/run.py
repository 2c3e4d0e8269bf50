#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compares projectors between the same vision tower and language model, with error bars.

    python lab/run.py                               # at most ten minutes on two cores
    python lab/run.py --preset full                 # at most three hours
    python lab/run.py --projectors mine,c-abs
    python lab/run.py --config lab/real_parts.yaml --dry_run

Writes `report.md`, its pictures and `results.jsonl` below `--output_dir`. The same command again goes on where an earlier
one was stopped.
"""

import argparse
import glob
import json
import os
import sys
from functools import partial


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--preset",
        default="quick",
        choices=("smoke", "quick", "full", "elastic"),
        help="quick (default): one tower, one pair of stand-ins; full: all claims; elastic: one model for several M; smoke: "
        "whether everything runs",
    )
    what.add_argument("--config", help="a YAML file that names a pretrained tower, a language model and a dataset")
    parser.add_argument("--projectors", help="names of lab/projectors.py, with commas between them; default: all")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds (default: 0)")
    parser.add_argument("--processes", type=int, help="default: one a core; with --config what the file says")
    parser.add_argument("--output_dir", default=os.path.join("outputs", "lab"), help="default: outputs/lab")
    parser.add_argument("--dry_run", action="store_true", help="say what would be trained, and end")
    return parser.parse_args()


def number_of_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def compare(variants: list, preset, tasks: list, processes: int, folder: str, scope: str) -> str:
    """Does what is left to do, and writes the report. Returns its path."""
    from lab.experiment import run
    from lab.plan import best_rate, experiments, rate_search
    from lab.report import Report
    from lab.workers import Workers

    runs = os.path.join(folder, "runs")
    os.makedirs(runs, exist_ok=True)
    with Workers(processes) as workers:

        def run_all(planned, title):
            paths = [os.path.join(runs, experiment.name + ".json") for experiment in planned]
            missing = [(run, (each, runs)) for each, path in zip(planned, paths) if not os.path.isfile(path)]
            workers.do(missing, title)
            return [read_record(path) for path in paths]

        preparations = {path: call for task in tasks for path, call in task.preparations().items()}
        workers.do([(call, ()) for path, call in preparations.items() if not os.path.isfile(path)], "Preparations")
        num_patches = tasks[0].num_patches
        searched = rate_search(variants, preset, tasks[0], partial(run_all, title="Learning rates"))
        rates = {variant: best_rate(found) for variant, found in searched.items()}
        records = run_all(experiments(rates, preset, tasks, num_patches), "Experiments")
    for path in glob.glob(os.path.join(glob.escape(runs), "*.state")):
        os.remove(path)  # of a process that was killed when it had just finished
    return Report(folder, records, searched, preset, tasks, num_patches).write(scope)


def read_record(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def main() -> None:
    # Waiting threads of torch would spin and take a core from another process.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
    arguments = parse_arguments()
    from lab.dry_run import describe
    from lab.plan import PRESETS, variants_of
    from lab.projectors import names_of
    from lab.scene_task import SCOPE, scene_tasks

    try:
        shared = os.path.join(arguments.output_dir, "shared")
        if arguments.config:
            from lab.dataset_task import dataset_tasks, read_config  # loads datasets

            parts, preset = read_config(arguments.config)
            tasks, scope, processes = dataset_tasks(parts, preset, arguments.seed, shared), parts.scope, parts.processes
            title = os.path.basename(arguments.config)
        else:
            preset, title, processes = PRESETS[arguments.preset], arguments.preset, number_of_cores()
            tasks, scope = scene_tasks(preset, arguments.seed, shared), SCOPE
        variants = variants_of(names_of(arguments.projectors, preset.left_out), preset, tasks[0])
        print(describe(variants, preset, tasks), flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if arguments.dry_run:
        return
    folder = os.path.join(arguments.output_dir, f"{title}-seed{arguments.seed}")
    try:
        print(f"\nReport: {compare(variants, preset, tasks, arguments.processes or processes, folder, scope)}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; the same command goes on behind what is finished")


if __name__ == "__main__":
    main()
