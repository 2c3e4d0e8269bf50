# SPDX-License-Identifier: Apache-2.0
"""Scores of saved predictions, as the authors computed them: pure functions from records to a `Score`.

A record is a dict with the question's fields (`answer`, `category` ...) and `pred`, the model's text. The numbers are
meant to be compared with published ones, so the odd rules of the official scorers are kept. Each has one line in
`QUIRKS`, and a `Score` counts how many items were decided by it.
"""

import random
import re
import string
from collections import defaultdict
from dataclasses import dataclass, field

MME_SUBSETS = {
    "perception": [
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ],
    "cognition": ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"],
}  # fmt: skip
MMMU_DOMAINS = {
    "Art and Design": ["Art", "Art_Theory", "Design", "Music"],
    "Business": ["Accounting", "Economics", "Finance", "Manage", "Marketing"],
    "Science": ["Biology", "Chemistry", "Geography", "Math", "Physics"],
    "Health and Medicine": [
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health",
    ],
    "Humanities and Social Science": ["History", "Literature", "Sociology", "Psychology"],
    "Tech and Engineering": [
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power", "Materials",
        "Mechanical_Engineering",
    ],
}  # fmt: skip
POPE_CATEGORIES = ("adversarial", "popular", "random")
MMBENCH_SEED = 2680  # the official scorer's own; ScienceQA's and MMMU's draw without one
CIRCULAR = 10**6  # rotations of a MMBench question have its index plus multiples of this

QUIRKS = {
    "mme": {
        "first_four_characters": 'only the first four characters are searched: "Not sure" and "uno" are no, "eyes" is yes',
        "neither": "neither yes nor no was found: wrong, whatever the answer is",
    },
    "pope": {
        "yes_by_default": 'everything is yes unless one of the words before the first dot is exactly "No", "no" or "not"; '
        'so are "NO", "Nope" and an empty answer',
        "label_not_no": 'every right answer but exactly "no" is taken for yes; counted where it is not "yes" either',
    },
    "mmbench": {
        "empty_option": "with exactly one missing option, an answer that names no option is that option's letter",
        "prefix": 'the length of "The answer is " is cut from the front even where these words stand later, and every dot after it',
        "guess": "no option could be matched: a random one among the answers of the question's rotations",
    },
    "scienceqa": {
        "last_choice": "several choices occur in the answer: the last one in the list counts",
        "guess": "no choice could be matched: a random one",
    },
    "seed": {"not_a_bare_letter": 'wrong although the right letter is there, as in "A." or "(A)"'},
    "mmmu": {
        "guess": 'not exactly one of the letters ("A." is not): a random one',
        "list_as_text": "an open question whose several accepted answers are compared as one text, brackets included",
        "unknown_subject": "not one of the 30 subjects: in no score",
    },
    "llava_w": {},
    "mm_vet": {},
}

REQUIRED = {
    "mme": ("pred", "answer", "image_id", "dataset_name"),
    "pope": ("pred", "answer", "category"),
    "mmbench": ("pred", "answer", "index", "category", "l2_category", "options_dict"),
    "scienceqa": ("pred", "answer", "choices"),
    "seed": ("pred", "answer", "question_type"),
    "mmmu": ("pred", "answer", "question_type", "all_choices"),
    "llava_w": ("pred", "question", "category"),
    "mm_vet": ("pred", "question", "answer"),
}


_KINDS = {"pred": (str, "a text"), "answer": (str, "a text")}
_KINDS_OF = {
    "mmbench": {"index": ((int, str), "a number"), "options_dict": (dict, "an object: letter -> text")},
    "scienceqa": {"answer": ((int, str), "a letter or an index"), "choices": (list, "a list")},
    "seed": {"question_type": (str, "a text")},
    "mmmu": {"answer": ((str, list), "a text or a list of them"), "all_choices": (list, "a list")},
}


@dataclass
class Score:
    """What a scorer returns.

    summary: name -> number, flat; the names are the official ones.
    details: the same and more, nested as the official code has it.
    parsed: for each record `{"id", "parsed", "correct"}`, in order.
    quirks: name in `QUIRKS` -> number of items that it decided.
    """

    summary: dict[str, float]
    details: dict = field(default_factory=dict)
    parsed: list[dict] = field(default_factory=list)
    quirks: dict[str, int] = field(default_factory=dict)


def check_records(task: str, records: list[dict], source: str) -> None:
    """Refuses what cannot be scored, by line number and field.

    Raises:
        ValueError: no records, a missing field, or the same `id` twice.
    """
    if not records:
        raise ValueError(f"{source} has no predictions; give a file with one JSON object a line")
    seen = {}
    for number, record in enumerate(records, 1):
        missing = [name for name in ("id", *REQUIRED.get(task, ("pred",))) if name not in record]
        if missing:
            raise ValueError(
                f"{source}, line {number}: no {', '.join(missing)}; a prediction of {task} has the fields "
                f"id, {', '.join(REQUIRED.get(task, ('pred',)))}"
            )
        for name, (kinds, words) in {**_KINDS, **_KINDS_OF.get(task, {})}.items():
            if name in record and not isinstance(record[name], kinds):
                raise ValueError(f"{source}, line {number}: {name} {record[name]!r} is not {words}")
        if task == "mmbench" and not str(record["index"]).isdecimal():
            raise ValueError(f"{source}, line {number}: index {record['index']!r} is not a number")
        key = str(record["id"])
        if key in seen:
            raise ValueError(
                f"{source}: id {key!r} stands on line {seen[key]} and again on line {number}; keep one of them"
            )
        seen[key] = number


def _add(values) -> float:
    """In plain order: `sum` compensates rounding from Python 3.12 on, which changes the last digit."""
    total = 0.0
    for value in values:
        total += value
    return total


def _percent(part: int, whole: int) -> float:
    return part / whole * 100


# MME -------------------------------------------------------------------------------------------------------------------


def parse_mme(pred: str) -> str:
    """`yes`, `no` or `other`. A tab ends the answer, because the official code saves answers in columns."""
    text = pred.split("\t")[0].lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def parse_mme_relaxed(pred: str) -> str:
    """`yes` or `no` where exactly one of them is among the words, else `other`."""
    words = set(re.findall(r"\b(?:yes|no)\b", pred.lower()))
    return words.pop() if len(words) == 1 else "other"


def _mme_subset(pairs: list[tuple[str, str]]) -> tuple[list[float], dict]:
    """[score, accuracy, accuracy+] out of 200, 100, 100, and the confusion counts, of (parsed, answer) in order."""
    right = [parsed == answer for parsed, answer in pairs]
    images = [all(right[i : i + 2]) for i in range(0, len(right), 2)]
    accuracy, plus = _percent(sum(right), len(right)), _percent(sum(images), len(images))
    tp, fn, tn, fp = (
        sum(pair == kind for pair in pairs) for kind in (("yes", "yes"), ("no", "yes"), ("no", "no"), ("yes", "no"))
    )
    confusion = {
        "TP": tp,
        "FN": fn,
        "TN": tn,
        "FP": fp,
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "other_num": sum(parsed == "other" for parsed, _ in pairs),
        "acc": sum(right) / len(right),
    }
    return [accuracy + plus, accuracy, plus], confusion


def _mme_tables(records: list[dict], parse) -> tuple[dict, dict]:
    subsets = defaultdict(list)
    for record in records:
        subsets[record["dataset_name"]].append((parse(record["pred"].split("\t")[0]), record["answer"].lower()))
    scores, confusion = {}, {}
    for group, names in MME_SUBSETS.items():
        table = {}
        for name in names:
            if name in subsets:
                table[name], confusion[name] = _mme_subset(subsets[name])
        totals = [_add(row[i] for row in table.values()) for i in (1, 2)]
        scores[group.capitalize()] = {**table, "Total": [sum(totals), *totals]}
    totals = [scores["Perception"]["Total"][i] + scores["Cognition"]["Total"][i] for i in (1, 2)]
    scores["Total"] = [sum(totals), *totals]
    return scores, confusion


def score_mme(records: list[dict]) -> Score:
    """MME: accuracy plus accuracy+ (both questions of an image right), each out of 100, summed over the subsets.

    The two questions of an image follow each other in `records`.

    Raises:
        ValueError: an unknown subset, or a question without its second.
    """
    known = [name for names in MME_SUBSETS.values() for name in names]
    subsets = defaultdict(list)
    for record in records:
        if record["dataset_name"] not in known:
            raise ValueError(f"dataset_name {record['dataset_name']!r} is no MME subset; they are {', '.join(known)}")
        if record["answer"].lower() not in ("yes", "no"):
            raise ValueError(f"MME id {record['id']!r}: answer {record['answer']!r} is neither Yes nor No")
        subsets[record["dataset_name"]].append(record)
    for name, rows in subsets.items():
        for first, second in zip(rows[::2], [*rows[1::2], None]):
            if second is None or first["image_id"] != second["image_id"]:
                raise ValueError(
                    f"MME {name}: the question {first['id']!r} about {first['image_id']} is not followed by the second one "
                    "about this image; give the predictions in the order of the data, two for each image"
                )
    scores, confusion = _mme_tables(records, parse_mme)
    summary = {"total": scores["Total"][0]}
    for group, names in MME_SUBSETS.items():
        table = scores[group.capitalize()]
        summary[group] = table["Total"][0]
        summary.update({f"{group}/{name}": table[name][0] for name in names if name in table})
    parsed = [(record, parse_mme(record["pred"])) for record in records]
    return Score(
        summary,
        {
            "scores": scores,
            "per_subset_metric": confusion,
            "scores_relaxed": _mme_tables(records, parse_mme_relaxed)[0],
        },
        [{"id": r["id"], "parsed": p, "correct": p == r["answer"].lower()} for r, p in parsed],
        {
            "first_four_characters": sum(p not in ("other", parse_mme_relaxed(r["pred"])) for r, p in parsed),
            "neither": sum(p == "other" for _, p in parsed),
        },
    )


# POPE ------------------------------------------------------------------------------------------------------------------


def parse_pope(pred: str) -> str:
    words = pred.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _pope_label(record: dict) -> str:
    return "no" if record["answer"] == "no" else "yes"


def score_pope(records: list[dict]) -> Score:
    """POPE: accuracy, precision, recall, F1 and share of yes, for each way of choosing the absent objects.

    A category without questions has zeros, which are also in the average.

    Raises:
        ValueError: an unknown category.
    """
    unknown = {str(r["category"]) for r in records} - set(POPE_CATEGORIES)
    if unknown:
        raise ValueError(f"POPE has no category {sorted(unknown)}; they are {', '.join(POPE_CATEGORIES)}")
    tiny = 1e-12  # added to every denominator by the official code, and visible in its digits
    scores = {}
    for category in POPE_CATEGORIES:
        pairs = [(parse_pope(r["pred"]), _pope_label(r)) for r in records if r["category"] == category]
        tp, fp, tn, fn = (
            sum(pair == kind for pair in pairs) for kind in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"))
        )
        precision, recall = tp / (tp + fp + tiny), tp / (tp + fn + tiny)
        scores[category] = {
            "accuracy": (tp + tn) / (len(pairs) + tiny),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall + tiny),
            "yes_ratio": (tp + fp) / (len(pairs) + tiny),
            "TP": tp,
            "FP": fp,
            "TN": tn,
            "FN": fn,
        }
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    average = {name: _add(row[name] for row in scores.values()) / len(scores) for name in names}
    return Score(
        {f"{category}/{name}": row[name] for category, row in scores.items() for name in names},
        {"scores": scores, "average": average},
        [
            {"id": r["id"], "parsed": parse_pope(r["pred"]), "correct": parse_pope(r["pred"]) == _pope_label(r)}
            for r in records
        ],
        {
            "yes_by_default": sum(
                parse_pope(r["pred"]) == "yes" and "yes" not in re.findall("[a-z]+", r["pred"].lower()) for r in records
            ),
            "label_not_no": sum(r["answer"] not in ("yes", "no") for r in records),
        },
    )


# MMBench ---------------------------------------------------------------------------------------------------------------

_PREFIX = "The answer is "
_AROUND_LETTER = [
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
]  # fmt: skip


def strip_mmbench_prefix(pred: str) -> str:
    return pred[len(_PREFIX) :].replace(".", "") if _PREFIX in pred else pred


def _mmbench_letter(text: str) -> str | None:
    """The one option letter that stands alone or between the usual punctuation. E counts, too."""
    if "Failed to obtain answer via API" in text:
        return None
    words = text.split()
    found = [letter for letter in "ABCDE" if letter in words]
    if len(found) == 1 and not ("A" in words and len(words) > 3):  # "A" may be the article
        return found[0]
    for before, after in _AROUND_LETTER:
        found = [letter for letter in "ABCDE" if before + letter + after in words]
        if len(found) == 1:
            return found[0]
    return None


def _mmbench_options(options: dict) -> dict[str, str]:
    """The four that can be matched, in lower case; a missing one is the empty text, which every answer contains.

    Only the reader's "N/A" is that: null is no option at all.
    """
    texts = {letter: options.get(letter, "N/A") for letter in "ABCD"}
    return {k: "" if text == "N/A" else str(text).lower() for k, text in texts.items() if text is not None}


def parse_mmbench(pred: str, options: dict) -> str | None:
    """The letter that the answer names, by itself or by an option's text; None where that is not decided."""
    text = strip_mmbench_prefix(pred)
    letter = _mmbench_letter(text)
    if letter:
        return letter
    found = [letter for letter, option in _mmbench_options(options).items() if option in text.lower()]
    return found[0] if len(found) == 1 else None


def _mmbench_groups(records: list[dict]) -> dict[int, list[dict]]:
    """Rotations by question, both in the order of the records: it decides which guess falls to which rotation."""
    groups = defaultdict(list)
    for record in records:
        groups[int(record["index"]) % CIRCULAR].append(record)
    return groups


def undecided_mmbench(records: list[dict]) -> list[dict]:
    """The records that have to be guessed, or read by a judge: no letter found, and no rotation wrong already."""
    out = []
    for group in _mmbench_groups(records).values():
        letters = [parse_mmbench(r["pred"], r["options_dict"]) for r in group]
        if all(letter in (None, r["answer"]) for letter, r in zip(letters, group)):
            out += [r for letter, r in zip(letters, group) if letter is None]
    return out


def score_mmbench(records: list[dict], seed: int = MMBENCH_SEED, extracted: dict[str, str] | None = None) -> Score:
    """MMBench, circular: a question counts as right when all its rotations are.

    Args:
        seed: of the guesses; the default is the official scorer's.
        extracted: id -> letter that a judge read in an answer which the rules could not decide.
    """
    guess, extracted = random.Random(seed), extracted or {}
    undecided = {id(r) for r in undecided_mmbench(records)}
    letters, guesses, hits, tree = {}, 0, {}, defaultdict(lambda: defaultdict(list))
    for main, group in _mmbench_groups(records).items():
        hit = True
        for record in group:
            letter = parse_mmbench(record["pred"], record["options_dict"])
            letters[id(record)] = letter
            if letter is not None and letter != record["answer"]:
                hit = False
        for record in group:
            if not hit:
                break
            if id(record) in undecided:
                letter = extracted.get(str(record["id"]))
                if letter is None:
                    letter = guess.choice([r["answer"] for r in group])
                    guesses += 1
                letters[id(record)] = letter
                hit = letter == record["answer"]
        hits[main] = int(hit)
        tree[group[0]["l2_category"]][group[0]["category"]].append(hit)

    def accuracy(flags):
        return f"{_percent(sum(flags), len(flags)):.2f}"

    scores, summary = {}, {"total_acc": float(accuracy(list(hits.values())))}
    for parent in sorted(tree):
        flags = [flag for leaf in tree[parent].values() for flag in leaf]
        scores[parent] = {
            leaf: {"num_sampes": len(f), "num_correct": sum(f), "acc": accuracy(f)}  # the official key's spelling
            for leaf, f in sorted(tree[parent].items())
        }
        scores[parent].update(
            parent_task_acc=accuracy(flags), parent_num_samples=len(flags), parent_num_correct=sum(flags)
        )
        summary[parent] = float(accuracy(flags))
        summary.update({f"{parent}/{leaf}": float(accuracy(f)) for leaf, f in sorted(tree[parent].items())})
    scores.update(total_samples=len(hits), total_corrects=sum(hits.values()), total_acc=accuracy(list(hits.values())))

    def by_empty_option(record):
        letter = parse_mmbench(record["pred"], record["options_dict"])
        return (
            letter is not None
            and _mmbench_options(record["options_dict"]).get(letter) == ""
            and _mmbench_letter(strip_mmbench_prefix(record["pred"])) is None
        )

    return Score(
        summary,
        {"scores": scores, "hits_per_main_index": hits},
        [{"id": r["id"], "parsed": letters[id(r)], "correct": letters[id(r)] == r["answer"]} for r in records],
        {
            "empty_option": sum(map(by_empty_option, records)),
            "prefix": sum(_PREFIX in r["pred"] and not r["pred"].startswith(_PREFIX) for r in records),
            "guess": guesses,
        },
    )


# ScienceQA -------------------------------------------------------------------------------------------------------------


def clean_scienceqa(pred: str) -> str:
    return re.sub(r"[().]", "", pred)


def parse_scienceqa(pred: str, choices: list[str]) -> str | None:
    """A single character as it is, else the letter of the last choice that occurs in the answer, else None."""
    text = clean_scienceqa(pred)
    if len(text) == 1:
        return text
    found = [letter for letter, choice in zip(string.ascii_uppercase, choices) if choice in text]
    return found[-1] if found else None


def _answer_index(record: dict) -> int:
    answer = record["answer"]
    index = answer if isinstance(answer, int) else string.ascii_uppercase.find(str(answer))
    if not 0 <= index < len(record["choices"]) or (isinstance(answer, str) and len(answer) != 1):
        raise ValueError(f"id {record['id']!r}: answer {answer!r} is none of its {len(record['choices'])} choices")
    return index


def score_scienceqa(records: list[dict], seed: int = 0) -> Score:
    """ScienceQA: accuracy over all questions, those with an image, and those without.

    Args:
        seed: of the guesses; the official scorer draws unseeded, twice a guess, and uses the first draw.
    """
    guess = random.Random(seed)
    parsed, guesses, several = [], 0, 0
    right = {"image": [], "text": []}
    for record in records:
        choices, gold = record["choices"], _answer_index(record)
        letter = parse_scienceqa(record["pred"], choices)
        if letter in list(string.ascii_uppercase[: len(choices)]):
            index = string.ascii_uppercase.index(letter)
            text = clean_scienceqa(record["pred"])
            several += len(text) > 1 and sum(choice in text for choice in choices) > 1
        else:
            index, _ = (guess.choice(range(len(choices))) for _ in range(2))
            guesses += 1
        if "image_path" in record:
            has_image = record["image_path"] not in (None, "None")
        else:
            has_image = "<image>" in record.get("prompt", "")
        right["image" if has_image else "text"].append(index == gold)
        parsed.append({"id": record["id"], "parsed": letter or "FAILED", "correct": index == gold})
    flags = right["image"] + right["text"]
    summary = {"acc": _percent(sum(flags), len(flags))}
    summary.update({f"acc-{kind}": _percent(sum(f), len(f)) if f else 0.0 for kind, f in right.items()})
    return Score(
        summary,
        {"correct": sum(flags), "incorrect": len(flags) - sum(flags), "count": len(flags)},
        parsed,
        {"last_choice": several, "guess": guesses},
    )


# SEED-Bench ------------------------------------------------------------------------------------------------------------


def score_seed(records: list[dict]) -> Score:
    """SEED-Bench: accuracy by question type; an answer is right when it is the letter, in either case."""
    types = defaultdict(list)
    parsed, wrapped = [], 0
    for record in records:
        letter = record["pred"].strip().lower()
        correct = letter == record["answer"].strip().lower()
        types[record["question_type"]].append(correct)
        parsed.append({"id": record["id"], "parsed": letter.upper(), "correct": correct})
        wrapped += not correct and _mmbench_letter(record["pred"]) == record["answer"]
    scores = {name: {"total": len(f), "correct": sum(f), "acc": _percent(sum(f), len(f))} for name, f in types.items()}
    flags = [item["correct"] for item in parsed]
    scores["Total"] = {"total": len(flags), "correct": sum(flags), "acc": _percent(sum(flags), len(flags))}
    names = ["Total", *(name for name in scores if name != "Total")]
    return Score(
        {name.lower().replace(" ", "_"): scores[name]["acc"] for name in names},
        {"scores": scores},
        parsed,
        {"not_a_bare_letter": wrapped},
    )


# MMMU ------------------------------------------------------------------------------------------------------------------

# Rules and patterns of MMMU's own evaluation of open answers (github.com/MMMU-Benchmark/MMMU, eval_utils).
_ANSWER_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def _normalise_mmmu(text: str) -> list[float | str]:
    """A number rounded to two decimals, or the lower-cased text; one letter gets a blank at either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def parse_mmmu_open(pred: str) -> list[float | str]:
    """Candidate answers in an open answer: what follows a cue in each line, and every number in it."""
    pred = pred.strip().strip(".").lower()
    # The text is lower-cased already, so that no sentence ever begins with a capital and only lines are split.
    lines = re.split(r"\.\s(?=[A-Z])|\n", pred)
    keys = []
    for number, line in enumerate(lines, 1):
        cues = (*_ANSWER_CUES, "=") if number == len(lines) else _ANSWER_CUES
        tails = [tail for tail in (line.split(cue)[-1].strip() for cue in cues if cue in line)]
        shortest = ""  # an empty tail gives way to the next one
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            keys.append(shortest)
    keys = keys or [pred]
    candidates = keys + [number for key in keys for pattern in _NUMBERS for number in re.findall(pattern, key)]
    return sorted({item for candidate in candidates for item in _normalise_mmmu(candidate)}, key=str)


def is_right_mmmu_open(gold: str | list[str], candidates: list[float | str]) -> bool:
    """A text candidate is right when it contains an accepted text, a number when it equals an accepted number."""
    accepted = [item for answer in (gold if isinstance(gold, list) else [gold]) for item in _normalise_mmmu(answer)]
    return any(
        any(isinstance(a, str) and a in candidate for a in accepted)
        if isinstance(candidate, str)
        else candidate in accepted
        for candidate in candidates
    )


def score_mmmu(records: list[dict], seed: int = 0) -> Score:
    """MMMU: accuracy (0 to 1) by subject, and over all questions.

    Args:
        seed: of the guesses; the official scorer draws unseeded.
    """
    guess = random.Random(seed)
    known = {name for names in MMMU_DOMAINS.values() for name in names}
    subjects, parsed, quirks = defaultdict(list), [], {"guess": 0, "list_as_text": 0, "unknown_subject": 0}
    for record in records:
        if record["question_type"] == "multiple-choice":
            letter = record["pred"]
            if letter not in record["all_choices"] or record.get("num_option_images"):
                if not record["all_choices"]:
                    raise ValueError(f"MMMU id {record['id']!r}: a multiple-choice question with empty all_choices")
                letter = guess.choice(record["all_choices"])
                quirks["guess"] += 1
            gold = record["answer"]
            found, correct = letter, letter in gold if isinstance(gold, list) else letter == gold
        else:
            gold = record["answer"]
            found = parse_mmmu_open(record["pred"])
            correct = is_right_mmmu_open(gold, found)
            quirks["list_as_text"] += isinstance(gold, str) and gold.startswith("[")
        # validation_Art_Theory_12 -> Art_Theory; a prediction file may number its lines and keep this in question_id
        name = next((str(record[k]) for k in ("question_id", "id") if str(record.get(k, "")).count("_") >= 2), None)
        if name is None:
            raise ValueError(
                f"id {record['id']!r} does not name a MMMU subject; it looks like validation_Art_Theory_12"
            )
        subject = "_".join(name.split("_")[1:-1])
        if subject in known:
            subjects[subject].append(correct)
        else:
            quirks["unknown_subject"] += 1
        parsed.append({"id": record["id"], "parsed": found, "correct": correct})
    if not subjects:
        raise ValueError(
            f"no id names a MMMU subject (the first is {records[0]['id']!r}); they are {', '.join(sorted(known))}"
        )
    scores = {name: {"acc": sum(f) / len(f), "num_example": len(f)} for name, f in sorted(subjects.items())}

    def mean(names):
        count = sum(scores[name]["num_example"] for name in names)
        return _add(scores[name]["acc"] * scores[name]["num_example"] for name in names) / count

    domains = {
        domain: mean(present)
        for domain, names in MMMU_DOMAINS.items()
        if (present := [name for name in names if name in scores])
    }
    overall = mean(list(scores))
    summary = {"overall": overall, **{name: row["acc"] for name, row in scores.items()}}
    return Score(summary, {"scores": scores, "domains": domains}, parsed, quirks)


# Judged tasks ----------------------------------------------------------------------------------------------------------


def score_llava_w(records: list[dict], judgements: dict[str, tuple[float, float]]) -> Score:
    """LLaVA-Bench: the judge's points for the model, as a percentage of its points for GPT-4's answer.

    Args:
        judgements: id -> (points of the reference answer, points of the model), of the judged records.
    """
    groups = defaultdict(list)
    for record in records:
        if str(record["id"]) in judgements:
            for name in ("all", record["category"]):
                groups[name].append(judgements[str(record["id"])])
    details = {
        name: {
            "reference": _add(r for r, _ in rows) / len(rows) * 10,
            "model": _add(m for _, m in rows) / len(rows) * 10,
            "judged": len(rows),
        }
        for name, rows in groups.items()
    }
    summary = {name: _percent(row["model"], row["reference"]) for name, row in details.items() if row["reference"]}
    parsed = [{"id": r["id"], "parsed": judgements.get(str(r["id"]))} for r in records]
    return Score(summary, {"scores": details}, parsed)


def score_mm_vet(records: list[dict], judgements: dict[str, float]) -> Score:
    """MM-Vet: mean of the judge's correctness (0 to 1) as a percentage, in total and by capability.

    Args:
        judgements: id -> correctness, of the judged records.
    """
    groups = defaultdict(list)
    for record in records:
        if str(record["id"]) in judgements:
            for name in ("total", *record.get("capability", ())):
                groups[name].append(judgements[str(record["id"])])
    details = {name: {"acc": _add(rows) / len(rows) * 100, "judged": len(rows)} for name, rows in groups.items()}
    parsed = [{"id": r["id"], "parsed": judgements.get(str(r["id"]))} for r in records]
    return Score({name: row["acc"] for name, row in details.items()}, {"scores": details}, parsed)
