# SPDX-License-Identifier: Apache-2.0
"""Options in one text, as LLaVA's conversion of ScienceQA writes them; read alike in training and evaluation."""

import re

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def split_options(text: str) -> list[str]:
    """The options of a text: "(A) one (B) two" as ["one", "two"].

    Markers count in the order of the letters, each the last one before the next, so that a "(B)" that an option speaks
    of makes no option. A marker right before another one may open an empty option, so it counts only where its letter has
    no other.

    Raises:
        ValueError: no marker "(A)" at the beginning.
    """
    marks = list(re.finditer(r"\(([A-Z])\)(?=\s*\S)", text))
    if not marks or text[: marks[0].start()].strip() or marks[0][1] != "A":
        raise ValueError(f"options {text[:200]!r} do not begin with '(A)'")
    first = []  # the earliest marker of each letter that the letters before it allow
    for index, mark in enumerate(marks):
        if len(first) < len(LETTERS) and mark[1] == LETTERS[len(first)]:
            first.append(index)
    opens = [text[mark.end() : later.start()].strip() != "" for mark, later in zip(marks, marks[1:])] + [True]
    chosen, end = [], len(marks)
    for start in reversed(first[1:]):
        same = [index for index in range(start, end) if marks[index][1] == marks[start][1]]
        end = max(same, key=lambda index: (opens[index], index))
        chosen.insert(0, marks[end])
    chosen.insert(0, marks[0])
    stops = [mark.start() for mark in chosen[1:]] + [len(text)]
    return [text[mark.end() : stop].strip() for mark, stop in zip(chosen, stops)]
