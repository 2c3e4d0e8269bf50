# SPDX-License-Identifier: Apache-2.0
"""Evaluates a Honeybee on the paper's benchmarks, or scores saved predictions.

    python evaluation/run.py --model outputs/instruct --tasks mme,mmbench,seed --data_root data --output outputs/eval
    python evaluation/run.py --tasks mme --predictions predictions.jsonl --output outputs/eval

The same command again continues after an interruption. Several GPUs: `accelerate launch evaluation/run.py ...`, or one
model over several: `--device_map auto`. Judged tasks: see the variables in judge.py.
"""

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path

from evaluation import judge as judging
from evaluation import report as reporting
from evaluation.predictions import (
    append_lines,
    check_folder,
    collect,
    part_of_rank,
    read_lines,
    write_json,
    write_lines,
)
from evaluation.prompts import TEMPLATES, plain, render
from evaluation.readers import READERS, read_task
from evaluation.scorers import (
    MMBENCH_SEED,
    Score,
    check_records,
    score_llava_w,
    score_mm_vet,
    score_mmbench,
    score_mme,
    score_mmmu,
    score_pope,
    score_scienceqa,
    score_seed,
    undecided_mmbench,
)
from evaluation.submissions import NEEDS, write_submission

# The benchmarks' answers are at most this many tokens long.
MAX_NEW_TOKENS = {
    "mme": 20, "seed": 20, "pope": 20, "mmmu": 40, "mmbench": 128, "scienceqa": 128, "llava_w": 1024, "mm_vet": 1024,
    "owl": 512,
}  # fmt: skip
SCORERS = {
    "mme": score_mme,
    "pope": score_pope,
    "mmbench": score_mmbench,
    "scienceqa": score_scienceqa,
    "seed": score_seed,
    "mmmu": score_mmmu,
}
GUESSING = ("mmbench", "scienceqa", "mmmu")
JUDGED = {
    "llava_w": (judging.llava_w_request, score_llava_w, ("context", "reference")),
    "mm_vet": (judging.mm_vet_request, score_mm_vet, ()),
}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of a saved Honeybee")
    parser.add_argument("--tasks", required=True, help=f"comma-separated, or all: {', '.join(READERS)}")
    parser.add_argument("--data_root", help="folder of the benchmarks, laid out as in readers.py")
    parser.add_argument("--output", required=True, help="folder for predictions, scores and the report")
    parser.add_argument("--predictions", help="score this JSONL file instead of asking a model; one task")
    parser.add_argument("--batch_size", type=int, default=8, help="questions at a time, per process")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument(
        "--device_map", help="spreads one model over the devices, as in transformers: auto, balanced ..."
    )
    parser.add_argument(
        "--template", default="task", choices=TEMPLATES, help="none: the bare question, without an instruction"
    )
    parser.add_argument(
        "--seed", type=int, help=f"of guesses; default: MMBench {MMBENCH_SEED} (the official one), others 0"
    )
    parser.add_argument(
        "--paper_row", choices=reporting.PAPER_MODELS, help="published model to compare with, if not found by itself"
    )
    parser.add_argument("--judge_workers", type=int, default=8, help="requests to the judge at the same time")
    parser.add_argument("--judge_timeout", type=float, default=120, help="seconds for one request")
    parser.add_argument(
        "--judge_attempts", type=int, default=6, help="requests for one item before it is reported as not judged"
    )
    parser.add_argument(
        "--judge_mmbench", action="store_true", help="the judge reads MMBench answers that the rules cannot"
    )
    arguments = parser.parse_args(argv)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    arguments.tasks = list(READERS) if names == ["all"] else list(dict.fromkeys(names))
    unknown = [name for name in arguments.tasks if name not in READERS]
    if unknown or not arguments.tasks:
        raise ValueError(f"--tasks: {', '.join(unknown) or 'nothing'} is no task; they are {', '.join(READERS)}")
    if arguments.predictions is None:
        for name in ("model", "data_root"):
            if getattr(arguments, name) is None:
                raise ValueError(f"--{name} is missing; give it, or saved predictions with --predictions FILE")
        if not Path(arguments.data_root).is_dir():
            raise ValueError(f"--data_root {arguments.data_root} does not exist; give the folder of the benchmarks")
    else:
        if len(arguments.tasks) != 1:
            raise ValueError(
                f"--predictions is one task's file, and --tasks names {len(arguments.tasks)}; name its task"
            )
        if not Path(arguments.predictions).is_file():
            raise ValueError(f"--predictions {arguments.predictions} does not exist; give a JSONL file")
    for name in ("batch_size", "judge_workers", "judge_attempts"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)} must be at least 1")
    return arguments


def score(task: str, records: list[dict], arguments, judge: judging.Judge | None) -> dict:
    """What goes into scores.json, but for where it comes from; the parsed answers are under `parsed`."""
    notes, judged = [], None
    if task in SCORERS:
        settings = {}
        if task in GUESSING and arguments.seed is not None:
            settings["seed"] = arguments.seed
        if task == "mmbench" and arguments.judge_mmbench and judge is not None:
            judged = judge([judging.mmbench_request(record) for record in undecided_mmbench(records)])
            settings["extracted"] = judged.judged
        result = SCORERS[task](records, **settings)
        if result.quirks.get("guess"):
            notes.append(f"{result.quirks['guess']} of {len(records)} answers were guesses")
    elif task in JUDGED:
        make_request, scorer, needed = JUDGED[task]
        complete = [record for record in records if all(record.get(name) for name in needed)]
        if judge is None:
            notes.append(f"not judged; set {judging.ENVIRONMENT['url']} and {judging.ENVIRONMENT['model']}")
            result = scorer(records, {})
        else:
            judged = judge([make_request(record) for record in complete])
            for record in records:
                if record not in complete:
                    judged.failed[str(record["id"])] = (
                        "no context or reference answer; put context.jsonl and answers_gpt4.jsonl beside questions.jsonl"
                    )
            result = scorer(records, judged.judged)
            if judged.failed:
                notes.append(
                    f"{len(judged.failed)} of {len(records)} answers were not judged, and are not in the score"
                )
    else:
        result = Score({})
        notes.append("has no automatic score; the answers are in predictions.jsonl")
    out = {
        "task": task,
        "questions": len(records),
        "summary": result.summary,
        "quirks": result.quirks,
        "notes": notes,
        "details": result.details,
        "parsed": result.parsed,
    }
    if judged is not None:
        out["judge"] = {
            "model": judge.model, "judged": len(judged.judged), "failed": judged.failed, "cost": judged.cost,
        }  # fmt: skip
    return out


def finish(
    task, records, folder: Path, source: Path, arguments, judge, model: str | None, model_name: str | None
) -> None:
    """Scores a task's records and writes scores.json, parsed.jsonl and the submission."""
    result = score(task, records, arguments, judge)
    write_lines(folder / "parsed.jsonl", result.pop("parsed"))
    if task in NEEDS and importlib.util.find_spec(NEEDS[task]) is None:
        result["notes"].append(f"no submission file: pip install {NEEDS[task]}")
    result.update(
        submission=write_submission(task, records, folder),
        predictions=str(source),
        sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
        model=model,
        model_name=model_name,
    )
    write_json(folder / "scores.json", result)
    digits = 3 if task in reporting.FRACTIONS else 1
    shown = ", ".join(
        f"{name} {reporting.number(value, digits)}" for name, value in list(result["summary"].items())[:4]
    )
    print(
        f"{task}: {len(records)} questions; {shown or 'no score'}", *(f"  note: {n}" for n in result["notes"]), sep="\n"
    )


def with_problems(records: list[dict], data_root: str | None) -> list[dict]:
    """ScienceQA predictions with choices and answers of the data root's problems.json, where there is one."""
    path = Path(data_root or "", "ScienceQA", "problems.json")
    if data_root is None or not path.exists():
        return records
    problems = json.loads(path.read_text(encoding="utf-8"))
    keys = [str(record.get("question_id", record.get("id"))) for record in records]
    unknown = [key for key in keys if key not in problems]
    if unknown:
        raise ValueError(f"question_id {unknown[0]!r} is not in {path}; give the predictions of this data")
    return [
        {**record, "choices": problems[key]["choices"], "answer": problems[key]["answer"]}
        for record, key in zip(records, keys)
    ]


def make_judge(arguments, output: Path) -> judging.Judge | None:
    judge = judging.Judge.from_environment(
        output / "judge_cache.jsonl",
        workers=arguments.judge_workers,
        timeout=arguments.judge_timeout,
        attempts=arguments.judge_attempts,
    )
    if judge is None and arguments.judge_mmbench:
        raise ValueError(
            f"--judge_mmbench needs a judge; set {judging.ENVIRONMENT['url']} and {judging.ENVIRONMENT['model']}"
        )
    return judge


def score_predictions(arguments) -> None:
    output, task, source = Path(arguments.output), arguments.tasks[0], Path(arguments.predictions)
    judge = make_judge(arguments, output)
    records = read_lines(source)
    if task == "scienceqa":
        records = with_problems(records, arguments.data_root)
    check_records(task, records, str(source))
    marks = {record.get("model") for record in records}
    if len(marks) > 1:
        raise ValueError(
            f"{source} has predictions of several models ({', '.join(map(str, marks))}); score one at a time"
        )
    model, model_name, published = marks.pop(), None, arguments.paper_row
    if arguments.model is not None:
        from evaluation.generate import fingerprint
        from modeling_honeybee.model_folder import model_folder

        folder = model_folder(arguments.model)
        if model != fingerprint(folder):
            raise ValueError(
                f"{source} has predictions of model {model}, and {arguments.model} is {fingerprint(folder)}; "
                "leave out --model, or give that model's predictions"
            )
        model_name, published = arguments.model, published or reporting.paper_model(folder)
    described = source.parent / "run.json"
    if model_name is None and model is not None and described.exists():
        model_name = json.loads(described.read_text(encoding="utf-8")).get("model_name")
    reporting.check_output(output, model)
    folder = output / task
    earlier = folder / "scores.json"
    if earlier.exists():
        if json.loads(earlier.read_text(encoding="utf-8"))["sha256"] != hashlib.sha256(source.read_bytes()).hexdigest():
            raise ValueError(f"{earlier} is of other predictions; give another --output, or remove it")
    elif next(folder.glob("predictions*.jsonl"), source).resolve() != source.resolve():
        raise ValueError(f"{folder} holds the predictions of another run; give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    finish(task, records, folder, source, arguments, judge, model, model_name)
    reporting.write(output, model_name, published)


def evaluate(arguments) -> None:
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from filelock import FileLock, Timeout
    from tqdm.auto import tqdm

    from evaluation.generate import answer, fingerprint, load, share
    from modeling_honeybee.model_folder import model_folder

    # The first process waits for the slowest one; the default of ten minutes is too short for that.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=datetime.timedelta(days=7))
    if state.num_processes > 1 and arguments.device_map:
        raise ValueError("--device_map spreads one model over all devices; leave it out where several processes run")
    output = Path(arguments.output)
    judge = make_judge(arguments, output)
    # What is wrong is said before the model is loaded.
    source = model_folder(arguments.model)
    questions = {task: read_task(task, arguments.data_root) for task in arguments.tasks}
    model_id = fingerprint(source)
    reporting.check_output(output, model_id)
    # What decides an answer; a run that continues has the same.
    settings = {
        task: {
            "model": model_id,
            "dtype": arguments.dtype,
            "template": arguments.template,
            "max_new_tokens": MAX_NEW_TOKENS[task],
        }
        for task in arguments.tasks
    }
    for task in arguments.tasks:
        check_folder(output / task, settings[task])
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".lock", timeout=0)
    if state.is_main_process:
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(f"another run writes to {output}; wait for it, or give another --output") from None
    model, processor = load(source, arguments.dtype, state.device, arguments.device_map)
    if state.is_main_process:
        print(f"{arguments.model}: {model.dtype}, {state.num_processes} process(es) on {model.device.type}", flush=True)
    prompts = {
        task: {q.id: plain(render(q, processor, arguments.template), processor) for q in questions[task]}
        for task in arguments.tasks
    }
    for task in arguments.tasks:
        folder = output / task
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            done = collect(folder, prompts[task], model_id)
            write_json(folder / "run.json", {**settings[task], "model_name": arguments.model, "task": task})
        state.wait_for_everyone()
        if not state.is_main_process:
            path = folder / "predictions.jsonl"
            done = {str(record["id"]): record for record in read_lines(path)} if path.exists() else {}
        state.wait_for_everyone()  # nobody appends before everybody has read
        pending = [q for q in questions[task] if q.id not in done]
        batches = share(pending, prompts[task], arguments.batch_size, state.process_index, state.num_processes)
        part = part_of_rank(folder, state.process_index)
        bar = tqdm(
            total=sum(map(len, batches)), desc=f"{task} ({len(done)} done before)", disable=not state.is_main_process
        )
        for batch in answer(model, processor, batches, MAX_NEW_TOKENS[task], arguments.template):
            append_lines(
                part,
                [
                    {"id": q.id, "pred": text, "prompt": prompts[task][q.id], **q.fields, "model": model_id}
                    for q, text in batch
                ],
            )
            bar.update(len(batch))
        bar.close()
    state.wait_for_everyone()
    state.destroy_process_group()
    if not state.is_main_process:
        return
    for task in arguments.tasks:
        folder = output / task
        records = list(collect(folder, prompts[task], model_id).values())
        check_records(task, records, str(folder))
        finish(task, records, folder, folder / "predictions.jsonl", arguments, judge, model_id, arguments.model)
    report = reporting.write(output, arguments.model, arguments.paper_row or reporting.paper_model(source))
    averages = ", ".join(f"{name} {reporting.number(value)}" for name, value in report["averages"].items())
    print(f"averages: {averages}\nreport: {output / 'report.md'}")


def main(argv=None) -> None:
    # Waiting threads of torch would spin and take the core from the one that they wait for, wherever other work runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
    try:
        arguments = parse_arguments(argv)
        if arguments.predictions is not None:
            score_predictions(arguments)
        else:
            evaluate(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues behind the answers that are saved", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
