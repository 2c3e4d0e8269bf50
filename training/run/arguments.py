# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run that TRL does not have, and a parser that is strict about YAML files."""

import json
from dataclasses import dataclass, field
from typing import Any, get_origin, get_type_hints

from trl import TrlParser

from training.elastic import parse_elastic
from training.samples import BUFFER_SIZE
from training.stages import TRAINED
from training.yaml_file import is_of_type, parts_of

BATCHINGS = ("packed", "grouped", "padded")


@dataclass
class HoneybeeArguments:
    """What is trained on what; the rest is `SFTConfig` and TRL's `ModelConfig`."""

    stage: str = field(
        default="instruct",
        metadata={"help": "`align` trains the projector, `instruct` the projector and the LLM; for the tower see "
                  "--train_vision_tower.",
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
    streaming: bool = field(
        default=False,
        metadata={"help": "Read --dataset while training: a Hub name, a folder, or .jsonl, .jsonl.zst, .parquet or .tar files by "
                  "a pattern in quotes."},
    )  # fmt: skip
    buffer_size: int = field(
        default=BUFFER_SIZE, metadata={"help": "Records of the stream that are shuffled together, in each worker."}
    )
    eval_dataset: dict | str | None = field(
        default=None,
        metadata={"help": "What --eval_strategy evaluates: as --dataset, or a name for each of several, as JSON or a YAML "
                  "mapping."},
    )  # fmt: skip
    eval_dataset_split: str = field(default="train", metadata={"help": "Split of --eval_dataset."})
    eval_split_size: float | None = field(
        default=None,
        metadata={"help": "Instead of --eval_dataset: the share of --dataset that is evaluated and not trained on."},
    )
    eval_tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Benchmarks that --eval_strategy asks the model as well, such as pope,mme: the names of "
                  "evaluation/run.py."},
    )  # fmt: skip
    eval_tasks_data: str | None = field(
        default=None, metadata={"help": "Folder of these benchmarks, as --data_root of evaluation/run.py."}
    )
    eval_limit: int | None = field(
        default=None, metadata={"help": "Ask at most this many questions of each benchmark, the same ones each time."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations in a row without a better metric_for_best_model."},
    )
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
    train_vision_tower: int | str | None = field(
        default=None,
        metadata={"help": "Train the vision tower as well: `all` of it, or the last n blocks that the projector reads. "
                  "Default: nothing of it, as in the paper."},
    )  # fmt: skip
    lora_vision: bool = field(
        default=False, metadata={"help": "With --use_peft: LoRA in the vision tower's blocks, too."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of what is trained of the vision tower; default: learning_rate."}
    )
    projector_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the projector, where the LLM is trained, too; default: learning_rate."},
    )
    projector: dict | str | None = field(
        default=None,
        metadata={"help": "Settings of a new projector, as JSON or a YAML mapping: fields of HoneybeeProjectorConfig."},
    )
    elastic: str | None = field(
        default=None,
        metadata={"help": "Train a projector whose visual tokens an image (M) can be chosen later: the numbers to draw from for "
                  'each sample, with weights where they are not 1, such as "16,64:2,144". Default: what the model was '
                  "trained with."},
    )  # fmt: skip
    max_crops: int | None = field(
        default=None,
        metadata={"help": "Cut large and wide pictures into at most this many squares, each with all its visual tokens; 1: none is "
                  "cut. Default, as of the next four: what the model was trained with."},
    )  # fmt: skip
    min_crops: int | None = field(
        default=None, metadata={"help": "Cut every picture into at least this many squares, small ones enlarged."}
    )
    overview: bool | None = field(
        default=None,
        metadata={"help": "Whether the whole picture, in one more square, follows the crops of a picture that is cut."},
    )
    overview_num_query_tokens: int | None = field(
        default=None, metadata={"help": "Visual tokens of that square, where they are not as many as a crop's."}
    )
    max_images_cut: int | None = field(
        default=None, metadata={"help": "Cut no picture of a sample that has more than this many."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Samples in one step of all processes; gradient_accumulation_steps follows from it."},
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Instead of per_device_train_batch_size: the samples of a step are packed into batches of at most "
                  "this many tokens, the same work for every process."},
    )  # fmt: skip
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
            self.projector = from_json("projector", self.projector)
        if isinstance(self.train_vision_tower, str) and self.train_vision_tower.lstrip("-").isdecimal():
            self.train_vision_tower = int(self.train_vision_tower)
        if isinstance(self.eval_dataset, str) and self.eval_dataset.startswith("{"):
            self.eval_dataset = from_json("eval_dataset", self.eval_dataset)
        if self.eval_tasks is not None:
            names = [name.strip() for words in self.eval_tasks for name in words.split(",")]
            self.eval_tasks = list(dict.fromkeys(filter(None, names)))
        if not isinstance(self.projector, (dict, type(None))):
            raise ValueError(f"--projector {self.projector!r} is not a mapping of settings to values")
        if self.elastic is not None:
            parse_elastic(self.elastic)


@dataclass
class EarlyArguments:
    """Of `SFTConfig`, what is checked before that is made: it starts the engine, and reads 0 steps as none given."""

    deepspeed: dict | str | None = None
    eval_steps: float | None = None


def from_json(name: str, text: str):
    """Raises a ValueError where the text of a setting is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} {text!r} is not JSON ({error})") from error


def in_words(hint) -> str:
    """A type in words: `mapping or str` of `dict | str | None`."""
    names = [str(part) if get_origin(part) else part.__name__ for part in parts_of(hint) if part is not type(None)]
    return " or ".join(names).replace("dict", "mapping")


class Parser(TrlParser):
    """Reads one value where a setting is a list, and refuses values of the YAML file that argparse does not look at,
    such as a list in place of a name. Text it reads as from the command line."""

    def set_defaults_with_config(self, **settings) -> list[str]:
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        for name, value in settings.items():
            hint = hints.get(name, Any)
            takes_list = any(get_origin(part) is list for part in parts_of(hint))
            text = isinstance(value, str) and not takes_list
            # The trainer takes true for "the last one", though its type says text.
            if text or is_of_type(value, hint) or name == "resume_from_checkpoint":
                continue
            if takes_list and is_of_type([value], hint):
                settings[name] = [value]
            else:
                raise ValueError(
                    f"{name}: {value!r} in the YAML file should be {in_words(hint)}; correct it (true, no, 7 and the like "
                    "are text in quotes only)"
                )
        return super().set_defaults_with_config(**settings)
