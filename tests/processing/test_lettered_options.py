# SPDX-License-Identifier: Apache-2.0
"""Options that speak of letters themselves."""

import pytest

from processing.lettered_options import split_options


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(A) one (B) two", ["one", "two"]),
        ("(A) Does vitamin (B) help? (B) Does it glow? (C) Neither", ["Does vitamin (B) help?", "Does it glow?", "Neither"]),
        ("(A) x (B) y (B) (C) z", ["x", "y (B)", "z"]),  # no option is empty
        ("(A) x (C) y (B) z (C) (D) w", ["x (C) y", "z", "", "w"]),
        ("(A) (R)-alanine (B) (S)-alanine", ["(R)-alanine", "(S)-alanine"]),
    ],
)  # fmt: skip
def test_options_follow_the_letters(text, expected):
    assert split_options(text) == expected


@pytest.mark.parametrize("text", ["", "one", "(B) x (A) y", "x (A) y"])
def test_options_without_a_beginning(text):
    with pytest.raises(ValueError, match=r"do not begin with '\(A\)'"):
        split_options(text)
