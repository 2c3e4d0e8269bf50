# SPDX-License-Identifier: Apache-2.0
"""What a benchmark question says to the model: the official wording, as chat messages."""

import string
from collections.abc import Callable
from dataclasses import dataclass, field

DETAIL = " The assistant gives helpful, detailed, and polite answers to the user's questions."  # behind the system line
INSTRUCTIONS = {
    "short": "Answer the question using a single word or phrase. ",
    "choice": "Answer with the option's letter from the given choices directly. ",
    "free": "",
    "own": "",  # after the same system line as the others, where the text brings an instruction of its own
}
TEMPLATES = ("task", "none")
LETTERS = string.ascii_uppercase  # of the options


@dataclass
class Question:
    """One question of a benchmark.

    Attributes:
        id: unique within the task.
        kind: the instruction in front of it, a key of `INSTRUCTIONS`.
        text: what is asked, with the options where there are any.
        fields: what goes into the prediction file beside `id`, `pred`, `prompt`: the answer and what the scorer reads.
        image: a path, a function that decodes the image when it is needed, or None.
    """

    id: str
    kind: str
    text: str
    fields: dict = field(default_factory=dict)
    image: str | Callable | None = None

    def answered(self, pred: str, prompt: str) -> dict:
        """The record of an answer, as scorers read it."""
        return {"id": self.id, "pred": pred, "prompt": prompt, **self.fields}


def with_options(question: str, options: dict[str, str], context: str | None = None) -> str:
    """The question, its context where the benchmark has one, and one option a line."""
    context = "" if context is None else f"\nContext: {context}"
    return f"{question}{context}\nThere are several options:\n" + "".join(f"{k}. {v}\n" for k, v in options.items())


def as_messages(question: Question, template: str = "task") -> list[dict]:
    """Chat messages of a question; template `none` leaves the instruction out."""
    from processing.processing_honeybee import SYSTEM_BASE  # loads for seconds, and saved answers are scored without it

    free = question.kind == "free" or template == "none"
    text = question.text if free else INSTRUCTIONS[question.kind] + question.text
    content = [{"type": "image"}] if question.image is not None else []
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_BASE + DETAIL if free else SYSTEM_BASE}]},
        {"role": "user", "content": [*content, {"type": "text", "text": text}]},
    ]


def render(question: Question, processor, template: str = "task") -> str:
    """The prompt as the model's tokenizer gets it, bos included."""
    return processor.apply_chat_template(as_messages(question, template), add_generation_prompt=True, tokenize=False)


def plain(prompt: str, processor) -> str:
    """The prompt as people read it: without bos and without the guard inside typed markers."""
    from processing.processing_honeybee import GUARD

    return prompt.removeprefix(processor.tokenizer.bos_token or "").replace(GUARD, "")
