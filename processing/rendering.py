# SPDX-License-Identifier: Apache-2.0
"""Conversations as text, cut where what is learned starts and ends."""

import functools

from jinja2 import Environment
from transformers.utils.chat_template_utils import render_jinja_template

from processing.processing_honeybee import CAPTION_TEMPLATE, CHAT_TEMPLATE, GUARD, ROLE_MARKERS, SYSTEM_BASE

HUMAN, ASSISTANT = ROLE_MARKERS


def render(messages: list[dict], template: str, bos_token: str, eos_token: str) -> list[tuple[str, bool]]:
    """Text and whether it is learned, in pieces that a tokenizer of ours can tokenize apart; one placeholder an image.

    Args:
        messages: as `normalize_conversation` gives them.
        template: a Jinja chat template. For the shipped two this is written out in Python, which takes a tenth of the time;
            a test holds both to the same text.
    """
    if _is_but_for_its_lines(template, CHAT_TEMPLATE):
        pieces = _chat(messages, bos_token, eos_token)
    elif _is_but_for_its_lines(template, CAPTION_TEMPLATE):
        images = sum(item["type"] == "image" for message in messages for item in message["content"])
        pieces = [(bos_token + "<image>" * images, False)]
        pieces += [(_words(message) + eos_token, True) for message in messages if message["role"] == "assistant"]
    else:
        pieces = _jinja(messages, template, bos_token, eos_token)
    return [(piece, is_learned) for piece, is_learned in pieces if piece]


@functools.cache
def _is_but_for_its_lines(template: str, shipped: str) -> bool:
    """Whether a template is a shipped one, whose line breaks and indentation are not rendered: many a saved processor has
    it on a single line."""

    def tokens(text: str) -> list[tuple[str, str]]:
        return [(kind, value.strip()) for _, kind, value in Environment().lex(text) if kind != "whitespace"]

    return template == shipped or tokens(template) == tokens(shipped)


def _plain(text: str) -> str:
    text = text.replace("<image>", f"<{GUARD}image>")
    return text.replace(HUMAN, f"\nHuman{GUARD}: ").replace(ASSISTANT, f"\nAI{GUARD}: ")


def _words(message: dict) -> str:
    return "".join(_plain(item["text"]) for item in message["content"])


def _chat(messages: list[dict], bos_token: str, eos_token: str) -> list[tuple[str, bool]]:
    has_system = messages[0]["role"] == "system"
    # The system line is a piece of its own: samples share it, and it is tokenized once for all of them.
    pieces = [(bos_token + (_words(messages[0]) if has_system else SYSTEM_BASE), False)]
    text = ""
    for message in messages[has_system:]:
        if message["role"] == "assistant":
            pieces += [(text + ASSISTANT, False), (_words(message) + eos_token, True)]
            text = ""
            continue
        after_image = False
        for item in message["content"]:
            if item["type"] == "image":
                text += HUMAN + "<image>"
            else:
                text += ("" if after_image and item.get("continues") else HUMAN) + _plain(item["text"])
            after_image = item["type"] == "image"
    return [*pieces, (text, False)]


def _jinja(messages: list[dict], template: str, bos_token: str, eos_token: str) -> list[tuple[str, bool]]:
    (text,), (learned,) = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        bos_token=bos_token,
        eos_token=eos_token,
    )
    pieces, position = [], 0
    for start, end in [*learned, (len(text), len(text))]:
        pieces += [(text[position:start], False), (text[start:end], True)]
        position = end
    return pieces
