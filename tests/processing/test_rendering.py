# SPDX-License-Identifier: Apache-2.0
"""The shipped templates and their short cut in Python give the same text, cut at the same places."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processing.processing_honeybee import CAPTION_TEMPLATE, CHAT_TEMPLATE
from processing.rendering import _jinja, render

WORDS = st.sampled_from(["<image>", "\nHuman: ", "\nAI: ", "a", " ", "\n", "é", "{{ x }}", "</s>", "Human", ": "])
TEXTS = st.lists(WORDS, max_size=5).map(lambda words: {"type": "text", "text": "".join(words)})
IMAGES = st.just({"type": "image"})
USERS = st.lists(st.one_of(IMAGES, TEXTS, TEXTS.map(lambda item: {**item, "continues": True})), max_size=4)
TURNS = st.lists(
    st.one_of(
        USERS.map(lambda items: {"role": "user", "content": items}),
        st.lists(TEXTS, max_size=2).map(lambda items: {"role": "assistant", "content": items}),
    ),
    min_size=1,
    max_size=5,
)
SYSTEM = st.one_of(st.just([]), TEXTS.map(lambda item: [{"role": "system", "content": [item]}]))


def joined(pieces):
    """Neighbours of the same kind as one: the short cut sets the system line apart."""
    out = []
    for text, learned in pieces:
        if out and out[-1][1] == learned and not learned:
            out[-1] = (out[-1][0] + text, learned)
        elif text:
            out.append((text, learned))
    return out


@given(SYSTEM, TURNS)
def test_chat(system, turns):
    messages = system + turns
    assert joined(render(messages, CHAT_TEMPLATE, "<s>", "</s>")) == joined(
        _jinja(messages, CHAT_TEMPLATE, "<s>", "</s>")
    )


@given(TEXTS, st.integers(1, 3))
def test_caption(text, images):
    messages = [
        {"role": "user", "content": [{"type": "image"}] * images},
        {"role": "assistant", "content": [text]},
    ]
    expected = joined(_jinja(messages, CAPTION_TEMPLATE, "<s>", "</s>"))
    assert joined(render(messages, CAPTION_TEMPLATE, "<s>", "</s>")) == expected


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CAPTION_TEMPLATE])
def test_a_shipped_template_on_one_line_takes_the_short_cut(template, monkeypatch):
    monkeypatch.setattr("processing.rendering._jinja", None)
    messages = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
    ]
    on_one_line = re.sub(r"\n *", "", template)
    assert on_one_line != template
    assert render(messages, on_one_line, "<s>", "</s>") == render(messages, template, "<s>", "</s>")
    with pytest.raises(TypeError):
        render(messages, template.replace("'image_url'", "'picture'"), "<s>", "</s>")


def test_a_template_of_ones_own_is_rendered():
    template = "{% for message in messages %}{% if message.role == 'assistant' %}={% generation %}{{ message.content[0].text }}{% endgeneration %}{% endif %}{% endfor %}"
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    assert render([answer, answer], template, "", "") == [("=", False), ("yes", True)] * 2
