# SPDX-License-Identifier: Apache-2.0
"""What scripts read of a saved model's folder without loading it."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from .configuration_honeybee import HoneybeeConfig

# What may lie beside a model, and says where it comes from: the settings of its training run, the state of its trainer
# (which writes it last), and the official checkpoint that it was converted from.
RUN_FILE, STATE_FILE, CONVERSION_FILE = "honeybee_run.json", "trainer_state.json", "honeybee_conversion.json"
# With huggingface_hub 1 the base class of its HTTP library's errors, those of a broken connection among them. Version 0
# has requests, where this is narrower, but whose errors are all OSErrors: catch that as well.
NetworkError = HfHubHTTPError.__mro__[1]


def read_json(path: Path, error_class: type[ValueError] = ValueError, remedy: str = "save the model again") -> dict:
    """The mapping in a JSON file.

    Raises:
        error_class: there is none, with the remedy.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise error_class(f"{path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise error_class(f"{path} holds a {type(content).__name__} and no mapping; {remedy}")
    return content


def read_model_config(
    folder: Path,
    name: str,
    remedy: str = "an official checkpoint is converted first: README, Use an official checkpoint",
    error_class: type[ValueError] = ValueError,
) -> dict:
    """What config.json of a saved Honeybee holds.

    Args:
        name: of the folder, in the errors.
        remedy: for a folder with another kind of model.

    Raises:
        error_class: the folder holds no whole model, or one of another kind.
    """
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise error_class(
            f"{name} is a LoRA adapter and not a whole model; an adapter is merged first (--merge: README, Train your own)"
        )
    if not path.is_file():
        raise error_class(f"{name} has no config.json; give a folder that save_pretrained or training/sft.py wrote")
    config = read_json(path, error_class)
    kind = config.get("model_type")
    if kind != HoneybeeConfig.model_type:
        raise error_class(
            f"{name} is of type {kind!r}, not {HoneybeeConfig.model_type!r}; give a saved Honeybee ({remedy}). Its "
            f"config.json has model_type={kind!r}"
        )
    return config


def model_folder(name: str) -> Path:
    """What a script was given as `--model`: a local folder as it is, or the snapshot of a Hub name.

    Raises:
        ValueError: it is not there, or holds no Honeybee.
    """
    folder = Path(name)
    if not folder.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ValueError(f"--model {name} does not exist; give a folder with a saved Honeybee, or a Hub name")
        try:
            folder = Path(snapshot_download(name))
        except (OSError, ValueError, NetworkError) as error:
            raise ValueError(f"--model {name} is no folder, and cannot be downloaded as a Hub name: {error}") from error
    read_model_config(folder, f"--model {name}")
    return folder
