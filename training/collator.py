# SPDX-License-Identifier: Apache-2.0
"""Conversations in, a batch with supervised answers out: a row each, padded, or all in one row, packed."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.chat_template_utils import render_jinja_template

from processing import HoneybeeProcessor

from .conversations import normalize_conversation, open_image


@dataclass
class HoneybeeDataCollator:
    """Renders, tokenizes and pads or packs samples; only the assistant's words and their eos are supervised.

    Args:
        processor: a [`HoneybeeProcessor`]; it alone knows how many tokens an image is.
        max_length: rows are cut to this many tokens from the end; None keeps them whole.
        image_root: folder of relative image paths.
        pack: all samples of the batch in one row, without padding.

    Called with samples `{"messages", "images"[, "chat_template"]}` it returns `input_ids`, `attention_mask`, `labels`
    (rows, tokens), padded on the right, labels -100 where nothing is learned; and `pixel_values` (images, 3, S, S), in
    the order of the placeholders, where the batch has images.

    Packed, `input_ids`, `labels` and `position_ids` are (1, tokens of the batch), and positions start at 0 in each
    sample. That alone keeps samples apart in transformers' masks where there is no `attention_mask`; `cu_seq_lens_q`,
    `cu_seq_lens_k`, `max_length_q` and `max_length_k` say the same to flash attention. The batch stays the same
    samples, and so do its loss and gradient.

    Raises:
        ValueError: a sample that cannot be trained on, or one whose images do not fit into `max_length`.
    """

    processor: HoneybeeProcessor
    max_length: int | None = None
    image_root: str = ""
    pack: bool = False

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        conversations, images = [], []
        for example in examples:
            messages, sources = normalize_conversation(example)
            conversations.append((messages, example.get("chat_template") or "default"))
            images += [open_image(source, self.image_root) for source in sources]
        rows = self.tokenize(conversations)

        batch = self._packed(rows) if self.pack else self._padded(rows)
        if images:
            batch["pixel_values"] = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return batch

    def _padded(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        def padded(values, padding):
            return pad_sequence([torch.tensor(v) for v in values], batch_first=True, padding_value=padding)

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

    def tokenize(self, conversations: list[tuple[list[dict], str]]) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` of (messages, template name) pairs, placeholders expanded, cut, not padded."""
        features = self._tokenize_whole(conversations)
        for row, feature in enumerate(features):
            self._truncate(row, feature)
        return features

    def lengths(self, examples: list[dict]) -> list[int]:
        """Tokens of each sample in a batch, without reading its images."""
        conversations = [(normalize_conversation(e)[0], e.get("chat_template") or "default") for e in examples]
        whole = [len(feature["input_ids"]) for feature in self._tokenize_whole(conversations)]
        return [length if self.max_length is None else min(length, self.max_length) for length in whole]

    def _tokenize_whole(self, conversations: list[tuple[list[dict], str]]) -> list[dict[str, list[int]]]:
        pieces, learned, rows = [], [], []
        for row, (messages, template) in enumerate(conversations):
            for piece, is_answer in self._render(messages, template):
                pieces.append(piece)
                learned.append(is_answer)
                rows.append(row)

        # An answer starts where a role marker or a placeholder ends, and there the tokenizer starts a new piece anyway:
        # tokenized apart, the pieces of a row give the ids of the whole row. (Character offsets would not tell whose
        # the "▁" in front of a piece is.)
        ids = self.processor.tokenizer(pieces, add_special_tokens=False)["input_ids"]
        features = [{"input_ids": [], "labels": []} for _ in conversations]
        for row, piece_ids, is_answer in zip(rows, ids, learned):
            features[row]["input_ids"] += piece_ids
            features[row]["labels"] += piece_ids if is_answer else [-100] * len(piece_ids)
        for feature in features:
            # transformers 4 counts the first label in the loss's denominator although nothing predicts it; and in a
            # packed row the end of another sample stands before it.
            feature["labels"][0] = -100
        return features

    def _render(self, messages: list[dict], template: str) -> list[tuple[str, bool]]:
        """The text of a conversation, placeholders expanded, cut where an answer starts or ends."""
        templates = self.processor.chat_template
        if template not in templates:
            raise ValueError(f"chat_template={template!r} is not one of the processor's: {', '.join(templates)}")
        (text,), (answers,) = render_jinja_template(
            conversations=[messages],
            chat_template=templates[template],
            return_assistant_tokens_mask=True,
            **self.processor.tokenizer.special_tokens_map,
        )
        image_token, expanded = self.processor.image_token, self.processor.replace_image_token()
        pieces, position = [], 0
        for start, end in [*answers, (len(text), len(text))]:
            pieces += [(text[position:start].replace(image_token, expanded), False), (text[start:end], True)]
            position = end
        return [(piece, is_answer) for piece, is_answer in pieces if piece]

    def _truncate(self, row: int, feature: dict[str, list[int]]):
        length = len(feature["input_ids"])
        if self.max_length is None or length <= self.max_length:
            return
        if self.processor.image_token_id in feature["input_ids"][self.max_length :]:
            raise ValueError(
                f"sample {row} of the batch has {length} tokens and max_length={self.max_length} would cut an image; "
                f"raise max_length to {length} or more, or give the sample fewer images"
            )
        for name in feature:
            feature[name] = feature[name][: self.max_length]
