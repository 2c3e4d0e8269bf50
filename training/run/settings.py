# SPDX-License-Identifier: Apache-2.0
"""All settings of a run in one object, which is complete once it is made, and how they are read."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from training.run.arguments import EarlyArguments, HoneybeeArguments, Parser
from training.yaml_file import read_yaml

if TYPE_CHECKING:  # these and torch load for seconds, which a wrong setting of ours should not wait for
    from trl import ModelConfig, SFTConfig

logger = logging.getLogger(__name__)

OURS = "the model's own processor prepares the samples"
# Settings of `SFTConfig` that would change nothing in a Honeybee's run, and why. They are put back, with a warning.
WITHOUT_EFFECT = {
    "assistant_only_loss": "only the assistant's words are learned anyway",
    "dataset_text_field": OURS,
    "pad_to_multiple_of": OURS,
    "pad_token": OURS,
    "shuffle_dataset": "samples come in a random order anyway",
}


@dataclass
class Settings:
    """What makes a run. Making it completes it: settings that follow from others are filled in, such as the accumulation
    steps from the global batch. No check changes them afterwards. What follows from the data is set by the plan alone (see
    `accumulate`).

    Args:
        honeybee: what is trained on what.
        training: the settings of the trainer.
        model: the settings of a model that exists already, and of LoRA.

    Attributes:
        liger: whether the language model gets Liger's kernels.
        compile: `backend` and `mode` of `torch.compile` for the language model's blocks, or None.

    Raises:
        ValueError: the global batch cannot be made, or DeepSpeed's settings contradict the trainer's.
    """

    honeybee: HoneybeeArguments
    training: SFTConfig
    model: ModelConfig
    liger: bool = field(init=False)
    compile: dict | None = field(init=False)

    def __post_init__(self):
        import torch

        training = self.training
        if training.device.type == "cpu":
            # Of several processes accelerate numbers the CPU, and transformers 4 loads the optimizer onto that name
            # ("cpu:0"), which torch.load does not know.
            training._setup_devices = torch.device("cpu")
        if self.honeybee.resume and not training.resume_from_checkpoint:
            training.resume_from_checkpoint = "true"
        # The collator prepares samples on the fly and needs their columns as they are.
        training.remove_unused_columns = False
        training.dataset_kwargs = {**(training.dataset_kwargs or {}), "skip_prepare_dataset": True}
        self._put_back_what_has_no_effect()
        self._take_from_the_trainer()
        if self.honeybee.max_tokens_per_batch is None:
            self._set_accumulation()
            self.accumulate(training.gradient_accumulation_steps)

    @property
    def global_batch_size(self) -> int:
        """Samples in one step of all processes."""
        if self.honeybee.max_tokens_per_batch is not None:
            return self.honeybee.global_batch_size
        return self.samples_at_once * self.training.gradient_accumulation_steps

    @property
    def samples_at_once(self) -> int:
        """Samples that all processes take at a time."""
        return self.training.train_batch_size * self.training.world_size

    @property
    def data_seed(self) -> int:
        """Of the order of samples, and of the share that is kept for the evaluation."""
        return self.training.seed if self.training.data_seed is None else self.training.data_seed

    @property
    def learning_rates(self) -> dict[str, float]:
        """Of the parts of the model that have another one than `learning_rate`: see `training/trainer/learning_rates.py`."""
        given = {"vision": self.honeybee.vision_learning_rate, "projector": self.honeybee.projector_learning_rate}
        return {part: rate for part, rate in given.items() if rate not in (None, self.training.learning_rate)}

    def _put_back_what_has_no_effect(self) -> None:
        given = [name for name in WITHOUT_EFFECT if is_set(self.training, name)]
        if given:
            why = "; ".join(f"{name} ({WITHOUT_EFFECT[name]})" for name in given)
            logger.warning("These settings change nothing here and are left out: %s", why)
        for name in given:
            setattr(self.training, name, type(self.training).__dataclass_fields__[name].default)

    def _take_from_the_trainer(self) -> None:
        """What the trainer would do to the whole model is for the language model: see `training/trainer/kernels.py`."""
        training = self.training
        self.liger = training.use_liger_kernel
        self.compile = None
        if training.torch_compile:
            self.compile = {"backend": training.torch_compile_backend, "mode": training.torch_compile_mode}
            for name in ("BACKEND", "MODE"):  # transformers 4 tells accelerate by these
                os.environ.pop(f"ACCELERATE_DYNAMO_{name}", None)
        training.use_liger_kernel = training.torch_compile = False
        training.torch_compile_backend = training.torch_compile_mode = None

    def accumulate(self, batches: int) -> None:
        """Sets how many batches a process makes in a step. With `max_tokens_per_batch` the plan does, which sees the data."""
        from training.trainer.engines import settle_deepspeed

        self.training.gradient_accumulation_steps = batches
        settle_deepspeed(self.training)

    def _set_accumulation(self) -> None:
        wanted, at_once = self.honeybee.global_batch_size, self.samples_at_once
        if wanted is None:
            return
        training, given = self.training, self.training.gradient_accumulation_steps
        shape = f"per_device_train_batch_size={training.train_batch_size} in {training.world_size} processes"
        if wanted < 1 or at_once < 1 or wanted % at_once:
            raise ValueError(
                f"global_batch_size={wanted} is not a multiple of {at_once} ({shape}); change --per_device_train_batch_size "
                "to a divisor, or the number of processes"
            )
        if given != 1 and given * at_once != wanted:
            raise ValueError(
                f"global_batch_size={wanted}, but {shape} and gradient_accumulation_steps={given} make {given * at_once}; "
                "leave gradient_accumulation_steps out, it follows"
            )
        training.gradient_accumulation_steps = wanted // at_once


def is_set(settings: HoneybeeArguments | SFTConfig | ModelConfig, name: str) -> bool:
    """Whether a setting was given, and is another one than the default."""
    return getattr(settings, name) not in (None, type(settings).__dataclass_fields__[name].default)


def parse_arguments(arguments: list[str] | None = None) -> Settings:
    """Flags and the YAML file that `--config` names; a flag wins.

    Args:
        arguments: instead of the command line's.

    Raises:
        ValueError: an unknown setting, or one that cannot be.
        OSError, yaml.YAMLError: a YAML file that is not there, or is none.
        SystemExit: what argparse refuses.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[-1:] == ["--config"]:
        raise ValueError("--config needs the path of a YAML file behind it")
    if "--config" in arguments:
        path = arguments[arguments.index("--config") + 1]
        _, twice = read_yaml(path)
        if twice:
            raise ValueError(f"{path}: {'; '.join(twice)}")
    # Without its own --help, which would list these settings alone.
    parser = Parser((HoneybeeArguments, EarlyArguments), add_help=False)
    own, early, _ = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    if early.eval_steps is not None and not early.eval_steps > 0:
        raise ValueError(f"eval_steps={early.eval_steps:g} must be more than 0, or leave it out for logging_steps")

    if {"-h", "--help"} & set(arguments):
        # transformers 5 loads it with its settings, for seconds; they are listed without it, and the process ends.
        sys.modules.setdefault("peft", None)
    import torch
    from trl import ModelConfig, SFTConfig

    if early.deepspeed is not None:
        from training.trainer.engines import check_deepspeed

        check_deepspeed(early.deepspeed)
    if own.dry_run and not torch.cuda.is_available():
        arguments += ["--use_cpu", "True"]  # bf16 is refused where there is neither a GPU nor this
    parser = Parser((HoneybeeArguments, SFTConfig, ModelConfig))
    return Settings(*parser.parse_args_and_config(arguments, fail_with_unknown_args=True))
