# SPDX-License-Identifier: Apache-2.0
"""Generation settings of a Honeybee: it answers greedily, and what it holds can be saved.

Travels with every checkpoint: torch and transformers are the only imports.
"""

import json

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

# The settings that a new model takes over from its language model.
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")
# Settings without which transformers refuses others.
MODES = ("do_sample", "num_beams", "return_dict_in_generate")
METADATA = ("transformers_version", "_from_model_config")


def savable_generation_config(settings: dict) -> tuple[GenerationConfig, dict]:
    """A generation config of those `settings` that can be saved, and the other settings. Loading only warns of some for
    which saving raises, such as a temperature without `do_sample`."""
    kept, refused = {}, {}
    for name in sorted(settings, key=lambda name: name not in MODES):
        try:
            GenerationConfig(**kept, **{name: settings[name]}).validate(strict=True)
            kept[name] = settings[name]
        except (AttributeError, TypeError, ValueError):
            refused[name] = settings[name]
    return GenerationConfig(**kept), refused


def greedy_generation_config(settings: dict, image_token_id: int) -> GenerationConfig:
    """A generation config of nothing but the special tokens among `settings`. It suppresses the placeholder, too, which
    stands for an image that was given and is nothing to answer with."""
    tokens = {name: settings[name] for name in SPECIAL_TOKENS if settings.get(name) is not None}
    tokens["suppress_tokens"] = sorted({*tokens.get("suppress_tokens", ()), image_token_id})
    return savable_generation_config(tokens)[0]


def read_generation_settings(name: str) -> dict:
    """What the generation_config.json of a model (a Hub name or a folder) holds, valid or not; nothing where there is no
    such file or it cannot be read, as in transformers."""
    try:
        with open(cached_file(name, GENERATION_CONFIG_NAME), encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, TypeError, ValueError):
        return {}


def in_words(settings: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items()) if name not in METADATA)
