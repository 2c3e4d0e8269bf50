# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run that TRL does not have, and how all of them are read."""

import json
import sys
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from trl import ModelConfig, SFTConfig, TrlParser

from training.stages import TRAINED

BATCHINGS = ("packed", "grouped", "padded")


@dataclass
class HoneybeeArguments:
    """What is trained on what; the rest is `SFTConfig` and TRL's `ModelConfig`."""

    stage: str = field(
        default="instruct",
        metadata={"help": "`align` trains the projector, `instruct` the projector and the LLM; the tower never.",
                  "choices": list(TRAINED)},
    )  # fmt: skip
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub name or local path of a dataset with `messages` and `images`."},
    )
    batching: str = field(
        default="packed",
        metadata={"help": "`packed`: the samples of a batch in one row without padding; `grouped`: padded batches of "
                  "samples of about one length; `padded`: batches in random order, padded to their longest sample.",
                  "choices": list(BATCHINGS)},
    )  # fmt: skip
    mixture: dict | str | None = field(
        default=None,
        metadata={"help": "Instead of --dataset: a YAML file with a `mixture:` section, or that section in --config."},
    )
    mixture_settings: list[str] = field(
        default_factory=list,
        metadata={"help": "Settings of the mixture to change, as setting=value.", "aliases": ["--set"]},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    vision_model: str | None = field(
        default=None, metadata={"help": "Vision tower of a new model, instead of --model_name_or_path."}
    )
    text_model: str | None = field(default=None, metadata={"help": "Language model of a new model."})
    vision_feature_layer: list[int] | None = field(
        default=None,
        metadata={"help": "Layer of the tower that a new projector reads (d-abs: or several); default: -2."},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Image size of a new model, where it is not the tower's own."}
    )
    projector: dict | str | None = field(
        default=None,
        metadata={"help": "Settings of a new projector, as JSON or a YAML mapping: fields of HoneybeeProjectorConfig."},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Samples in one step of all processes; gradient_accumulation_steps follows from it."},
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint: --resume_from_checkpoint true."}
    )
    merge: bool = field(
        default=False, metadata={"help": "After LoRA, also write the whole model, in output_dir/merged."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check everything, print what would be trained and an estimate of the memory, and stop."},
    )

    def __post_init__(self):
        if isinstance(self.projector, str):
            try:
                self.projector = json.loads(self.projector)
            except json.JSONDecodeError as error:
                raise ValueError(f"--projector {self.projector!r} is not JSON ({error})") from error
        if isinstance(self.vision_feature_layer, int):  # of a YAML file
            self.vision_feature_layer = [self.vision_feature_layer]
        if isinstance(self.mixture_settings, str):
            self.mixture_settings = [self.mixture_settings]
        if not isinstance(self.projector, (dict, type(None))):
            raise ValueError(f"--projector {self.projector!r} is not a mapping of settings to values")


def fits(value, hint) -> bool:
    """Whether a value of a YAML file can be a setting of this type. argparse reads text, as from the command line."""
    if hint is Any or value is None or isinstance(value, (str, bool)):
        return True
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind is list:
        return isinstance(value, list) and all(fits(item, part) for part in parts for item in value)
    return isinstance(value, (int, float) if kind is float else kind)


def kinds(hint) -> str:
    """A type in words: `mapping or str` of `dict | str | None`."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = [str(part) if get_origin(part) else part.__name__ for part in parts if part is not type(None)]
    return " or ".join(names).replace("dict", "mapping")


class Parser(TrlParser):
    """Refuses values in the YAML file that argparse does not look at, such as a list in place of a name."""

    def set_defaults_with_config(self, **settings) -> list[str]:
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        for name, value in settings.items():
            if not fits(value, hints.get(name, Any)):
                raise ValueError(f"{name}: {value!r} in the YAML file should be {kinds(hints[name])}; correct it")
        return super().set_defaults_with_config(**settings)


def parse_arguments(arguments: list[str] | None = None) -> tuple[HoneybeeArguments, SFTConfig, ModelConfig]:
    """Flags and the YAML file that `--config` names; a flag wins.

    Args:
        arguments: instead of the command line's.

    Raises:
        ValueError: an unknown setting, or one that cannot be.
        SystemExit: what argparse refuses.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Without its own --help, which would list these settings alone.
    parser = Parser((HoneybeeArguments,), add_help=False)
    own, _ = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    if own.dry_run and not torch.cuda.is_available():
        arguments += ["--use_cpu", "True"]  # bf16 is refused where there is neither a GPU nor this
    parser = Parser((HoneybeeArguments, SFTConfig, ModelConfig))
    args, training_args, model_args = parser.parse_args_and_config(arguments, fail_with_unknown_args=True)
    if training_args.device.type == "cpu":
        # Of several processes accelerate numbers the CPU, and transformers 4 loads the optimizer onto that name ("cpu:0"),
        # which torch.load does not know.
        training_args._setup_devices = torch.device("cpu")
    if args.resume and not training_args.resume_from_checkpoint:
        training_args.resume_from_checkpoint = "true"
    return args, training_args, model_args
