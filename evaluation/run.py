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
import json
import os
import sys
from pathlib import Path

from evaluation import judge as judging
from evaluation import report as reporting
from evaluation.json_files import append_lines, read_lines, write_json
from evaluation.predictions import PREDICTIONS, check_folder, collect, part_of_rank
from evaluation.prompts import TEMPLATES, Question, plain, render
from evaluation.results import origin_of, write_results
from evaluation.task import Task, check_records, read_task, subset
from evaluation.tasks import TASKS

# Rules score these, and a judge can help.
JUDGED_ON_REQUEST = [name for name, task in TASKS.items() if task.judging and task.judging.optional]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of a saved Honeybee")
    parser.add_argument("--tasks", required=True, help=f"comma-separated, or all: {', '.join(TASKS)}")
    parser.add_argument("--data_root", help="folder of the benchmarks, laid out as in the files of tasks/")
    parser.add_argument("--output", required=True, help="folder for predictions, scores and the report")
    parser.add_argument("--predictions", help="score this JSONL file instead of asking a model; one task")
    parser.add_argument(
        "--limit", type=int, help="ask a subset of each task: at most so many questions, the same ones each time"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="questions at a time, per process")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument(
        "--device_map", help="spreads one model over the devices, as in transformers: auto, balanced ..."
    )
    parser.add_argument(
        "--template", default="task", choices=TEMPLATES, help="none: the bare question, without an instruction"
    )
    parser.add_argument(
        "--num_query_tokens",
        help="M, visual tokens of an image, of an elastic model: 64, or several with one table: 16,64,144",
    )
    parser.add_argument(
        "--allow_untrained",
        action="store_true",
        help="with --num_query_tokens: also numbers that the model is not trained for",
    )
    parser.add_argument(
        "--max_crops",
        type=int,
        help="the most crops of a picture; 1 cuts none (default: what the model's processor says)",
    )
    official = TASKS["mmbench"].seed
    parser.add_argument(
        "--seed", type=int, help=f"of guesses; default: MMBench {official} (the official one), others 0"
    )
    parser.add_argument(
        "--paper_row", choices=reporting.PAPER_MODELS, help="published model to compare with, if not found by itself"
    )
    parser.add_argument("--judge_workers", type=int, default=8, help="requests to the judge at the same time")
    parser.add_argument("--judge_timeout", type=float, default=120, help="seconds for one request")
    parser.add_argument(
        "--judge_attempts", type=int, default=6, help="requests for one item before it is reported as not judged"
    )
    for name in JUDGED_ON_REQUEST:
        title = TASKS[name].display_name
        parser.add_argument(
            f"--judge_{name}", action="store_true", help=f"the judge reads {title} answers that the rules cannot"
        )
    return parser


def parse_arguments(argv=None) -> argparse.Namespace:
    """The arguments, checked; `tasks` are `Task`s."""
    arguments = make_parser().parse_args(argv)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    names = list(TASKS) if names == ["all"] else list(dict.fromkeys(names))
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(f"--tasks: {', '.join(unknown) or 'nothing'} is no task; they are {', '.join(TASKS)}")
    arguments.tasks = [TASKS[name] for name in names]
    if arguments.predictions is None:
        for name in ("model", "data_root"):
            if getattr(arguments, name) is None:
                raise ValueError(f"--{name} is missing; give it, or saved predictions with --predictions FILE")
        if not Path(arguments.data_root).is_dir():
            raise ValueError(f"--data_root {arguments.data_root} does not exist; give the folder of the benchmarks")
    else:
        if len(names) != 1:
            raise ValueError(f"--predictions is one task's file, and --tasks names {len(names)}; name its task")
        if arguments.limit is not None:
            raise ValueError(
                f"--limit {arguments.limit} chooses what a model is asked; leave it out with --predictions"
            )
        if not Path(arguments.predictions).is_file():
            raise ValueError(f"--predictions {arguments.predictions} does not exist; give a JSONL file")
    if arguments.num_query_tokens is not None:
        if arguments.predictions is not None:
            raise ValueError("--num_query_tokens is asked of a model; leave it out with --predictions")
        arguments.num_query_tokens = numbers_in(arguments.num_query_tokens)
    elif arguments.allow_untrained:
        raise ValueError("--allow_untrained is for --num_query_tokens; give numbers, such as 4,16,64, or leave it out")
    if arguments.max_crops is not None and arguments.predictions is not None:
        raise ValueError(f"--max_crops {arguments.max_crops} is asked of a model; leave it out with --predictions")
    for name in ("batch_size", "judge_workers", "judge_attempts", "limit", "max_crops"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    return arguments


def numbers_in(text: str) -> list[int]:
    """In ascending order.

    Raises:
        ValueError: it is no list of numbers.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"--num_query_tokens {text!r} must be numbers of at least 1, such as 16,64,144")
    return sorted(set(map(int, parts)))


def check_numbers(folder: Path, arguments) -> None:
    """Whether the model can make these numbers of visual tokens, before its weights are read.

    Raises:
        ValueError: says what it can.
    """
    from modeling_honeybee import HoneybeeConfig
    from processing import HoneybeeProcessor

    projector = HoneybeeConfig.from_pretrained(folder).projector_config
    processor = HoneybeeProcessor.from_pretrained(folder)
    for number in arguments.num_query_tokens:
        projector.check_num_query_tokens(number)
        if not arguments.allow_untrained:
            try:
                processor.check_is_trained(number)
            except ValueError as error:
                raise ValueError(f"{error}, or --allow_untrained to ask it all the same") from None


def make_judge(arguments, output: Path) -> judging.Judge | None:
    judge = judging.Judge.from_environment(
        output / "judge_cache.jsonl",
        workers=arguments.judge_workers,
        timeout=arguments.judge_timeout,
        attempts=arguments.judge_attempts,
    )
    for name in JUDGED_ON_REQUEST:
        if judge is None and getattr(arguments, f"judge_{name}"):
            raise ValueError(
                f"--judge_{name} needs a judge; set {judging.ENVIRONMENT['url']} and {judging.ENVIRONMENT['model']}"
            )
    return judge


# Saved predictions -----------------------------------------------------------------------------------------------------


def read_predictions(task: Task, source: Path, data_root: str | None) -> tuple[list[dict], str | None]:
    """(records, fingerprint of the model that they name)."""
    records = read_lines(source)
    if task.complete is not None and data_root is not None:
        records = task.complete(records, task.data(data_root))
    check_records(task, records, str(source))
    models = {record.get("model") for record in records}
    if len(models) > 1:
        raise ValueError(
            f"{source} has predictions of several models ({', '.join(map(str, models))}); score one at a time"
        )
    return records, models.pop()


def check_model(source: Path, model: str | None, name: str) -> Path:
    """The folder of `--model`.

    Raises:
        ValueError: the predictions are another model's.
    """
    from evaluation.generate import fingerprint
    from modeling_honeybee.model_folder import model_folder

    folder = model_folder(name)
    if model != fingerprint(folder):
        raise ValueError(
            f"{source} has predictions of model {model}, and {name} is {fingerprint(folder)}; "
            "leave out --model, or give that model's predictions"
        )
    return folder


def check_earlier_scores(folder: Path, source: Path) -> None:
    """Refuses a task's folder that holds what comes of other predictions."""
    earlier = folder / "scores.json"
    if earlier.exists():
        if json.loads(earlier.read_text(encoding="utf-8"))["sha256"] != hashlib.sha256(source.read_bytes()).hexdigest():
            raise ValueError(f"{earlier} is of other predictions; give another --output, or remove it")
    elif next(folder.glob("predictions*.jsonl"), source).resolve() != source.resolve():
        raise ValueError(f"{folder} holds the predictions of another run; give another --output")


def score_predictions(arguments) -> None:
    output, task, source = Path(arguments.output), arguments.tasks[0], Path(arguments.predictions)
    judge = make_judge(arguments, output)
    records, model = read_predictions(task, source, arguments.data_root)
    model_name, published = arguments.model, arguments.paper_row
    if model_name is not None:
        folder = check_model(source, model, model_name)
        published = published or reporting.paper_model(folder)
    elif model is not None and (source.parent / "run.json").exists():
        model_name = json.loads((source.parent / "run.json").read_text(encoding="utf-8")).get("model_name")
    reporting.check_output(output, model)
    folder = output / task.name
    check_earlier_scores(folder, source)
    folder.mkdir(parents=True, exist_ok=True)
    write_results(task, records, folder, origin_of(source, model, model_name), arguments, judge)
    reporting.write(output, model_name, published)


# A model's answers -----------------------------------------------------------------------------------------------------


def join_processes(arguments):
    """accelerate's `PartialState` of all processes of this run."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # The first process waits for the slowest one; the default of ten minutes is too short for that.
    state = PartialState(cpu=cpu, timeout=datetime.timedelta(days=7))
    if state.num_processes > 1 and arguments.device_map:
        raise ValueError("--device_map spreads one model over all devices; leave it out where several processes run")
    return state


def lock(output: Path):
    """Keeps other runs out of the folder, as long as somebody holds what this returns."""
    from filelock import FileLock, Timeout

    held = FileLock(output / ".lock", timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise ValueError(f"another run writes to {output}; wait for it, or give another --output") from None
    return held


def read_answers(folder: Path, prompts: dict[str, str], settings: dict, model_name: str, state) -> dict[str, dict]:
    """The answers of earlier runs by id, the same in every process. The main process writes `run.json`."""
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        done = collect(folder, prompts, settings["model"])
        write_json(folder / "run.json", {**settings, "model_name": model_name, "task": folder.name})
    state.wait_for_everyone()
    if not state.is_main_process:
        path = folder / PREDICTIONS
        done = {str(record["id"]): record for record in read_lines(path)} if path.exists() else {}
    state.wait_for_everyone()  # nobody appends before everybody has read
    return done


def processor_settings(num_query_tokens: int | None, arguments) -> dict:
    """How the processor is called for this M; None leaves it to the model, as it does the crops."""
    crops = {} if arguments.max_crops is None else {"max_crops": arguments.max_crops}
    if num_query_tokens is None:
        return crops
    return {"num_query_tokens": num_query_tokens, "allow_untrained": arguments.allow_untrained, **crops}


def ask(
    model, processor, task: Task, questions: list[Question], prompts, settings: dict, folder: Path, arguments, state
) -> None:
    """Appends this process's answers to its file in the task's folder, but for those that are there."""
    from tqdm.auto import tqdm

    from evaluation.generate import answer, batches_of_rank

    done = read_answers(folder, prompts, settings, arguments.model, state)
    pending = [q for q in questions if q.id not in done]
    batches = batches_of_rank(pending, prompts, arguments.batch_size, state.process_index, state.num_processes)
    part = part_of_rank(folder, state.process_index)
    number = settings.get("num_query_tokens")
    title = f"{task.name}{'' if number is None else f', M = {number}'} ({len(done)} done before)"
    asked = processor_settings(number, arguments)
    with tqdm(total=sum(map(len, batches)), desc=title, disable=not state.is_main_process) as bar:
        for batch in answer(model, processor, batches, task.max_new_tokens, arguments.template, asked):
            records = [{**q.answered(text, prompts[q.id]), "model": settings["model"]} for q, text in batch]
            append_lines(part, records)
            bar.update(len(batch))


def write_curve(model, processor, questions: dict[str, list[Question]], arguments) -> None:
    from evaluation import curve

    output, seconds = Path(arguments.output), None
    numbers = curve.numbers_in(output)  # of earlier runs of this model, too
    if example := next((q for asked in questions.values() for q in asked if q.image is not None), None):
        settings = [{**processor_settings(number, arguments), "allow_untrained": True} for number in numbers]
        seconds = curve.prefill_seconds(model, processor, example, arguments.template, settings)
    default, max_crops = processor.num_query_tokens, arguments.max_crops or processor.max_crops
    found = curve.write(output, arguments.model, numbers, default, processor.num_eos_tokens, seconds, max_crops)
    print(f"{found['text']}\ncurve: {output / 'curve.md'}")


def evaluate(arguments) -> None:
    """Asks the model, in one or several processes; the first one scores the answers."""
    from evaluation import curve
    from evaluation.generate import fingerprint, load
    from modeling_honeybee.model_folder import model_folder
    from modeling_honeybee.processes import leave_processes

    state = join_processes(arguments)
    output, tasks = Path(arguments.output), arguments.tasks
    # All checks come before the model is loaded.
    judge = make_judge(arguments, output)
    source = model_folder(arguments.model)
    questions = {task.name: subset(task, read_task(task, arguments.data_root), arguments.limit) for task in tasks}
    model_id = fingerprint(source)
    # What decides an answer; a run that continues has the same.
    shared = {"model": model_id, "dtype": arguments.dtype, "template": arguments.template, "limit": arguments.limit}
    shared["max_crops"] = arguments.max_crops
    if arguments.num_query_tokens is None:
        parts = {output: shared}
    else:
        check_numbers(source, arguments)
        curve.check_output(output, model_id, arguments.max_crops)
        parts = {curve.folder_of(output, n): {**shared, "num_query_tokens": n} for n in arguments.num_query_tokens}
    for part, settings in parts.items():
        reporting.check_output(part, model_id)
        for task in tasks:
            check_folder(part / task.name, {**settings, "max_new_tokens": task.max_new_tokens})
    output.mkdir(parents=True, exist_ok=True)
    held = lock(output) if state.is_main_process else None

    model, processor = load(source, arguments.dtype, state.device, arguments.device_map)
    if state.is_main_process:
        print(f"{arguments.model}: {model.dtype}, {state.num_processes} process(es) on {model.device.type}", flush=True)
    prompts = {
        name: {q.id: plain(render(q, processor, arguments.template), processor) for q in asked}
        for name, asked in questions.items()
    }
    for part, decides in parts.items():
        for task in tasks:
            settings = {**decides, "max_new_tokens": task.max_new_tokens}
            folder = part / task.name
            ask(model, processor, task, questions[task.name], prompts[task.name], settings, folder, arguments, state)
    state.wait_for_everyone()
    state.destroy_process_group()

    if state.is_main_process:
        for part in parts:
            for task in tasks:
                folder = part / task.name
                records = list(collect(folder, prompts[task.name], model_id).values())
                check_records(task, records, str(folder))
                answers = origin_of(folder / PREDICTIONS, model_id, arguments.model)
                write_results(task, records, folder, answers, arguments, judge)
            report = reporting.write(part, arguments.model, arguments.paper_row or reporting.paper_model(source))
            averages = ", ".join(f"{name} {reporting.number(value)}" for name, value in report["averages"].items())
            print(f"averages: {averages}\nreport: {part / 'report.md'}")
        if arguments.num_query_tokens is not None:
            write_curve(model, processor, questions, arguments)
        held.release()
    leave_processes(state.num_processes)


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
