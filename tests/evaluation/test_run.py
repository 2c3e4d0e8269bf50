# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a tiny model on made-up benchmarks: answers, interruption, several processes, what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import evaluation.generate
from evaluation.generate import answer, fingerprint, load, prepare
from evaluation.json_files import read_lines
from evaluation.predictions import collect
from evaluation.prompts import Question, render
from evaluation.run import main
from evaluation.task import read_task
from evaluation.tasks import TASKS
from hub_upload.export_check import check_folder
from hub_upload.model_card import read_curve, read_provenance, read_results, write_card
from modeling_honeybee import HoneybeeForConditionalGeneration
from tests.evaluation.make_data_root import make_data_root, picture
from tests.tiny import ELASTIC, REPOSITORY, elastic_processor, run_script, tiny_model, tiny_processor

RULED = ("mme", "pope", "mmbench", "scienceqa", "seed", "mmmu")
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


def save_model(folder, seed: int = 0) -> str:
    processor = tiny_processor()
    model = tiny_model(seed=seed, config={"image_token_id": processor.image_token_id})
    # Such a model hardly ever ends by itself; with this its answers have lengths from none to the limit.
    model.lm_head.weight.data[2] *= 1.5
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `model`, `data`, and `whole`: the output of an undisturbed run with batches of 8."""
    place = tmp_path_factory.mktemp("evaluation")
    save_model(place / "model")
    make_data_root(place / "data")
    run_script(*arguments(place, "whole", "all", "--batch_size", "8"), env=ENVIRONMENT, cwd=place)
    return place


def arguments(place, output, tasks, *more, model="model"):
    script = REPOSITORY / "evaluation" / "run.py"
    options = ["--model", place / model, "--tasks", tasks, "--data_root", place / "data", "--output", place / output]
    return [script, *options, "--dtype", "float32", *more]


def run_here(place, output, tasks, *more, model="model"):
    main([str(a) for a in arguments(place, output, tasks, *more, model=model)[1:]])


def answers(place, output, task) -> dict[str, str]:
    return {record["id"]: record["pred"] for record in read_lines(place / output / task / "predictions.jsonl")}


def summaries(place, output) -> dict:
    report = json.loads((place / output / "report.json").read_text())
    return {task: scores["summary"] for task, scores in report["tasks"].items()}


def test_every_task_ends_in_a_report(place):
    report = json.loads((place / "whole" / "report.json").read_text())
    assert set(report["tasks"]) == set(TASKS)
    for task in RULED:
        assert report["tasks"][task]["summary"]
        assert report["tasks"][task]["questions"] == len(answers(place, "whole", task))
    assert report["averages"]["AvgN"] is not None and report["averages"]["main"] is not None
    for task in ("llava_w", "mm_vet"):
        assert report["tasks"][task]["summary"] == {}
        assert any("not judged" in note for note in report["tasks"][task]["notes"])
    text = (place / "whole" / "report.md").read_text()
    assert "| paper, C-Abs, 256 tokens | 136.7 | 26.7 | 55.6 | 75.0 | 52.7 | 59.3 | 56.3 |" in text
    assert "mme: 56 questions, and the benchmark has 2374" in text
    assert (place / "whole" / "spatial.png").read_bytes().startswith(b"\x89PNG")
    texts = [text for task in TASKS for text in answers(place, "whole", task).values()]
    assert len(set(texts)) > len(texts) / 8  # the model looks at what it is asked
    assert not list((place / "whole").glob("*/predictions.rank*"))


def test_submissions(place):
    openpyxl = pytest.importorskip("openpyxl", reason="writes and reads MMBench's submission; in the extra `test`")
    rows = list(openpyxl.load_workbook(place / "whole" / "mmbench" / "submission.xlsx").active.values)
    preds = answers(place, "whole", "mmbench")
    table = [dict(zip(rows[0], row)) for row in rows[1:]]
    assert {str(row["index"]): row["prediction"] or "" for row in table} == preds
    assert table[0]["A"] == "left" and table[0]["l2-category"] == "finegrained_perception (cross-instance)"
    seed = read_lines(place / "whole" / "seed" / "submission.jsonl")
    assert {row["question_id"]: row["prediction"] for row in seed} == answers(place, "whole", "seed")
    mm_vet = json.loads((place / "whole" / "mm_vet" / "submission.json").read_text())
    assert mm_vet == answers(place, "whole", "mm_vet")
    llava = read_lines(place / "whole" / "llava_w" / "submission.jsonl")
    assert {str(row["question_id"]): row["text"] for row in llava} == answers(place, "whole", "llava_w")


def test_batches_do_not_change_answers(place):
    run_here(place, "one", ",".join(RULED), "--batch_size", "1")
    for task in RULED:
        assert answers(place, "one", task) == answers(place, "whole", task)
    assert summaries(place, "one") == {k: v for k, v in summaries(place, "whole").items() if k in RULED}


def test_killed_and_run_again(place, monkeypatch):
    output = "killed"
    tasks = "pope,mme"
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments(place, output, tasks, "--batch_size", "1"))],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    file = place / output / "mme" / "predictions.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {record["id"] for record in read_lines(file, torn=True)}
    assert 5 <= len(done) < 56
    assert not (place / output / "report.json").exists()
    with file.open("ab") as broken:  # as if it had died in the middle of a line
        broken.write(b'{"id": "existence/0001.png/0", "pr')

    asked = []
    real = evaluation.generate.answer

    def watched(model, processor, batches, *rest):
        asked.extend(question.id for batch in batches for question in batch)
        return real(model, processor, batches, *rest)

    monkeypatch.setattr(evaluation.generate, "answer", watched)
    run_here(place, output, tasks)
    assert len(asked) == len(set(asked)) == 56 - len(done)
    assert not set(asked) & done
    for task in ("pope", "mme"):
        whole = read_lines(place / "whole" / task / "predictions.jsonl")
        assert read_lines(place / output / task / "predictions.jsonl") == whole
    assert summaries(place, output) == {k: v for k, v in summaries(place, "whole").items() if k in ("pope", "mme")}
    asked.clear()
    run_here(place, output, tasks)
    assert asked == []


def test_interrupted_by_hand_it_says_that_it_continues(place, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.generate, "answer", interrupted)
    with pytest.raises(SystemExit) as stop:
        run_here(place, "interrupted", "pope")
    assert stop.value.code == 130
    assert "interrupted; the same command continues behind the answers that are saved" in capsys.readouterr().err


ABORT_AT_THE_END = """
import os
class Abort:
    def __del__(self, abort=os.abort):
        abort()
held = Abort() if "RANK" in os.environ else None
"""


def test_two_processes(place, tmp_path):
    """Each ends before the interpreter's own ending, where a thread of the process group may abort it."""
    (tmp_path / "sitecustomize.py").write_text(ABORT_AT_THE_END)
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run_script(*torchrun, *arguments(place, "two", "mme,seed", "--batch_size", "4"), env=environment)
    assert "2 process(es) on cpu" in result.stdout
    for task in ("mme", "seed"):
        assert read_lines(place / "two" / task / "predictions.jsonl") == read_lines(
            place / "whole" / task / "predictions.jsonl"
        )


def test_files_of_other_processes_are_joined(place, tmp_path):
    records = read_lines(place / "whole" / "seed" / "predictions.jsonl")
    asked, model = {record["id"]: record["prompt"] for record in records}, records[0]["model"]
    for rank in range(3):
        name = "predictions.jsonl" if rank == 0 else f"predictions.rank{rank}.jsonl"
        lines = [json.dumps(record) for record in records[rank:-2:3]]
        (tmp_path / name).write_text("\n".join(reversed(lines)) + ("\n" if rank else '\n{"id": "10'))
    found = collect(tmp_path, asked, model)
    assert list(found.values()) == records[:-2]
    assert read_lines(tmp_path / "predictions.jsonl") == records[:-2]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
    with pytest.raises(ValueError, match="is of model .* and this run has other; give another --output"):
        collect(tmp_path, asked, "other")
    file = tmp_path / "predictions.jsonl"
    shutil.copy(file, tmp_path / "predictions.rank1.jsonl")  # killed while joining
    assert list(collect(tmp_path, asked, model).values()) == records[:-2]
    with file.open("a") as more:
        more.write(json.dumps(records[3]) + "\n")
    with pytest.raises(ValueError, match=f"question '{records[3]['id']}' is answered twice; remove one of the lines"):
        collect(tmp_path, asked, model)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    changed = {**asked, records[0]["id"]: "another prompt"}
    with pytest.raises(ValueError, match="has another prompt now; the data has changed since"):
        collect(tmp_path, changed, model)
    del asked[records[0]["id"]]
    with pytest.raises(ValueError, match="is not asked now"):
        collect(tmp_path, asked, model)


def test_saved_predictions_score_the_same(place):
    for task in RULED:
        file = place / "whole" / task / "predictions.jsonl"
        main(["--tasks", task, "--predictions", str(file), "--output", str(place / "again")])
    assert summaries(place, "again") == {k: v for k, v in summaries(place, "whole").items() if k in RULED}
    report = json.loads((place / "again" / "report.json").read_text())
    assert report["tasks"]["mme"]["model_name"] == str(place / "model")


def test_another_model_is_refused(place):
    save_model(place / "other", seed=1)
    before = (place / "whole" / "mme" / "predictions.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="scores of model .* give another --output"):
        run_here(place, "whole", "mme", model="other")
    shutil.copytree(place / "whole" / "mme", place / "unscored" / "mme")
    (place / "unscored" / "mme" / "scores.json").unlink()
    with pytest.raises(SystemExit, match="holds predictions with model .*, and this run has model"):
        run_here(place, "unscored", "mme", model="other")
    with pytest.raises(SystemExit, match="with template 'task', and this run has template 'none'"):
        run_here(place, "unscored", "mme", "--template", "none")
    (place / "unscored" / "mme" / "run.json").unlink()
    with pytest.raises(SystemExit, match="predictions but no run.json"):
        run_here(place, "unscored", "mme")
    file = place / "whole" / "mme" / "predictions.jsonl"
    options = ["--tasks", "mme", "--predictions", str(file), "--output", str(place / "third")]
    with pytest.raises(SystemExit, match="has predictions of model"):
        main([*options, "--model", str(place / "other")])
    main([*options, "--model", str(place / "model")])
    assert file.read_bytes() == before


def test_fingerprint_sees_every_tensor(place, tmp_path):
    original = fingerprint(place / "model")
    shutil.copytree(place / "model", tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == original
    model = HoneybeeForConditionalGeneration.from_pretrained(place / "model")
    seen = {original}
    names = [name for name, _ in model.named_parameters() if "norm" in name or "projector" in name][:6]
    for name in names:
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter[...] = parameter + 0.5
        model.save_pretrained(tmp_path / "copy")
        seen.add(fingerprint(tmp_path / "copy"))
    (tmp_path / "copy" / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    seen.add(fingerprint(tmp_path / "copy"))
    assert len(seen) == 2 + len(names) > 5


def test_a_processor_of_another_model_is_refused(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    tiny_processor(9).save_pretrained(tmp_path / "model")
    options = ["--tasks", "mme", "--data_root", str(place / "data"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="disagree on visual tokens an image: 9 and"):
        main(["--model", str(tmp_path / "model"), *options])


def test_wrong_inputs_are_named_before_the_model_loads(place, tmp_path):
    def error(*more, tasks="mme", model=None, data=None):
        options = ["--model", str(model or place / "model"), "--data_root", str(data or place / "data")]
        with pytest.raises(SystemExit) as stop:
            main([*options, "--tasks", tasks, "--output", str(tmp_path / "out"), *more])
        assert not (tmp_path / "out").exists()
        return str(stop.value)

    assert "mmee is no task; they are mme, pope" in error(tasks="mme,mmee")
    assert "does not exist; give a folder with a saved Honeybee" in error(model=tmp_path / "nothing")
    assert "has no config.json" in error(model=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "is of type 'llama', not 'honeybee'; give a saved Honeybee" in error(model=tmp_path)
    assert "nobody/nothing is no folder, and cannot be downloaded" in error(model="nobody/nothing")
    assert "--data_root" in error(data=tmp_path / "nothing")
    assert "MME/existence does not exist" in error(data=tmp_path)
    assert "batch_size 0" in error("--batch_size", "0")
    shutil.copytree(place / "data" / "MME", tmp_path / "MME")
    (tmp_path / "MME" / "landmark" / "images" / "0002.jpg").unlink()
    assert "0002.jpg of question 'landmark/0002.jpg/0' does not exist (2 images of 56" in error(data=tmp_path)


def test_a_broken_image_stops_the_run_by_name(place, tmp_path):
    shutil.copytree(place / "data" / "mm_vet", tmp_path / "mm_vet")
    (tmp_path / "mm_vet" / "images" / "v1_3.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="v1_3.png' cannot be read"):
        main(
            ["--model", str(place / "model"), "--tasks", "mm_vet", "--data_root", str(tmp_path), "--batch_size", "1"]
            + ["--output", str(tmp_path / "out")]
        )


def test_two_runs_do_not_write_into_one_folder(place, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(SystemExit, match="another run writes to"):
        main(
            ["--model", str(place / "model"), "--tasks", "owl", "--data_root", str(place / "data")]
            + ["--output", str(tmp_path / "out")]
        )


COLOURS = '''"""Colours: a made-up benchmark, with its own files, prompt, rule and submission."""

from evaluation.json_files import read_lines, write_json
from evaluation.prompts import LETTERS, Question, with_options
from evaluation.scoring import Score, percent
from evaluation.task import LIST, TEXT, Task


def read_colours(data):
    rows = read_lines(data.files("questions.jsonl")[0])
    return [
        Question(
            row["id"], "choice", with_options("Which colour?", dict(zip(LETTERS, row["choices"]))),
            {"answer": row["answer"], "choices": row["choices"]}, str(data.path / row["image"]),
        )
        for row in rows
    ]


def score_colours(records):
    right = [record["answer"] in record["pred"] for record in records]
    parsed = [{"id": r["id"], "parsed": r["pred"], "correct": c} for r, c in zip(records, right)]
    empty = sum(not record["pred"] for record in records)
    return Score({"all": percent(sum(right), len(right))}, {}, parsed, {"empty": empty})


def write_submission(records, folder):
    write_json(folder / "colours.json", {record["id"]: record["pred"] for record in records})
    return folder / "colours.json"


TASK = Task(
    name="colours", display_name="Colours of things", folder="Colours", read=read_colours, max_new_tokens=4,
    questions=100, fields={"pred": TEXT, "answer": TEXT, "choices": LIST}, score=score_colours,
    quirks={"empty": "an empty answer is wrong"}, submission=write_submission,
)
'''


def test_a_ninth_benchmark_is_one_file_and_one_line(place, tmp_path):
    package = tmp_path / "evaluation"
    shutil.copytree(REPOSITORY / "evaluation", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "tasks" / "colours.py").write_text(COLOURS)
    table = package / "tasks" / "__init__.py"
    table.write_text(table.read_text().replace('    "owl",\n', '    "owl",\n    "colours",\n'))
    folder = tmp_path / "data" / "Colours"
    folder.mkdir(parents=True)
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    rows = [{"id": str(n), "image": f"{n}.png", "choices": ["red", "blue"], "answer": "A"} for n in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", place / "model", "--data_root", tmp_path / "data", "--output", tmp_path / "out"]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])}
    run_script(package / "run.py", "--tasks", "colours", *options, env=environment, cwd=tmp_path)

    found = answers(tmp_path, "out", "colours")
    scores = json.loads((tmp_path / "out" / "colours" / "scores.json").read_text())
    assert scores["summary"] == {"all": pytest.approx(100 * sum("A" in text for text in found.values()) / 3)}
    assert scores["quirks"] == {"empty": sum(not text for text in found.values())}
    assert json.loads((tmp_path / "out" / "colours" / scores["submission"]).read_text()) == found
    assert "colours: 3 questions, and the benchmark has 100" in (tmp_path / "out" / "report.md").read_text()
    (result,) = read_results(tmp_path / "out", "model")
    assert result.dataset_name == "Colours of things, 3 questions"


# Settings that change the tokens of an answer, or where it stops.
FOREIGN = {
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 0},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "min_new_tokens": {"min_new_tokens": 12},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 3.0, "early_stopping": True},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(3, 150)]},
    "sequence_bias": {"sequence_bias": [[[7], 100.0]]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 150))},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [1, 50.0]},
    "stop_strings": {"stop_strings": ["a", "e", "i"]},
    "max_time": {"max_time": 1e-9},
    "no end": {"eos_token_id": None},
    "return_dict_in_generate": {"return_dict_in_generate": True, "output_scores": True},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_answers_are_greedy_whatever_the_checkpoint_says(place, tmp_path, kind):
    """The settings of the language model that a checkpoint once began with, or of whoever saved it."""
    questions = [Question(str(n), "own", f"What is {n}?" * n) for n in range(1, 13)]

    def answers(folder):
        model, processor = load(folder, "float32", torch.device("cpu"), None)
        return [text for batch in answer(model, processor, [questions[:6], questions[6:]], 8) for _, text in batch]

    folder = tmp_path / "model"
    shutil.copytree(place / "model", folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, **FOREIGN[kind]}))
    assert answers(folder) == answers(place / "model")


@pytest.fixture(scope="module")
def elastic(place):
    """A model whose images can have 4, 9 or 16 visual tokens, asked with each."""
    processor = elastic_processor()
    model = tiny_model(config={"image_token_id": processor.image_token_id}, **ELASTIC)
    model.lm_head.weight.data[2] *= 1.5
    for part in (model, processor):
        part.save_pretrained(place / "elastic")
    run_here(place, "curve", "mme,pope", "--num_query_tokens", "16,4,9", model="elastic")
    return place


def test_several_numbers_of_visual_tokens_in_one_run(elastic, capsys):
    place = elastic
    model, processor = load(place / "elastic", "float32", torch.device("cpu"), None)
    questions = {q.id: q for q in TASKS["mme"].read(TASKS["mme"].data(place / "data"))}
    asked = [q for q in questions.values() if q.image is not None][:3]
    for number in (4, 9, 16):
        found = answers(place, f"curve/M{number}", "mme")
        for question in asked:
            prompt = render(question, processor)
            own = {"images": question.image, "text": prompt, "num_query_tokens": number, "add_special_tokens": False}
            inputs = processor(**own, return_tensors="pt")
            assert (inputs["input_ids"] == processor.image_token_id).sum() == number + 1
            longest = {"max_new_tokens": TASKS["mme"].max_new_tokens, "do_sample": False}
            output = model.generate(**inputs, **longest)[0, inputs["input_ids"].shape[1] :]
            assert processor.tokenizer.decode(output, skip_special_tokens=True) == found[question.id]
    assert len({json.dumps(answers(place, f"curve/M{number}", "mme")) for number in (4, 9, 16)}) == 3
    run_here(place, "default", "mme,pope", model="elastic")
    assert answers(place, "default", "mme") == answers(place, "curve/M9", "mme")
    before = capsys.readouterr() and (place / "curve" / "M4" / "mme" / "predictions.jsonl").read_bytes()
    run_here(place, "curve", "mme,pope", "--num_query_tokens", "4,9,16", model="elastic")
    assert (place / "curve" / "M4" / "mme" / "predictions.jsonl").read_bytes() == before
    assert "| 9 (default) | 10 |" in capsys.readouterr().out


def test_the_curve(elastic):
    place = elastic
    curve = json.loads((place / "curve" / "curve.json").read_text())
    assert [row["num_query_tokens"] for row in curve["rows"]] == [4, 9, 16] and curve["default"] == 9
    for row in curve["rows"]:
        summary = summaries(place, f"curve/M{row['num_query_tokens']}")
        assert row["scores"]["mme"] == summary["mme"]["total"] and set(row["scores"]) == {"mme", "pope"}
        assert row["prefill_seconds"] > 0 and row["visual_tokens"] == row["num_query_tokens"] + 1
    assert "| 16 | 17 |" in (place / "curve" / "curve.md").read_text()
    assert (place / "curve" / "curve.png").read_bytes().startswith(b"\x89PNG")
    found = {"results": read_results(place / "curve", "model"), "curve": read_curve(place / "curve")}
    card = write_card(check_folder(place / "elastic"), read_provenance(place / "elastic"), "bee/elastic", **found)
    assert "| 16 | 17 |" in card and "c-abs, 4, 9, 16 (default: 9) and 1 more visual tokens an image" in card
    default = summaries(place, "curve/M9")["mme"]["total"]
    assert default in [result.metric_value for result in found["results"] if result.metric_name == "total"]


@pytest.mark.parametrize(
    ("model", "numbers", "message"),
    [
        ("elastic", "25", "trained for 4, 9, 16 visual tokens.*--allow_untrained"),
        ("elastic", "4,5", "5 is not a perfect square"),
        ("elastic", "4,x", "must be numbers"),
        ("elastic", "0", "must be numbers"),
        ("model", "9", "trained for 4 visual tokens.*--allow_untrained"),
    ],
)
def test_numbers_that_are_refused(elastic, capsys, model, numbers, message):
    with pytest.raises(SystemExit, match=message):
        run_here(elastic, "refused", "mme", "--num_query_tokens", numbers, model=model)
    assert not (elastic / "refused").exists()


def test_the_curve_of_a_model_with_a_fixed_m(elastic):
    run_here(elastic, "fixed", "pope", "--limit", "6", "--num_query_tokens", "1,4,9", "--allow_untrained")
    curve = json.loads((elastic / "fixed" / "curve.json").read_text())
    assert [row["visual_tokens"] for row in curve["rows"]] == [1, 4, 9] and curve["default"] == 4


def test_crops(place, tmp_path):
    """As many as are asked for, and else as the processor says; answers with other crops are other answers."""
    shutil.copytree(place / "model", place / "cuts")
    processor = tiny_processor(max_crops=4)
    processor.save_pretrained(place / "cuts")
    model = HoneybeeForConditionalGeneration.from_pretrained(place / "cuts").eval()
    run_here(place, "own_crops", "mme", "--limit", "12", model="cuts")
    run_here(place, "asked_crops", "mme", "--limit", "12", "--max_crops", "4")
    run_here(place, "no_crops", "mme", "--limit", "12", "--max_crops", "1", model="cuts")
    found = answers(place, "asked_crops", "mme")
    assert answers(place, "own_crops", "mme") == found != answers(place, "no_crops", "mme")
    assert answers(place, "no_crops", "mme").items() <= answers(place, "whole", "mme").items()
    questions = {q.id: q for q in TASKS["mme"].read(TASKS["mme"].data(place / "data"))}
    for question in [questions[key] for key in found][:3]:
        own = {"images": question.image, "text": render(question, processor), "add_special_tokens": False}
        inputs = processor(**own, return_tensors="pt")
        assert inputs["num_crops"].tolist() == [5]  # of 64 x 64 pixels, and the tower's square is 32 x 32
        longest = {"max_new_tokens": TASKS["mme"].max_new_tokens, "do_sample": False}
        output = model.generate(**inputs, **longest)[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(output, skip_special_tokens=True) == found[question.id]
    assert "asked with --max_crops 4" in (place / "asked_crops" / "report.md").read_text()
    with pytest.raises(SystemExit, match="max_crops 4, and this run has max_crops None; give another --output"):
        run_here(place, "asked_crops", "mme", "--limit", "12")
    with pytest.raises(SystemExit, match="--max_crops 0 must be at least 1"):
        run_here(place, "no", "mme", "--max_crops", "0")
    saved = ["--tasks", "mme", "--predictions", str(place / "whole" / "mme" / "predictions.jsonl")]
    with pytest.raises(SystemExit, match="--max_crops 4 is asked of a model"):
        main([*saved, "--output", str(tmp_path / "out"), "--max_crops", "4"])


def test_the_curve_of_a_model_that_cuts(elastic):
    processor = elastic_processor()
    prompt = ["pope", "--limit", "6", "--max_crops"]
    run_here(elastic, "cut_curve", *prompt, "4", "--num_query_tokens", "4,16", model="elastic")
    curve = json.loads((elastic / "cut_curve" / "curve.json").read_text())
    assert curve["max_crops"] == 4 and "| visual tokens a crop |" in curve["text"]
    assert "cut into at most 4 crops" in curve["text"]
    with pytest.raises(SystemExit, match="max_crops 4, and this run has max_crops 2"):
        run_here(elastic, "cut_curve", *prompt, "2", "--num_query_tokens", "9", model="elastic")
    assert answers(elastic, "cut_curve/M16", "pope").items() - answers(elastic, "curve/M16", "pope").items()
    question = next(iter(read_task(TASKS["pope"], elastic / "data")))
    inputs = prepare(processor, [question], "task", {"num_query_tokens": 16, "max_crops": 4})
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 5 * 17
