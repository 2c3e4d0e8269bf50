# SPDX-License-Identifier: Apache-2.0
"""Shows before the first step that a run can save, and uploads the saved model so that a failure cannot harm it."""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_honeybee import HoneybeeConfig
from processing import HoneybeeProcessor
from training.run.checkpoints import TRIAL


def _save_each(parts: dict[str, Callable[[str], object]], folder: str) -> None:
    """Calls each part's function for saving, under the part's name.

    Raises:
        OSError: the folder cannot be written.
        ValueError: which part cannot be saved, why, and the remedy.
    """
    for name, save in parts.items():
        try:
            save(folder)
        except OSError:
            raise
        except Exception as error:  # a foreign tokenizer or config may raise anything
            raise ValueError(
                f"{name} cannot be saved, and the run would end without a model ({type(error).__name__}: {error}); correct "
                "it in the model that the run starts from (--model_name_or_path, or --text_model and --vision_model)"
            ) from error


def check_savable(config: HoneybeeConfig, processor: HoneybeeProcessor) -> None:
    """Tries to save config and processor in a temporary folder, before the weights are read.

    Raises:
        ValueError: see [`prove_saving`].
    """
    parts = {"the model's config": config.save_pretrained, "the processor": processor.save_pretrained}
    with suppress(OSError), tempfile.TemporaryDirectory() as folder:  # the output folder is tried by prove_saving
        _save_each(parts, folder)


def prove_saving(trainer: Trainer, existing: str) -> None:
    """Tries to save in the output folder all that the run will save there, with one number in place of each tensor, and
    removes it again.

    Args:
        existing: the nearest folder on the output folder's path that was there before the start. A failure leaves no new
            folder below it.

    Raises:
        ValueError: in all processes; what cannot be saved, why, and the remedy.
    """
    said = [None]
    if trainer.is_world_process_zero():
        try:
            _save_trial(trainer)
        except ValueError as error:
            said = [str(error)]
        except OSError as error:
            said = [
                f"output_dir {trainer.args.output_dir!r} does not take what the run will save there ({error}); free some "
                "space, or give another folder"
            ]
        if said[0]:
            _remove_empty(trainer.args.output_dir, existing)
    broadcast_object_list(said)
    if said[0]:
        raise ValueError(said[0])


def _save_trial(trainer: Trainer) -> None:
    model, folder = trainer.model, os.path.join(trainer.args.output_dir, TRIAL)
    tiny = {name: torch.zeros(1) for name in model.state_dict()}
    parts = {
        "the model's config": model.config.save_pretrained,
        "the generation config": model.generation_config.save_pretrained,
        "the processor": trainer.processing_class.save_pretrained,
        "the model": partial(model.save_pretrained, state_dict=tiny),
        "the training arguments": lambda folder: torch.save(trainer.args, os.path.join(folder, "training_args.bin")),
    }
    shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed
    try:
        os.makedirs(folder)
        _save_each(parts, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_empty(folder: str, existing: str) -> None:
    """Removes the folder and those above it up to `existing`, as far as they are empty."""
    folder = os.path.abspath(folder)
    with suppress(OSError):
        while folder != existing:
            os.rmdir(folder)
            folder = os.path.dirname(folder)


def push(trainer: Trainer) -> None:
    """Uploads the output folder as it is, without the checkpoints. The trainer's own push saves the model once more first,
    over the one that is whole."""
    HfApi(token=trainer.args.hub_token).upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=trainer.args.output_dir,
        commit_message="End of training",
        revision=trainer.args.hub_revision,
        ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"],
    )
