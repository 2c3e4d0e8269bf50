# SPDX-License-Identifier: Apache-2.0
"""Reference data of the official code: all of it beside the checkout where present, else the part in tests/data."""

import json
import re
from pathlib import Path

from tests.tiny import REPOSITORY

FULL = REPOSITORY.parent / "shared" / "golden"
GOLDEN = FULL if FULL.is_dir() else REPOSITORY / "tests" / "data" / "golden"
TOKENIZER = GOLDEN / "tokenizer"


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (TOKENIZER / name).read_text(encoding="utf-8").splitlines()]


def checkpoints() -> list[tuple[Path, Path]]:
    """(checkpoint, reference) of every official checkpoint; the old format has the reference of its twin."""
    found = [(path.parent, path.parent) for path in sorted(GOLDEN.glob("models/*/io.safetensors"))]
    legacy = GOLDEN / "models" / "c-abs-legacy-format"
    return found + ([(legacy, GOLDEN / "models" / "c-abs")] if legacy.is_dir() else [])


def as_chat(prompt: str) -> dict | None:
    """An official prompt as a sample: `messages`, number of `images`, `chat_template`; None where it has no chat form."""
    if prompt.startswith("[NO_PROMPT] <image> "):
        caption = prompt.replace("[NO_PROMPT] <image> ", "")
        messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": caption}]
        return {"messages": messages, "images": 1, "chat_template": "caption"}
    system, *parts = re.split(r"(\nHuman: |\nAI: )", prompt)
    if "<image>" in system or not parts:
        return None
    messages, images = [{"role": "system", "content": system}], 0
    for marker, text in zip(parts[::2], parts[1::2]):
        if marker == "\nAI: ":
            if "<image>" in text:
                return None
            messages.append({"role": "assistant", "content": text})
            continue
        if "<image>" in text and text != "<image>":
            return None
        images += text == "<image>"
        item = {"type": "image"} if text == "<image>" else {"type": "text", "text": text}
        if messages[-1]["role"] == "user":
            messages[-1]["content"].append(item)
        else:
            messages.append({"role": "user", "content": [item]})
    return {"messages": messages, "images": images, "chat_template": "default"}
