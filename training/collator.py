# SPDX-License-Identifier: Apache-2.0
"""Conversations in, a batch with supervised answers out: a row each, padded, or all in one row, packed."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from processing import HoneybeeProcessor, open_image
from processing.crops_honeybee import WHOLE, Cut
from processing.image_size import image_size
from processing.pixels import Pixels
from processing.rendering import render
from training.conversations import normalize_conversation
from training.samples import BadSampleError

# Settings of the processor that say how pictures are cut.
CROPS = ("max_crops", "min_crops", "overview", "overview_num_query_tokens", "max_images_cut")


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
    (squares, 3, S, S), in the order of the placeholders, where the batch has images: a square an image, or several where the
    processor cuts pictures; then `num_crops` (images,) int64 says how many. A sample's `num_query_tokens` is the M of all its
    images, or of their crops; where a sample has it, or an overview another M than the model's default, `num_query_tokens`
    (squares,) int64 is returned with the pixels.

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

    @property
    def cuts_images(self) -> bool:
        """Whether images may be cut, so that their sizes decide how many tokens they are."""
        return self.processor.max_crops > 1

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        conversations, images, sizes = [], [], []
        for example in examples:
            messages, sources = normalize_conversation(example)
            conversations.append((messages, example.get("chat_template") or "default"))
            opened = [open_image(source, self.image_root) for source in sources]
            sizes.append([image.size for image in opened])
            images += opened
        numbers = [example.get("num_query_tokens") for example in examples]
        rows = self.tokenize(conversations, numbers, sizes)

        batch = self._packed(rows) if self.pack else self._padded(rows)
        if images:
            plan = [image for number, row in zip(numbers, sizes) for image in self._plan(number, row)]
            batch["pixel_values"] = self._pixels(images, [cut for _, cut in plan])
            if self.cuts_images:
                batch["num_crops"] = torch.tensor([cut.num_crops for _, cut in plan])
            squares = [number for image in plan for number in self.processor.square_query_tokens(*image)]
            asked = any(number is not None and row for number, row in zip(numbers, sizes))
            if asked or any(number != self.processor.num_query_tokens for number in squares):
                batch["num_query_tokens"] = torch.tensor(squares)
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
        self,
        conversations: list[tuple[list[dict], str]],
        num_query_tokens: Sequence[int | None] | None = None,
        sizes: Sequence[list[tuple[int, int]] | None] | None = None,
    ) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` of (messages, template name) pairs, placeholders expanded, cut, not padded.

        Args:
            num_query_tokens: (pairs,), M of the images of each; None for the processor's.
            sizes: (pairs,), width and height of the images of each; not read where no image is cut.
        """
        features = self._tokenize_whole(conversations, num_query_tokens, sizes)
        for feature in features:
            self._truncate(feature)
        return features

    def lengths(self, examples: list[dict]) -> list[int]:
        """Tokens of each sample in a batch. Its images are not decoded; where they may be cut, the heads of their files are
        read, unless the sample has their [`image_sizes`]."""
        conversations, sizes = [], []
        for example in examples:
            messages, images = normalize_conversation(example)
            conversations.append((messages, example.get("chat_template") or "default"))
            known = example.get("image_sizes")
            sizes.append(self.image_sizes(images) if known is None else known)
        numbers = [example.get("num_query_tokens") for example in examples]
        whole = [len(feature["input_ids"]) for feature in self._tokenize_whole(conversations, numbers, sizes)]
        return [length if self.max_length is None else min(length, self.max_length) for length in whole]

    def image_sizes(self, images: Sequence, root: str | None = None) -> list[tuple[int, int]] | None:
        """Width and height of images as samples have them; None where no image is cut, and no file is read.

        Args:
            root: folder of relative paths, where it is not `image_root`.

        Raises:
            FileNotFoundError, BadSampleError: an image that is not there or cannot be read.
        """
        if not self.cuts_images:
            return None
        root = self.image_root if root is None else root
        try:
            return [image_size(image, root) for image in images]
        except ValueError as error:
            raise BadSampleError(str(error), "corrupt image") from error.__cause__

    def most_tokens(self, num_query_tokens: int | None = None) -> int:
        """Placeholders of an image that is cut as far as it can be."""
        number = self.processor.num_query_tokens if num_query_tokens is None else num_query_tokens
        return self.processor.count_image_tokens(number, most_crops(self.processor))

    def _plan(self, num_query_tokens: int | None, sizes: list[tuple[int, int]]) -> list[tuple[int, Cut]]:
        """M of each image of a sample, and how it is cut."""
        number = self.processor.num_query_tokens if num_query_tokens is None else num_query_tokens
        return [(number, cut) for cut in self.processor.plan_cuts(sizes)]

    def _tokens_of_images(self, num_query_tokens: int | None, sizes: list[tuple[int, int]] | None) -> Iterator[int]:
        """Placeholders of each image of a sample."""
        if not self.cuts_images:
            return itertools.repeat(self.most_tokens(num_query_tokens))
        if sizes is None:
            raise ValueError(
                f"max_crops={self.processor.max_crops}: images are cut by their sizes; give the `sizes` of each conversation"
            )
        return iter([self.processor.count_image_tokens(*image) for image in self._plan(num_query_tokens, sizes)])

    def _tokenize_whole(
        self,
        conversations: list[tuple[list[dict], str]],
        num_query_tokens: Sequence[int | None] | None,
        sizes: Sequence[list[tuple[int, int]] | None] | None,
    ) -> list[dict[str, list[int]]]:
        none = [None] * len(conversations)
        tokens = list(map(self._tokens_of_images, num_query_tokens or none, sizes or none))
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
            expanded = self._expanded(ids[piece], tokens[row])
            features[row]["input_ids"] += expanded
            features[row]["labels"] += expanded if is_answer else [-100] * len(expanded)
        for feature in features:
            # transformers 4 counts the first label in the loss's denominator although nothing predicts it; and in a
            # packed row the end of another sample stands before it.
            feature["labels"][0] = -100
        return features

    def check_length(
        self,
        messages: list[dict],
        template: str,
        num_query_tokens: int | None = None,
        images: Sequence = (),
        image_root: str | None = None,
    ) -> None:
        """Refuses a sample that would not be worth collating with so many visual tokens an image.

        Args:
            images, image_root: as [`image_sizes`] takes them. Their sizes are read where they decide.

        Raises:
            BadSampleError: its images, or the beginning of its first answer, do not fit into `max_length`.
            FileNotFoundError, BadSampleError: as [`image_sizes`].
        """
        if self.max_length is None:
            return
        if _surely_needed(messages, self.most_tokens(num_query_tokens)) <= self.max_length:
            return
        sizes = self.image_sizes(images, image_root)
        (row,) = self.tokenize([(messages, template)], [num_query_tokens], [sizes])
        if all(label == -100 for label in row["labels"]):
            raise BadSampleError(
                f"the sample's question fills max_length={self.max_length}, so nothing of the answer is left to learn; "
                "raise max_length or shorten the question",
                "too long",
            )

    def _expanded(self, ids: list[int], tokens_of_images: Iterator[int]) -> list[int]:
        image = self.processor.image_token_id
        if image not in ids:
            return ids
        # By hand: to tokenize hundreds of placeholders costs more than all the words around them.
        expanded, start = [], 0
        for _ in range(ids.count(image)):
            place = ids.index(image, start)
            expanded += ids[start:place] + [image] * next(tokens_of_images)
            start = place + 1
        return expanded + ids[start:]

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
            remedy = ", or lower max_crops" if self.cuts_images else ""
            raise BadSampleError(
                f"the sample has {length} tokens and max_length={self.max_length} would cut an image; "
                f"raise max_length to {length} or more, or give the sample fewer images{remedy}",
                "too long",
            )
        for name in feature:
            feature[name] = feature[name][: self.max_length]


def crops_of(processor: HoneybeeProcessor, asked) -> dict:
    """The settings of crops of a processor, with those of `asked` that are given (attributes that are there and not None). A
    maximum below the processor's minimum lowers that; a minimum that is asked for itself stays."""
    given = {name: getattr(asked, name, None) for name in CROPS}
    crops = {name: getattr(processor, name) if value is None else value for name, value in given.items()}
    if given["min_crops"] is None:
        crops["min_crops"] = min(crops["min_crops"], crops["max_crops"])
    return crops


def most_crops(processor: HoneybeeProcessor) -> Cut:
    """How an image is cut that becomes as many squares as any."""
    crops = processor.max_crops
    return Cut(1, crops, processor.overview) if crops > 1 else WHOLE


def _surely_needed(messages: list[dict], image_tokens: int) -> int:
    """Tokens within which all images and the beginning of the first answer stand, whatever the tokenizer does."""
    # A token is at least a byte, and a piece costs its marker and a blank: for most samples that is all one has to know.
    size, needed, answered = 128, 0, False
    for message in messages:
        for item in message["content"]:
            size += 16
            if item["type"] == "image":
                needed = size = size + image_tokens
            elif message["role"] == "assistant" and not answered:
                needed, answered = size + 1, True
            size += len(item.get("text", "").encode())
    return needed


def padded(rows: list[list[int]], padding: int) -> torch.Tensor:
    """(rows, tokens), int64, padded on the right."""
    table = np.full((len(rows), max(map(len, rows))), padding, dtype=np.int64)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return torch.from_numpy(table)
