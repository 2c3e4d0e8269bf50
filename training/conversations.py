# SPDX-License-Identifier: Apache-2.0
"""What a training sample looks like, and the checks that every sample passes before anything is trained on it.

A sample is `{"messages": [...], "images": [...]}` in TRL's conversational format. A caption sample of stage 1 carries
`"chat_template": "caption"` as well.
"""

import logging
import os
import re
from collections.abc import Callable
from functools import partial
from itertools import islice

from datasets import Audio, Dataset, DatasetDict, Image, Video, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from tqdm.auto import tqdm

from processing import open_image
from processing.processing_honeybee import IMAGE_TOKEN, flat_images
from training.samples import COLUMNS, BadSampleError, is_pattern, looks_local

logger = logging.getLogger(__name__)

# Decoding is the only way to find a truncated file, and it takes milliseconds an image. Beyond this many images the
# rest is checked for existence only; the collator names a broken one when it meets it.
MAX_DECODED_CHECKS = 1000
READ = {"messages", "images", "image", "system", "chat_template"}
# Columns that would be missed in training: by the names that other trainers read, and by the endings of file names.
UNREAD = {"video", "videos", "audio", "audios", "tools", "documents"}
MEDIA = re.compile(
    r"^(data:(image|video|audio)/|iVBORw0KGgo|/9j/|R0lGOD|UklGR)"  # the last four in base64: PNG, JPEG, GIF, WebP
    r"|\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|mp4|webm|mov|avi|mkv|wav|mp3|flac|ogg)(\?\S*)?$",
    re.IGNORECASE,
)
# The same of a message, where some trainers read them.
UNREAD_OF_MESSAGE = UNREAD | {"image", "images", "tool_calls", "function_call", "reasoning_content", "thinking"}
UNREAD_OF_IMAGE = {"image", "image_url", "url", "path", "base64", "bytes"}


def _images(example: dict) -> list:
    found = [example[name] for name in ("images", "image") if example.get(name) is not None]
    found = [flat_images(images) for images in found]
    if len(found) == 2 and all(found):
        raise ValueError("the sample has `images` and `image`; give its pictures under one of the two names")
    return sum(found, [])


def normalize_conversation(example: dict) -> tuple[list[dict], list]:
    """The messages with their content as lists of items, and the images in the order of the placeholders.

    Images without an `{"type": "image"}` item stand where the users' texts have as many `<image>` tags, or else, without
    any tag, in front of the first user turn, as in TRL. A last message of the user is taken for a mistake unless it says
    `"unanswered": True`; a text item with `"continues": True` shares the role marker of the image in front of it. `image` is
    another name of `images`, and `system` of a first message of that role.

    Raises:
        ValueError: no messages, a role, content item or template that cannot be rendered, a last turn that is not the
            assistant's, an empty answer (a BadSampleError), or images and placeholders that disagree.
    """
    messages = example.get("messages")
    if not messages:
        raise ValueError("the conversation is empty; give it a user and an assistant message, or leave the sample out")
    images = _images(example)
    template = example.get("chat_template") or "default"
    if template not in ("default", "caption"):
        raise ValueError(f"chat_template={template!r} is unknown; use default or caption")
    if isinstance(messages, str) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"messages={str(messages)[:80]!r} is not a list of {{role, content}}; convert the dataset")
    if example.get("system"):
        messages = [{"role": "system", "content": example["system"]}, *messages]
    normalized = [_normalized(turn, message, template) for turn, message in enumerate(messages)]

    if normalized[-1]["role"] != "assistant" and not normalized[-1].get("unanswered"):
        raise ValueError(
            f"the conversation ends with the {normalized[-1]['role']}, so it has nothing to learn at its end; "
            "the last message must be the assistant's"
        )
    if not any(message["role"] == "assistant" for message in normalized):
        raise ValueError("the conversation has no answer, so there is nothing to learn; leave the sample out")
    is_caption = template == "caption"  # an empty one still teaches to end
    for turn, message in enumerate(normalized):
        if (
            message["role"] == "assistant"
            and not is_caption
            and not "".join(item.get("text", "") for item in message["content"])
        ):
            raise BadSampleError(
                f"message {turn} is an empty answer; give it text or leave the turn out", "empty answer"
            )
    _place_images(normalized, len(images))
    return normalized, images


def _normalized(turn: int, message: dict, template: str) -> dict:
    """A message with its content as a list of items, checked."""
    role, content = message.get("role"), message.get("content")
    roles = ("user", "assistant") if template == "caption" or turn else ("system", "user", "assistant")
    if role not in roles:
        raise ValueError(f"message {turn} has the role {role!r}; here it can be {' or '.join(roles)}")
    if unread := [name for name, value in message.items() if name in UNREAD_OF_MESSAGE and value]:
        raise ValueError(
            f"message {turn} ({role}) has {', '.join(unread)}, which training does not read; pictures belong in the sample's "
            "`images`, and what is not needed has to be removed"
        )
    if message.get("weight", 1) not in (1, None):
        raise ValueError(
            f"message {turn} ({role}) has weight={message['weight']}, and all answers are learned; leave it out"
        )
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple, type(None))) or not all(isinstance(item, dict) for item in content or ()):
        raise ValueError(
            f"message {turn} ({role}) has the content {str(content)[:80]!r}; it can be a text or a list of items of "
            "type text or image"
        )
    # Arrow fills the keys that an item does not have with None.
    content = [{key: value for key, value in item.items() if value is not None} for item in content or ()]
    types = ("image", "text") if role == "user" else ("text",)
    if role == "user" and template == "caption":
        types = ("image",)
    for item in content:
        if item.get("type") not in types or (item["type"] == "text" and not isinstance(item.get("text"), str)):
            raise ValueError(
                f"message {turn} ({role}) has the content item {item}; here it can be of type {' or '.join(types)}"
            )
    unanswered = {"unanswered": True} if role == "user" and message.get("unanswered") else {}
    return {"role": role, "content": content, **unanswered}


def _place_images(messages: list[dict], count: int) -> None:
    """Gives `count` images their items where the messages have none, and checks that there are as many."""
    asked = [message for message in messages if message["role"] == "user"]
    items = [item for message in asked for item in message["content"]]
    placeholders = sum(item["type"] == "image" for item in items)
    tags = sum(item.get("text", "").count(IMAGE_TOKEN) for item in items)
    if count and not placeholders and tags not in (0, count):
        raise ValueError(
            f"the texts have {tags} {IMAGE_TOKEN} tags, but the sample has {count} images; give one tag for each image, or "
            "items of type image in their places"
        )
    others = [item for message in messages if message["role"] != "user" for item in message["content"]]
    if count and not placeholders and not tags and sum(item["text"].count(IMAGE_TOKEN) for item in others) == count:
        raise ValueError(
            f"the {IMAGE_TOKEN} tags are in messages of the system or the assistant, and only a user shows images; move them"
        )
    if count and not placeholders and tags:
        for message in asked:
            message["content"] = [part for item in message["content"] for part in _split_at_tags(item)]
    elif count and not placeholders:
        if not asked:
            raise ValueError(f"the conversation has {count} images and no user message to show them in")
        asked[0]["content"] = [{"type": "image"}] * count + asked[0]["content"]
    elif placeholders != count:
        raise ValueError(
            f"the messages have {placeholders} image placeholders, but the sample has {count} images; "
            "give one image for each placeholder"
        )
    for place, item in enumerate(item for item in items if item["type"] == "image"):
        if item.get("index", place) != place or not UNREAD_OF_IMAGE.isdisjoint(item):
            raise ValueError(
                f"the image item {str(item)[:200]} is number {place} of the sample, and images are taken from `images` in "
                "the order of their items; order them so and leave out what else the item says"
            )


def _split_at_tags(item: dict) -> list[dict]:
    first, *others = re.split(rf"\s*{IMAGE_TOKEN}\s*", item["text"])
    parts = [{**item, "text": first}]
    for text in others:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return [part for part in parts if part["type"] == "image" or part["text"]] if others else [item]


def _exists(image, root: str) -> bool:
    if isinstance(image, dict):
        if image.get("bytes") is not None:
            return True
        image = image.get("path") or ""
    if isinstance(image, str) and not image.startswith(("http://", "https://", "data:")):
        return os.path.isfile(os.path.join(root, image))
    return True


def as_messages(example: dict) -> dict:
    """The `messages` of a row with `prompt` and `completion`."""

    def turns(side, role: str) -> list[dict]:
        return [{"role": role, "content": side}] if isinstance(side, str) else list(side or ())

    return {"messages": turns(example["prompt"], "user") + turns(example["completion"], "assistant")}


def _rename(dataset: Dataset, name: str, columns: dict[str, str]) -> Dataset:
    unknown = [ours for ours in columns if ours not in COLUMNS]
    missing = [theirs for theirs in columns.values() if theirs not in dataset.column_names]
    if unknown or missing:
        raise ValueError(
            f"columns={columns!r} of dataset {name!r}: "
            + "; ".join(
                [f"{ours!r} is not one of {', '.join(COLUMNS)}" for ours in unknown]
                + [f"there is no column {theirs!r}, it has {', '.join(dataset.column_names)}" for theirs in missing]
            )
        )
    renamed = {theirs: ours for ours, theirs in columns.items() if theirs != ours}
    # A column of the dataset's own that has the new name would clash.
    clashing = [ours for ours in renamed.values() if ours in dataset.column_names and ours not in renamed]
    return dataset.remove_columns(clashing).rename_columns(renamed)


def media_in(value) -> str | None:
    """What in a value of a column is a picture, sound or film, or where one is."""
    if isinstance(value, (dict, list)):
        parts = value.values() if isinstance(value, dict) else value
        return next(filter(None, map(media_in, parts)), None)
    if isinstance(value, bytes):
        return "bytes"
    return repr(value[:80]) if isinstance(value, str) and MEDIA.search(value) else None


def unread_column(name: str, column: str, held: str) -> str:
    """What is said of a column with pictures or other data that the conversations need, and that training does not read."""
    return (
        f"dataset {name!r} has a column {column!r} with {held}, which training does not read; pictures belong in `images` (a "
        "recipe's `columns` renames), and what is not needed has to be removed from the dataset"
    )


def _check_columns(dataset: Dataset, name: str) -> None:
    """Names the columns that training does not read.

    Raises:
        ValueError: a column that training does not read holds pictures or other data that the conversations need.
    """
    ignored = []
    for column, feature in dataset.features.items():
        values = dataset.data.column(column)
        if column in READ or values.null_count == len(values):
            continue
        feature = getattr(feature, "feature", None) or feature
        held = "pictures, sound or films" if isinstance(feature, (Image, Audio, Video)) else None
        if column in UNREAD and any(value.as_py() for value in values):
            held = "data"
        elif not held:
            some = islice((value for value in values if value.is_valid), 1000)
            held = next(filter(None, (media_in(value.as_py()) for value in some)), None)
        if held:
            raise ValueError(unread_column(name, column, held))
        ignored.append(column)
    if ignored:
        logger.warning("columns of dataset %r that are not read: %s", name, ", ".join(ignored))


def load_conversations(name: str, split: str = "train", columns: dict[str, str] | None = None) -> Dataset:
    """A dataset with a `messages` column from the Hub or from disk; `prompt` and `completion` become one.

    Args:
        name: Hub name; or a folder written by `save_to_disk`; or a .json, .jsonl or .parquet file, whose relative image
            paths are taken from its folder; or a folder that `load_dataset` reads.
        columns: our name -> the dataset's, for those in `COLUMNS`.

    Raises:
        FileNotFoundError, ValueError: what is missing, with the columns that are there.
    """
    extension = os.path.splitext(name)[1].lstrip(".")
    if looks_local(name) and not os.path.exists(name):
        streamed = "; a pattern of files is for --streaming" if is_pattern(name) else ""
        raise FileNotFoundError(
            f"dataset {name!r} does not exist; give an existing file or folder, or a Hub name{streamed}"
        )
    if os.path.isfile(name):
        if extension not in ("json", "jsonl", "parquet"):
            raise ValueError(
                f"dataset {name!r} is not a .jsonl, .json or .parquet file; convert it, or stream it (--streaming)"
            )
        if os.path.getsize(name) == 0:
            raise ValueError(f"dataset {name!r} is empty; give it at least one sample")
        if split != "train":
            raise ValueError(f"dataset {name!r} is one file, which has no split {split!r}; leave --dataset_split out")
    if os.path.isfile(os.path.join(name, "dataset_dict.json")) or os.path.isfile(os.path.join(name, "state.json")):
        dataset = load_from_disk(name)
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise ValueError(f"dataset {name!r} has no split {split!r}; it has {', '.join(dataset)}")
            dataset = dataset[split]
    elif os.path.isfile(name):
        kind = {"jsonl": "json"}.get(extension, extension)
        try:
            dataset = load_dataset(kind, data_files=name, split="train")
        except (DatasetsError, ValueError) as error:  # pandas' own, where rows do not have one form
            raise ValueError(
                f"dataset {name!r} cannot be read ({error.__cause__ or error}); repair the file"
            ) from error
    else:
        dataset = load_dataset(name, split=split)
    if columns:
        dataset = _rename(dataset, name, columns)
    found = dataset.column_names
    if "messages" not in found:
        if "prompt" in found and "completion" in found:
            dataset = undecoded(dataset).map(as_messages, remove_columns=["prompt", "completion"])
        else:
            raise ValueError(
                f"dataset {name!r} has the columns {', '.join(found)}, but training reads `messages`, or `prompt` and "
                "`completion` (and `images` or `image`); rename or convert them"
            )
    _check_columns(dataset, name)
    return undecoded(dataset)


def image_root(name: str) -> str:
    """The folder of relative image paths in a dataset: that of its file, else the working folder."""
    return os.path.dirname(os.path.abspath(name)) if os.path.isfile(name) else ""


def undecoded(dataset: Dataset) -> Dataset:
    """The dataset with its `images` or `image` as paths and bytes instead of PIL images."""
    for name in {"images", "image"} & set(dataset.features):
        column = dataset.features[name]
        if isinstance(column, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(getattr(column, "feature", None), Image):
            dataset = dataset.cast_column(name, type(column)(Image(decode=False)))
    return dataset


def _with_images_opened(rows: dict[str, list], root: str) -> dict[str, list]:
    def opened(images) -> list | None:
        return None if images is None else [open_image(image, root) for image in flat_images(images)]

    return {name: list(map(opened, column)) if name in ("images", "image") else column for name, column in rows.items()}


def with_images_opened(dataset: Dataset, root: str) -> Dataset:
    """The dataset with images that are opened when a row is read, for a collator that has another `image_root`."""
    return dataset.with_transform(partial(_with_images_opened, root=root))


def check_dataset(
    dataset: Dataset,
    image_root: str = "",
    needs_images: bool = False,
    check_length: Callable[..., None] | None = None,
) -> None:
    """Reads every sample of a map-style dataset once before training, with a progress bar.

    Args:
        check_length: raises a ValueError where messages in a template leave nothing to learn in the longest row; given their
            `images` and `image_root` as well.

    Raises:
        ValueError, FileNotFoundError: the first sample that cannot be trained on, with its number and the reason; or no
            image at all where `needs_images`.
    """
    if len(dataset) == 0:
        raise ValueError("the dataset is empty; give it at least one sample")
    dataset = undecoded(dataset)  # existence and structure cost no image decoding
    num_images = 0
    for index, example in enumerate(tqdm(dataset, desc="Checking samples", disable=len(dataset) < 5000)):
        try:
            messages, images = normalize_conversation(example)
            if check_length is not None:
                template = example.get("chat_template") or "default"
                check_length(messages, template, images=images, image_root=image_root)
            for image in images:
                num_images += 1
                if num_images <= MAX_DECODED_CHECKS or not _exists(image, image_root):
                    open_image(image, image_root)  # says what is wrong
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"sample {index}: {error}") from error
    if needs_images and num_images == 0:
        raise ValueError(
            f"none of the {len(dataset)} samples has an image, and alignment trains the projector alone, which reads "
            "nothing else; give a dataset with an `images` column, or use --stage instruct"
        )
