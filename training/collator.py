# SPDX-License-Identifier: Apache-2.0
"""Conversations in, a batch with supervised answers out: a row each, padded, or all in one row, packed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from processing import HoneybeeProcessor, open_image
from processing.pixels import Pixels
from processing.rendering import render
from training.conversations import normalize_conversation
from training.samples import BadSampleError


@dataclass
class HoneybeeDataCollator:
    """Renders, tokenizes and pads or packs samples; only the assistant's words and their eos are supervised.

    Args:
        processor: a [`HoneybeeProcessor`]; it alone knows how many tokens an image is.
        max_length: rows are cut to this many tokens from the end; None keeps them whole.
        image_root: folder of relative image paths.
        pack: all samples of the batch in one row, without padding.

    Called with samples `{"messages", "images"[, "chat_template"][, "num_query_tokens"]}` it returns `input_ids`,
    `attention_mask`, `labels` (rows, tokens), padded on the right, labels -100 where nothing is learned; and `pixel_values`
    (images, 3, S, S), in the order of the placeholders, where the batch has images. A sample's `num_query_tokens` is the M
    of all its images; where one has it, `num_query_tokens` (images,) int64 is returned with the pixels.

    Packed, `input_ids`, `labels` and `position_ids` are (1, tokens of the batch), and positions start at 0 in each
    sample. That alone keeps samples apart in transformers' masks where there is no `attention_mask`; `cu_seq_lens_q`,
    `cu_seq_lens_k`, `max_length_q` and `max_length_k` say the same to flash attention. The batch stays the same
    samples, and so do its loss and gradient.

    Raises:
        ValueError: a sample that cannot be trained on, or one whose images do not fit into `max_length` (a BadSampleError).
    """

    processor: HoneybeeProcessor
    max_length: int | None = None
    image_root: str = ""
    pack: bool = False

    def __post_init__(self):
        self._pixels = Pixels(self.processor.image_processor)

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        conversations, images, numbers = [], [], []
        for example in examples:
            messages, sources = normalize_conversation(example)
            conversations.append((messages, example.get("chat_template") or "default"))
            images += [open_image(source, self.image_root) for source in sources]
            numbers += [example.get("num_query_tokens")] * len(sources)
        rows = self.tokenize(conversations, [example.get("num_query_tokens") for example in examples])

        batch = self._packed(rows) if self.pack else self._padded(rows)
        if images:
            batch["pixel_values"] = self._pixels(images)
        if any(number is not None for number in numbers):
            default = self.processor.num_query_tokens
            batch["num_query_tokens"] = torch.tensor([default if number is None else number for number in numbers])
        return batch

    def _padded(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.processor.tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], -100),
        }

    def _packed(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor | int]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # (samples + 1,), 0 in front
        longest = int(lengths.max())
        return {
            "input_ids": torch.tensor([sum((row["input_ids"] for row in rows), [])]),
            "labels": torch.tensor([sum((row["labels"] for row in rows), [])]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def tokenize(
        self, conversations: list[tuple[list[dict], str]], num_query_tokens: Sequence[int | None] | None = None
    ) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` of (messages, template name) pairs, placeholders expanded, cut, not padded.

        Args:
            num_query_tokens: (pairs,), M of the images of each; None for the processor's.
        """
        features = self._tokenize_whole(conversations, num_query_tokens)
        for feature in features:
            self._truncate(feature)
        return features

    def lengths(self, examples: list[dict]) -> list[int]:
        """Tokens of each sample in a batch, without reading its images."""
        conversations = [(normalize_conversation(e)[0], e.get("chat_template") or "default") for e in examples]
        numbers = [example.get("num_query_tokens") for example in examples]
        whole = [len(feature["input_ids"]) for feature in self._tokenize_whole(conversations, numbers)]
        return [length if self.max_length is None else min(length, self.max_length) for length in whole]

    def _tokenize_whole(
        self, conversations: list[tuple[list[dict], str]], num_query_tokens: Sequence[int | None] | None
    ) -> list[dict[str, list[int]]]:
        numbers = num_query_tokens or [None] * len(conversations)
        pieces = [
            (row, piece, is_answer)
            for row, (messages, template) in enumerate(conversations)
            for piece, is_answer in self._render(messages, template)
        ]
        # An answer starts where a role marker or a placeholder ends, and there the tokenizer starts a new piece anyway:
        # tokenized apart, the pieces of a row give the ids of the whole row. (Character offsets would not tell whose
        # the "▁" in front of a piece is.)
        texts = list(dict.fromkeys(piece for _, piece, _ in pieces))
        ids = self.processor.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        ids = dict(zip(texts, ids))
        features = [{"input_ids": [], "labels": []} for _ in conversations]
        for row, piece, is_answer in pieces:
            expanded = self._expanded(ids[piece], numbers[row])
            features[row]["input_ids"] += expanded
            features[row]["labels"] += expanded if is_answer else [-100] * len(expanded)
        for feature in features:
            # transformers 4 counts the first label in the loss's denominator although nothing predicts it; and in a
            # packed row the end of another sample stands before it.
            feature["labels"][0] = -100
        return features

    def check_length(self, messages: list[dict], template: str, num_query_tokens: int | None = None) -> None:
        """Refuses a sample that would not be worth collating with so many visual tokens an image.

        Raises:
            BadSampleError: its images, or the beginning of its first answer, do not fit into `max_length`.
        """
        if self.max_length is None:
            return
        # A token is at least a byte, and a piece costs its marker and a blank: for most samples that is all one has to know.
        size, needed, answered = 128, 0, False
        for message in messages:
            for item in message["content"]:
                size += 16
                if item["type"] == "image":
                    needed = size = size + self._count_image_tokens(num_query_tokens)
                elif message["role"] == "assistant" and not answered:
                    needed, answered = size + 1, True
                size += len(item.get("text", "").encode())
        if needed <= self.max_length:
            return
        (row,) = self.tokenize([(messages, template)], [num_query_tokens])
        if all(label == -100 for label in row["labels"]):
            raise BadSampleError(
                f"the sample's question fills max_length={self.max_length}, so nothing of the answer is left to learn; "
                "raise max_length or shorten the question",
                "too long",
            )

    def _count_image_tokens(self, num_query_tokens: int | None) -> int:
        if num_query_tokens is None:
            return self.processor.num_image_tokens
        return num_query_tokens + self.processor.num_eos_tokens

    def _expanded(self, ids: list[int], num_query_tokens: int | None) -> list[int]:
        image = self.processor.image_token_id
        if image not in ids:
            return ids
        # By hand: to tokenize hundreds of placeholders costs more than all the words around them.
        placeholders = [image] * self._count_image_tokens(num_query_tokens)
        return [i for token in ids for i in (placeholders if token == image else (token,))]

    def _render(self, messages: list[dict], template: str) -> list[tuple[str, bool]]:
        templates, tokenizer = self.processor.chat_templates, self.processor.tokenizer
        if template not in templates:
            raise ValueError(f"chat_template={template!r} is not one of the processor's: {', '.join(templates)}")
        return render(messages, templates[template], tokenizer.bos_token or "", tokenizer.eos_token or "")

    def _truncate(self, feature: dict[str, list[int]]):
        length = len(feature["input_ids"])
        if self.max_length is None or length <= self.max_length:
            return
        if self.processor.image_token_id in feature["input_ids"][self.max_length :]:
            raise BadSampleError(
                f"the sample has {length} tokens and max_length={self.max_length} would cut an image; "
                f"raise max_length to {length} or more, or give the sample fewer images",
                "too long",
            )
        for name in feature:
            feature[name] = feature[name][: self.max_length]


def padded(rows: list[list[int]], padding: int) -> torch.Tensor:
    """(rows, tokens), int64, padded on the right."""
    table = np.full((len(rows), max(map(len, rows))), padding, dtype=np.int64)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return torch.from_numpy(table)
