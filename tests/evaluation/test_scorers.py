# SPDX-License-Identifier: Apache-2.0
"""The official scorers' numbers and parsed answers, and the rules by themselves."""

import json
import time

import openpyxl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from evaluation.run import main
from evaluation.tasks import TASKS
from evaluation.tasks.llava_w import score_llava_w
from evaluation.tasks.mm_vet import score_mm_vet
from evaluation.tasks.mmbench import parse_mmbench, score_mmbench, strip_mmbench_prefix
from evaluation.tasks.mme import SUBSETS, parse_mme, parse_mme_relaxed, score_mme
from evaluation.tasks.mmmu import is_right_mmmu_open, parse_mmmu_open, score_mmmu
from evaluation.tasks.pope import parse_pope, score_pope
from evaluation.tasks.scienceqa import parse_scienceqa, score_scienceqa
from evaluation.tasks.seed import score_seed
from tests.golden import GOLDEN

SCORERS = GOLDEN / "scorers"


def golden(task: str) -> dict:
    return json.loads((SCORERS / f"{task}.json").read_text(encoding="utf-8"))


def records_of(task: str) -> list[dict]:
    """The predictions of a golden file as lines of a prediction file."""
    records = [{"id": key, **record} for key, record in golden(task)["results"].items()]
    if task == "scienceqa":  # the official scorer reads choices and answers elsewhere
        problems = json.loads((SCORERS / "sqa_text" / "problems.json").read_text(encoding="utf-8"))
        for record in records:
            problem = problems[record["question_id"]]
            record.update(choices=problem["choices"], answer=problem["answer"])
    return records


def test_mme():
    reference, result = golden("mme"), score_mme(records_of("mme"))
    assert result.summary == reference["summary"]
    for name in ("scores", "scores_relaxed", "per_subset_metric"):
        assert result.details[name] == reference[name]
    assert [[p, parse_mme(p), parse_mme_relaxed(p)] for p, *_ in reference["parsed_default"]] == reference[
        "parsed_default"
    ]
    assert [item["parsed"] for item in result.parsed] == [parsed for _, parsed, _ in reference["parsed_default"]]


def test_pope():
    reference, result = golden("pope"), score_pope(records_of("pope"))
    assert result.summary == reference["summary"]
    assert result.details["scores"] == reference["scores"]
    assert [[pred, parse_pope(pred)] for pred, _ in reference["parsed"]] == reference["parsed"]


def test_mmbench():
    reference, result = golden("mmbench"), score_mmbench(records_of("mmbench"))
    assert result.summary == reference["summary"]
    assert result.details["scores"] == reference["scores"]
    hits = reference["hits_per_main_index_in_order"]
    assert {str(k): v for k, v in result.details["hits_per_main_index"].items()} == hits
    for case in reference["prefetch"]:
        options = reference["options_sets"][case["options"]]
        assert strip_mmbench_prefix(case["pred"]) == case["after_prefix_strip"]
        assert (parse_mmbench(case["pred"], options) or False) == case["inferred"], case


def test_scienceqa():
    reference, records = golden("scienceqa"), records_of("scienceqa")
    assert [item["parsed"] for item in score_scienceqa(records).parsed] == [c["parsed"] for c in reference["parsed"]]
    for seed, expected in reference["scores_by_random_seed"].items():
        result = score_scienceqa(records, int(seed))
        assert {**result.summary, **result.details} == expected
        assert result.quirks["guess"] == sum(not case["deterministic"] for case in reference["parsed"])
    result = score_scienceqa([records[i] for i in reference["deterministic_subset_ids"]])
    assert {**result.summary, **result.details} == reference["scores_deterministic_subset"]
    assert result.quirks["guess"] == 0


def test_seed():
    reference, result = golden("seed"), score_seed(records_of("seed"))
    assert result.summary == reference["summary"]
    assert result.details["scores"] == reference["scores"]
    assert [item["correct"] for item in result.parsed] == [correct for *_, correct in reference["correct"]]


def test_mmmu():
    reference, records = golden("mmmu"), records_of("mmmu")
    for seed, expected in reference["scores_by_random_seed"].items():
        result = score_mmmu(records, int(seed))
        assert result.details == {"scores": expected["scores"], "domains": expected["domains"]}
        assert result.summary["overall"] == expected["overall"]
    result = score_mmmu([records[i] for i in reference["deterministic_subset_ids"]])
    assert result.details["scores"] == reference["scores_deterministic_subset"]
    for case in reference["open_parsed"]:
        found = parse_mmmu_open(case["pred"])
        assert sorted(map(str, found)) == case["parsed"]
        assert is_right_mmmu_open(case["gold"], found) is case["correct"]


@pytest.mark.parametrize("task", ["mme", "pope", "mmbench", "scienceqa", "seed", "mmmu"])
def test_command_line(task, tmp_path):
    reference, records = golden(task), records_of(task)
    if task in ("scienceqa", "mmmu"):
        records = [records[i] for i in reference["deterministic_subset_ids"]]
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    main(["--tasks", task, "--predictions", str(file), "--output", str(tmp_path / "out")])
    summary = json.loads((tmp_path / "out" / task / "scores.json").read_text())["summary"]
    if task == "scienceqa":
        expected = {key: reference["scores_deterministic_subset"][key] for key in ("acc", "acc-image", "acc-text")}
        assert summary == expected
    elif task == "mmmu":
        overall = summary.pop("overall")
        assert summary == {name: row["acc"] for name, row in reference["scores_deterministic_subset"].items()}
        rows = reference["scores_deterministic_subset"].values()
        assert overall == pytest.approx(sum(r["acc"] * r["num_example"] for r in rows) / len(records))
    else:
        assert summary == reference["summary"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tasks"][task]["questions"] == len(records)


def test_scienceqa_answers_from_problems(tmp_path):
    reference = golden("scienceqa")
    keep = [str(i) for i in reference["deterministic_subset_ids"]]
    file = tmp_path / "predictions.jsonl"
    rows = [{"id": key, **reference["results"][key]} for key in keep]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ScienceQA").symlink_to(SCORERS / "sqa_text")
    arguments = ["--tasks", "scienceqa", "--predictions", str(file), "--output", str(tmp_path / "out")]
    main([*arguments, "--data_root", str(tmp_path / "data")])
    summary = json.loads((tmp_path / "out" / "scienceqa" / "scores.json").read_text())["summary"]
    assert summary["acc"] == reference["scores_deterministic_subset"]["acc"]


# The rules, against other formulas -------------------------------------------------------------------------------------

yes_no = st.sampled_from(["yes", "no"])


@given(st.lists(st.tuples(yes_no, yes_no), min_size=1))
def test_pope_is_what_scikit_learn_computes(pairs):
    records = [{"id": i, "pred": p, "answer": a, "category": "random"} for i, (p, a) in enumerate(pairs)]
    scores = score_pope(records).details["scores"]["random"]
    predicted, answers = zip(*pairs)
    options = {"pos_label": "yes", "zero_division": 0}
    assert scores["accuracy"] == pytest.approx(accuracy_score(answers, predicted))
    assert scores["precision"] == pytest.approx(precision_score(answers, predicted, **options))
    assert scores["recall"] == pytest.approx(recall_score(answers, predicted, **options))
    assert scores["f1"] == pytest.approx(f1_score(answers, predicted, **options), abs=1e-9)


@given(st.lists(st.tuples(yes_no, yes_no, yes_no, yes_no), min_size=1))
def test_mme_by_images(images):
    records = []
    for number, image in enumerate(images):
        for turn in (0, 2):
            record = {"pred": image[turn], "answer": image[turn + 1], "dataset_name": "count", "image_id": str(number)}
            records.append({"id": len(records), **record})
    single = sum((a == b) + (c == d) for a, b, c, d in images) / (2 * len(images))
    both = sum(a == b and c == d for a, b, c, d in images) / len(images)
    assert score_mme(records).summary["perception/count"] == pytest.approx(100 * single + 100 * both)


def test_mme_pairs_must_follow_each_other():
    row = {"pred": "yes", "answer": "Yes", "dataset_name": "count"}
    records = [{"id": i, "image_id": image, **row} for i, image in enumerate("aab")]
    with pytest.raises(ValueError, match="b is not followed by the second"):
        score_mme(records)
    with pytest.raises(ValueError, match="'counts' is no MME subset"):
        score_mme([{**records[0], "dataset_name": "counts"}])
    assert len([name for names in SUBSETS.values() for name in names]) == 14


def rotations(options: list[str], preds: list[str], index: int = 7) -> list[dict]:
    """Records of a question whose right option is the first; `preds` by rotation."""
    records = []
    for turn, pred in enumerate(preds):
        turned = options[turn:] + options[:turn]
        records.append(
            {
                "id": index + turn * 10**6,
                "index": index + turn * 10**6,
                "pred": pred,
                "answer": "ABCD"[turned.index(options[0])],
                "category": "c",
                "l2_category": "l",
                "options_dict": dict(zip("ABCDE", [*turned, *["N/A"] * 5])),
            }
        )
    return records


def test_mmbench_is_circular():
    right = rotations(["red", "green", "blue", "grey"], ["A", "D", "C", "B"])
    assert score_mmbench(right).summary["total_acc"] == 100
    wrong = rotations(["red", "green", "blue", "grey"], ["A", "D", "C", "A"], index=8)
    assert score_mmbench(right + wrong).summary["total_acc"] == 50
    by_text = rotations(["red", "green", "blue", "grey"], ["it is red"] * 4)
    assert score_mmbench(by_text).summary["total_acc"] == 100


def test_mmbench_guesses_are_counted_and_seeded():
    records = rotations(["red", "green", "blue", "grey"], ["hmm", "D", "C", "B"])
    results = [score_mmbench(records, seed=seed) for seed in range(40)]
    assert {result.quirks["guess"] for result in results} == {1}
    share = sum(result.summary["total_acc"] == 100 for result in results) / 40
    assert 0 < share < 0.6  # one in four
    judged = score_mmbench(records, judged={"7": "A"})
    assert judged.summary["total_acc"] == 100 and judged.quirks["guess"] == 0
    # nothing is guessed where a rotation is wrong already
    assert score_mmbench(rotations(["red", "green"], ["hmm", "A"])).quirks["guess"] == 0


def test_quirks_are_counted():
    three = rotations(["red", "green", "blue"], ["", "", ""])
    assert score_mmbench(three).quirks["empty_option"] == 3
    rows = [{"id": i, "pred": p, "answer": "A", "question_type": "x"} for i, p in enumerate(["A.", "(A)", "A", "B."])]
    assert score_seed(rows).quirks["not_a_bare_letter"] == 2
    rows = [{"id": i, "pred": p, "answer": "no", "category": "random"} for i, p in enumerate(["NO", "", "Yes", "no"])]
    assert score_pope(rows).quirks["yes_by_default"] == 2
    rows = [{"id": 0, "pred": "yes or no", "answer": 0, "choices": ["yes", "no"], "prompt": ""}]
    assert score_scienceqa(rows).quirks == {"last_choice": 1, "guess": 0}


def test_mmbench_parsing_at_the_edges():
    four = dict(zip("ABCDE", ["3.5 m", "35 m", "a cat", "a dog", "N/A"]))
    assert strip_mmbench_prefix("The answer is B. It is 3.5 m.") == "B It is 35 m"
    assert parse_mmbench("The answer is 3.5 m", four) == "B"  # every dot goes
    assert parse_mmbench("3.5 m", four) == "A"
    assert parse_mmbench("(A) not B.", four) == "B"  # letter and dot come before letter in brackets
    assert parse_mmbench("D. or (C)", four) == "D"
    assert parse_mmbench("\u3000A\u3000", four) == "A"  # any Unicode blank parts words
    assert parse_mmbench("", {**four, "D": None}) is None  # null is no option, "N/A" is an empty one
    assert parse_mmbench("", {**four, "D": "N/A"}) == "D"


def test_mmbench_guesses_fall_in_the_order_of_the_lines():
    first, second = (rotations(["red", "green", "blue", "grey"], ["hmm"] * 4, index=i) for i in (9, 3))
    options = [score_mmbench(rows).details["hits_per_main_index"] for rows in (first + second, second + first)]
    assert [list(hits) for hits in options] == [[9, 3], [3, 9]]
    # without guesses the order is of no consequence, and a question may lack rotations
    sure = rotations(["red", "green", "blue"], ["A", "C", "B"])
    assert score_mmbench(sure[::-1]).summary == score_mmbench(sure).summary == {"total_acc": 100, "l": 100, "l/c": 100}
    assert score_mmbench(sure[1:]).summary["total_acc"] == 100


def test_mme_relaxed_at_the_edges():
    assert [parse_mme_relaxed(p) for p in ("yes1", "yes_", "yes-no", "Yes!", "éno")] == ["other"] * 2 + [
        "other",
        "yes",
        "other",
    ]
    row = {"answer": "yes", "dataset_name": "OCR", "image_id": "a"}
    records = [{"id": i, "pred": "Yes\tno", **row} for i in range(2)]
    assert score_mme(records).details["scores_relaxed"]["Perception"]["OCR"] == [200, 100, 100]  # nothing after the tab
    with pytest.raises(ValueError, match="'maybe' is neither Yes nor No"):
        score_mme([{**r, "answer": "maybe"} for r in records])


def test_pope_at_the_edges():
    rows = [{"id": 0, "pred": "no", "answer": "no", "category": "random"}]
    summary = score_pope(rows).summary
    assert len(summary) == 15 and all(summary[f"popular/{name}"] == 0 for name in ("accuracy", "f1", "yes_ratio"))
    assert summary["random/accuracy"] == pytest.approx(1) and summary["random/f1"] == summary["random/precision"] == 0
    assert [parse_pope(p) for p in ("no", "no\u00a0cat", "a no\n", "not,", "1.no", "No no")] == [
        "no", "yes", "yes", "no", "yes", "no",
    ]  # fmt: skip
    result = score_pope([{**rows[0], "answer": "No"}])
    assert not result.parsed[0]["correct"] and result.quirks["label_not_no"] == 1
    with pytest.raises(ValueError, match="no category .'easy'.; they are adversarial"):
        score_pope([{**rows[0], "category": "easy"}])


def test_mmmu_at_the_edges():
    base = {"id": "validation_Math_1", "question_type": "multiple-choice", "all_choices": ["A", "B"], "answer": "A"}
    assert score_mmmu([{**base, "pred": "B", "answer": ["B", "A"]}]).summary == {"overall": 1, "Math": 1}
    strange = {**base, "id": "validation_Alchemy_1", "pred": "B"}
    result = score_mmmu([{**base, "pred": "A"}, strange])
    assert result.summary == {"overall": 1, "Math": 1} and result.quirks["unknown_subject"] == 1
    with pytest.raises(ValueError, match="no id names a MMMU subject"):
        score_mmmu([strange])
    with pytest.raises(ValueError, match="validation_Math_1': a multiple-choice question with empty all_choices"):
        score_mmmu([{**base, "pred": "x", "all_choices": []}])
    assert parse_mmmu_open("so 1,5 is = nan") == [pytest.approx(float("nan"), nan_ok=True)]
    assert is_right_mmmu_open("nan", parse_mmmu_open("nan")) is False
    assert is_right_mmmu_open("50", parse_mmmu_open("50%")) and is_right_mmmu_open("1e3", parse_mmmu_open("1,000"))


def test_scienceqa_letters():
    assert parse_scienceqa("(C).", ["x", "y"]) == "C"
    assert parse_scienceqa("neither", ["x", "y"]) is None
    # the image's path decides what is a question with an image, not the prompt
    row = {"id": 1, "pred": "A", "answer": 0, "choices": ["x", "y"], "prompt": "<image>", "image_path": "None"}
    assert score_scienceqa([row]).summary == {"acc": 100, "acc-image": 0, "acc-text": 100}
    assert score_scienceqa([{**row, "prompt": "", "image_path": "a.png"}]).summary["acc-image"] == 100
    with pytest.raises(ValueError, match="'Q' is none of its 2 choices"):
        score_scienceqa([{"id": 1, "pred": "A", "answer": "Q", "choices": ["x", "y"], "prompt": ""}])


def test_judged_scores():
    rows = [{"id": i, "category": "conv" if i else "detail", "capability": ["ocr"] if i else []} for i in range(3)]
    assert score_llava_w(rows, {"0": (10, 5), "1": (8, 8)}).summary == pytest.approx(
        {"all": 100 * 13 / 18, "detail": 50, "conv": 100}
    )
    assert score_mm_vet(rows, {"0": 0.5, "1": 1.0}).summary == {"total": 75, "ocr": 100}
    assert score_mm_vet(rows, {}).summary == {}


def test_mmbench_submission_of_many_lines(tmp_path):
    records = [{**record, "pred": "=A"} for i in range(3000) for record in rotations(["red"], ["A"], index=i)]
    begin = time.process_time()
    assert TASKS["mmbench"].submission(records, tmp_path).name == "submission.xlsx"
    assert time.process_time() - begin < 10  # the time grows with the lines, not with their square
    sheet = openpyxl.load_workbook(tmp_path / "submission.xlsx").active
    assert sheet.max_row == 3001 and {(c.value, c.data_type) for c in sheet["K"][1:]} == {("=A", "s")}


def test_refused_prediction_files(tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    good = {"id": 1, "pred": "A", "answer": "A", "question_type": "x"}

    def error(*rows, task="seed"):
        file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        with pytest.raises(SystemExit) as stop:
            main(["--tasks", task, "--predictions", str(file), "--output", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
        return str(stop.value)

    assert "has no predictions" in error()
    assert "id '1' stands on line 1 and again on line 2" in error(good, good)
    assert "line 2: no answer" in error(good, {"id": 2, "pred": "A", "question_type": "x"})
    assert "line 2 is not a JSON object" in error(good, "{broken\n")
    assert "pred 3 is not a text" in error({**good, "pred": 3})
    assert "line 1: answer None is not a text" in error({**good, "answer": None})
    mmmu = {"id": "validation_Math_1", "pred": "4", "question_type": "open", "all_choices": []}
    assert "answer 4 is not a text or a list" in error({**mmmu, "answer": 4}, task="mmmu")
    bench = {"id": 1, "pred": "A", "answer": "A", "category": "c", "l2_category": "l", "options_dict": {}}
    assert "index 'one' is not a number" in error({**bench, "index": "one"}, task="mmbench")
    assert "seeds is no task" in error(good, task="seeds")
    assert "names 2" in error(good, task="seed,mme")
    assert "several models" in error({**good, "model": "a"}, {**good, "id": 2, "model": "b"})
    with pytest.raises(SystemExit, match="does not exist; give a JSONL file"):
        main(["--tasks", "seed", "--predictions", str(tmp_path / "none"), "--output", str(tmp_path / "out")])


def test_nothing_is_overwritten(tmp_path):
    def score(name, pred, output="out", **extra):
        row = {"id": 1, "pred": pred, "answer": "A", "question_type": "x", **extra}
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        main(["--tasks", "seed", "--predictions", str(tmp_path / name), "--output", str(tmp_path / output)])

    score("a", "A")
    before = (tmp_path / "out" / "seed" / "scores.json").read_bytes()
    score("a", "A")  # the same again is no harm
    with pytest.raises(SystemExit, match="is of other predictions; give another --output"):
        score("b", "B")
    with pytest.raises(SystemExit, match="has scores of model None"):
        score("c", "A", model="abc")
    assert (tmp_path / "out" / "seed" / "scores.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("my own")
    with pytest.raises(SystemExit, match="report.md is not from an evaluation"):
        score("a", "A", output="mine")
    assert (tmp_path / "mine" / "report.md").read_text() == "my own"
