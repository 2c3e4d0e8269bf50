# SPDX-License-Identifier: Apache-2.0
"""What a training sample looks like, and the checks that every sample passes before anything is trained on it.

A sample is `{"messages": [...], "images": [...]}` in TRL's conversational format. A caption sample of stage 1 carries
`"chat_template": "caption"` as well.
"""

import os

from datasets import Dataset, DatasetDict, Image, IterableDataset, load_dataset, load_from_disk
from tqdm.auto import tqdm

# Decoding is the only way to find a truncated file, and it takes milliseconds an image. Beyond this many images the
# rest is checked for existence only; the collator names a broken one when it meets it.
MAX_DECODED_CHECKS = 1000


class EmptyAnswerError(ValueError):
    """An assistant turn without text."""


def normalize_conversation(example: dict) -> tuple[list[dict], list]:
    """The messages with their content as lists of items, and the images in the order of the placeholders.

    Images without an `{"type": "image"}` item go in front of the first user turn, as in TRL.

    Raises:
        ValueError: no messages, a last turn that is not the assistant's, an empty answer (an EmptyAnswerError), or
            images and placeholders that disagree.
    """
    messages = example.get("messages")
    if not messages:
        raise ValueError("the conversation is empty; give it a user and an assistant message, or leave the sample out")
    images = example.get("images")
    images = list(images) if images is not None else []

    normalized = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        # Arrow fills the keys that an item does not have with None.
        content = [{key: value for key, value in item.items() if value is not None} for item in content or ()]
        normalized.append({"role": message["role"], "content": content})

    if normalized[-1]["role"] != "assistant":
        raise ValueError(
            f"the conversation ends with the {normalized[-1]['role']}, so it has nothing to learn at its end; "
            "the last message must be the assistant's"
        )
    is_caption = example.get("chat_template") == "caption"  # an empty one still teaches to end
    for turn, message in enumerate(normalized):
        if (
            message["role"] == "assistant"
            and not is_caption
            and not "".join(item.get("text", "") for item in message["content"])
        ):
            raise EmptyAnswerError(f"message {turn} is an empty answer; give it text or leave the turn out")

    placeholders = sum(item["type"] == "image" for message in normalized for item in message["content"])
    if images and not placeholders:
        first_user = next((m for m in normalized if m["role"] == "user"), None)
        if first_user is None:
            raise ValueError(f"the conversation has {len(images)} images and no user message to show them in")
        first_user["content"] = [{"type": "image"}] * len(images) + first_user["content"]
        placeholders = len(images)
    if placeholders != len(images):
        raise ValueError(
            f"the messages have {placeholders} image placeholders, but the sample has {len(images)} images; "
            "give one image for each placeholder"
        )
    return normalized, images


def open_image(image, root: str = ""):
    """An image of a sample as PIL: a PIL image, a path (relative ones under `root`), or `datasets`' undecoded dict.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    if isinstance(image, str):
        image = {"path": os.path.join(root, image), "bytes": None}
    if isinstance(image, dict):
        path = image.get("path") or "in memory"
        if image.get("bytes") is None and not os.path.isfile(path):
            raise FileNotFoundError(f"image file {path!r} does not exist; correct the path or leave the sample out")
        try:
            image = Image().decode_example(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"image {path!r} cannot be read ({error}); replace the file or leave the sample out"
            ) from error
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        path = getattr(image, "filename", "") or "in memory"
        raise ValueError(
            f"image {path!r} cannot be read ({error}); replace the file or leave the sample out"
        ) from error
    return image


def _exists(image, root: str) -> bool:
    if isinstance(image, dict):
        if image.get("bytes") is not None:
            return True
        image = image.get("path") or ""
    return not isinstance(image, str) or os.path.isfile(os.path.join(root, image))


def load_conversations(name: str, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """A dataset with a `messages` column from the Hub or from disk.

    Args:
        name: Hub name; or a folder written by `save_to_disk`; or a .json, .jsonl or .parquet file, whose relative image
            paths are taken from its folder; or a folder that `load_dataset` reads.

    Raises:
        FileNotFoundError, ValueError: what is missing, with the columns that are there.
    """
    extension = os.path.splitext(name)[1].lstrip(".")
    looks_local = os.path.isabs(name) or name.startswith(".") or extension in ("json", "jsonl", "parquet")
    if looks_local and not os.path.exists(name):
        raise FileNotFoundError(f"dataset {name!r} does not exist; give an existing file or folder, or a Hub name")
    if os.path.isfile(os.path.join(name, "dataset_dict.json")) or os.path.isfile(os.path.join(name, "state.json")):
        dataset = load_from_disk(name)
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise ValueError(f"dataset {name!r} has no split {split!r}; it has {', '.join(dataset)}")
            dataset = dataset[split]
    elif os.path.isfile(name):
        kind = {"jsonl": "json"}.get(extension, extension)
        dataset = load_dataset(kind, data_files=name, split="train", streaming=streaming)
    else:
        dataset = load_dataset(name, split=split, streaming=streaming)
    columns = dataset.column_names
    if columns is not None and "messages" not in columns:
        raise ValueError(
            f"dataset {name!r} has the columns {', '.join(columns)}, but training reads `messages` (and `images`); "
            "rename or convert them"
        )
    return dataset


def check_dataset(dataset: Dataset, image_root: str = "", needs_images: bool = False):
    """Reads every sample of a map-style dataset once before training, with a progress bar.

    Raises:
        ValueError, FileNotFoundError: the first sample that cannot be trained on, with its number and the reason; or no
            image at all where `needs_images`.
    """
    if len(dataset) == 0:
        raise ValueError("the dataset is empty; give it at least one sample")
    # Undecoded: existence and structure cost no image decoding.
    column = dataset.features.get("images") or None
    if column is not None and isinstance(getattr(column, "feature", None), Image):
        dataset = dataset.cast_column("images", type(column)(Image(decode=False)))
    num_images = 0
    for index, example in enumerate(tqdm(dataset, desc="Checking samples", disable=len(dataset) < 5000)):
        try:
            _, images = normalize_conversation(example)
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
