# SPDX-License-Identifier: Apache-2.0
"""MMBench: one of up to four options, asked again with the options rotated; all rotations must be right (circular)."""

import base64
import random
import re
from collections import defaultdict
from pathlib import Path

import pandas

from evaluation.data_files import DataFolder, picture
from evaluation.judge import Request
from evaluation.prompts import Question, with_options
from evaluation.scoring import Score, option_letter, percent
from evaluation.task import ANY, TEXT, Judging, Task, of_type

OFFICIAL_SEED = 2680  # the official scorer's own
NUMBER = (lambda value: isinstance(value, (int, str)) and str(value).isdecimal(), "a number")
CIRCULAR = 10**6  # rotations of a question have its index plus multiples of this


# Questions -------------------------------------------------------------------------------------------------------------


def _rows(data: DataFolder) -> list[tuple[dict, object]]:
    """(row, image) of the file or of the parquet files."""
    names = sorted(path.name for path in data.path.glob("*.tsv") if re.search("dev(?!.*cn)", path.name.lower()))
    if len(names) > 1:
        raise ValueError(f"{data.path} has several dev files ({', '.join(names)}); leave the one to be used")
    files = data.files(*(names or ["mmbench_dev_20230712.tsv"]))
    if files is None:
        return list(data.parquet_rows(only=r"(^|en/|data/)dev"))
    # pandas, like the official code: "N/A", "None" and the like are missing values in it.
    try:
        table = pandas.read_csv(files[0], sep="\t")
    except (pandas.errors.EmptyDataError, pandas.errors.ParserError) as error:
        raise ValueError(f"{files[0]} cannot be read ({error}); download it again") from error
    rows = [{k: None if pandas.isna(v) else v for k, v in row.items()} for row in table.to_dict("records")]
    pictures = {row["index"]: str(row["image"]) for row in rows}
    # Later releases give a rotation the index of its first question instead of the same picture again.
    pictures = {k: pictures.get(int(v), v) if len(v) < 20 and v.isdigit() else v for k, v in pictures.items()}
    return [(row, picture(lambda text=pictures[row["index"]]: base64.b64decode(text))) for row in rows]


def _text(row: dict, name: str) -> str:
    value = row.get(name)
    return "N/A" if value is None or value == "" or value == "nan" else str(value)


def read_mmbench(data: DataFolder) -> list[Question]:
    questions = []
    for row, image in _rows(data):
        options = {letter: _text(row, letter) for letter in "ABCDE"}
        fields = {
            "question": row["question"],
            "hint": _text(row, "hint"),
            "index": int(row["index"]),
            "answer": row["answer"],
            "category": row["category"],
            "l2_category": row.get("l2-category") or row.get("L2-category"),
            "options_dict": options,
        }
        text = with_options(fields["question"], options, fields["hint"])
        questions.append(Question(str(fields["index"]), "choice", text, fields, image))
    return questions


# Scores ----------------------------------------------------------------------------------------------------------------

_PREFIX = "The answer is "


def strip_mmbench_prefix(pred: str) -> str:
    return pred[len(_PREFIX) :].replace(".", "") if _PREFIX in pred else pred


def _options(options: dict) -> dict[str, str]:
    """The four that can be matched, in lower case; a missing one is the empty text, which every answer contains.

    Only the reader's "N/A" is that: null is no option at all.
    """
    texts = {letter: options.get(letter, "N/A") for letter in "ABCD"}
    return {k: "" if text == "N/A" else str(text).lower() for k, text in texts.items() if text is not None}


def parse_mmbench(pred: str, options: dict) -> str | None:
    """The letter that the answer names, by itself or by an option's text; None where that is not decided."""
    text = strip_mmbench_prefix(pred)
    letter = option_letter(text)
    if letter:
        return letter
    found = [letter for letter, option in _options(options).items() if option in text.lower()]
    return found[0] if len(found) == 1 else None


def _groups(records: list[dict]) -> dict[int, list[dict]]:
    """Rotations by question, both in the order of the records: it decides which guess falls to which rotation."""
    groups = defaultdict(list)
    for record in records:
        groups[int(record["index"]) % CIRCULAR].append(record)
    return groups


def undecided_mmbench(records: list[dict]) -> list[dict]:
    """The records that have to be guessed, or read by a judge: no letter found, and no rotation wrong already."""
    out = []
    for group in _groups(records).values():
        letters = [parse_mmbench(r["pred"], r["options_dict"]) for r in group]
        if all(letter in (None, r["answer"]) for letter, r in zip(letters, group)):
            out += [r for letter, r in zip(letters, group) if letter is None]
    return out


def _accuracy(flags: list) -> str:
    return f"{percent(sum(flags), len(flags)):.2f}"


def _tables(tree: dict[str, dict[str, list]], hits: dict[int, int]) -> tuple[dict, dict]:
    """(summary, scores as the official code nests them) of parent category -> category -> right or not."""
    scores, summary = {}, {"total_acc": float(_accuracy(list(hits.values())))}
    for parent in sorted(tree):
        flags = [flag for leaf in tree[parent].values() for flag in leaf]
        scores[parent] = {
            leaf: {"num_sampes": len(f), "num_correct": sum(f), "acc": _accuracy(f)}  # the official key's spelling
            for leaf, f in sorted(tree[parent].items())
        }
        scores[parent].update(
            parent_task_acc=_accuracy(flags), parent_num_samples=len(flags), parent_num_correct=sum(flags)
        )
        summary[parent] = float(_accuracy(flags))
        summary.update({f"{parent}/{leaf}": float(_accuracy(f)) for leaf, f in sorted(tree[parent].items())})
    scores.update(total_samples=len(hits), total_corrects=sum(hits.values()), total_acc=_accuracy(list(hits.values())))
    return summary, scores


def _by_empty_option(record: dict) -> bool:
    letter = parse_mmbench(record["pred"], record["options_dict"])
    return (
        letter is not None
        and _options(record["options_dict"]).get(letter) == ""
        and option_letter(strip_mmbench_prefix(record["pred"])) is None
    )


def score_mmbench(records: list[dict], seed: int = OFFICIAL_SEED, judged: dict[str, str] | None = None) -> Score:
    """A question counts as right when all its rotations are.

    Args:
        seed: of the guesses; the default is the official scorer's.
        judged: id -> letter that a judge read in an answer which the rules could not decide.
    """
    guess, guesses, judged = random.Random(seed), 0, judged or {}
    open_ids = {id(record) for record in undecided_mmbench(records)}
    letters, hits, tree = {}, {}, defaultdict(lambda: defaultdict(list))
    for main, group in _groups(records).items():
        for record in group:
            letters[id(record)] = parse_mmbench(record["pred"], record["options_dict"])
        hit = all(letters[id(r)] in (None, r["answer"]) for r in group)
        for record in group:
            if not hit:
                break
            if id(record) in open_ids:
                letter = judged.get(str(record["id"]))
                if letter is None:
                    letter = guess.choice([r["answer"] for r in group])
                    guesses += 1
                letters[id(record)] = letter
                hit = letter == record["answer"]
        hits[main] = int(hit)
        tree[group[0]["l2_category"]][group[0]["category"]].append(hit)
    summary, scores = _tables(tree, hits)
    return Score(
        summary,
        {"scores": scores, "hits_per_main_index": hits},
        [{"id": r["id"], "parsed": letters[id(r)], "correct": letters[id(r)] == r["answer"]} for r in records],
        {
            "empty_option": sum(map(_by_empty_option, records)),
            "prefix": sum(_PREFIX in r["pred"] and not r["pred"].startswith(_PREFIX) for r in records),
            "guess": guesses,
        },
    )


# The judge: MMBench's own answer extraction ----------------------------------------------------------------------------

JUDGE_PROMPT = (
    "You are an AI assistant who will help me to match an answer with several options of a single-choice question. You are "
    "provided with a question, several options, and an answer, and you need to find which option is most similar to the "
    "answer. If the meaning of all options are significantly different from the answer, output E. Your should output a "
    "single uppercase character in A, B, C, D (if they are valid options), and E. \n"
    "Example 1: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: a cute teddy bear\nYour output: A\n"
    "Example 2: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: Spider\nYour output: E\n"
    "Example 3: \nQuestion: {question}?\nOptions: {options}\nAnswer: {answer}\nYour output: "
)


def mmbench_request(record: dict) -> Request:
    options = {k: v for k, v in record["options_dict"].items() if v != "N/A" and k in "ABCD"}
    text = JUDGE_PROMPT.format(
        question=record["question"], options=" ".join(f"{k}. {v}" for k, v in options.items()), answer=record["pred"]
    )

    def read(reply: str) -> str:
        letter = parse_mmbench(reply, {**options, **dict.fromkeys(set("ABCD") - set(options), "\0")})
        if letter is None:
            raise ValueError(f"no option in the reply: {reply[:80]!r}")
        return letter

    return Request(str(record["id"]), [{"role": "user", "content": text}], read, 0.0, 16)


# The evaluation server's file ------------------------------------------------------------------------------------------


def write_submission(records: list[dict], folder: Path) -> Path:
    """One row for each rotation."""
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet")
    sheet.append(["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "prediction"])
    for record in records:
        texts = [record.get("question"), record.get("hint"), *(record["options_dict"].get(k) for k in "ABCD")]
        texts = [None if text == "N/A" else text for text in texts]
        texts += [record["answer"], record["category"], record["l2_category"], record["pred"]]
        row = [ILLEGAL_CHARACTERS_RE.sub("", text) if isinstance(text, str) else text for text in texts]
        cells = [WriteOnlyCell(sheet, value) for value in (record["index"], *row)]
        for cell in cells:
            if isinstance(cell.value, str):
                cell.data_type = "s"  # an answer that begins with = is no formula
        sheet.append(cells)
    path = folder / "submission.xlsx"
    book.save(path)
    return path


TASK = Task(
    name="mmbench", display_name="MMBench", folder="MMBench", hub="lmms-lab/MMBench_EN", max_new_tokens=128,
    read=read_mmbench, score=score_mmbench, seed=OFFICIAL_SEED,
    together=lambda q: q.fields["index"] % CIRCULAR, category=lambda q: q.fields["category"],
    fields={
        "pred": TEXT, "answer": TEXT, "index": NUMBER, "category": ANY, "l2_category": ANY,
        "options_dict": of_type(dict, "an object: letter -> text"),
    },
    quirks={
        "empty_option": "with exactly one missing option, an answer that names no option is that option's letter",
        "prefix": 'the length of "The answer is " is cut from the front even where these words stand later, and every dot after it',
        "guess": "no option could be matched: a random one among the answers of the question's rotations",
    },
    judging=Judging(mmbench_request, undecided_mmbench, optional=True),
    submission=write_submission, submission_needs="openpyxl",
)  # fmt: skip
