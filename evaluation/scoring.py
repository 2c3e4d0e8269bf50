# SPDX-License-Identifier: Apache-2.0
"""What the scorers of several tasks share. A scorer is a pure function from records to a `Score`.

A record is a dict with the question's fields (`answer`, `category` ...) and `pred`, the model's text. The numbers are
meant to be compared with published ones, so the odd rules of the official scorers are kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Score:
    """What a scorer returns.

    summary: name -> number, flat; the names are the official ones.
    details: the same and more, nested as the official code has it.
    parsed: for each record `{"id", "parsed", "correct"}`, in order.
    quirks: name of an odd rule in the task's `quirks` -> number of items that it decided.
    """

    summary: dict[str, float]
    details: dict = field(default_factory=dict)
    parsed: list[dict] = field(default_factory=list)
    quirks: dict[str, int] = field(default_factory=dict)


def add_in_order(values: Iterable[float]) -> float:
    """`sum` compensates rounding from Python 3.12 on, which changes the last digit."""
    total = 0.0
    for value in values:
        total += value
    return total


def percent(part: int, whole: int) -> float:
    return part / whole * 100


_AROUND_LETTER = [
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
]  # fmt: skip


def option_letter(text: str) -> str | None:
    """MMBench's rule: the one option letter that stands alone or between the usual punctuation. E counts, too."""
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
