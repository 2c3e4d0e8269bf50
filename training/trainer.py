# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer, its head applied where a label is learned, and its speed in the log."""

import atexit
import os
import sys

import torch
from torch.utils.data import DataLoader
from trl import SFTTrainer

from training.engines import (
    check_saves_whole_models,
    gather_head_before_use,
    saved_as_one_process,
    untie_originals,
)
from training.interruption import protect_workers
from training.throughput import ThroughputMixin


def learned_only(inputs: dict) -> dict:
    """The inputs for TRL's head, (1, learned) `shift_labels` and where to take hidden states for them; unchanged where
    nothing is learned."""
    next_labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    learned = next_labels != -100
    if not learned.any():
        return inputs
    return {**inputs, "states_to_keep": learned, "shift_labels": next_labels[learned][None]}


class HoneybeeTrainer(ThroughputMixin, SFTTrainer):
    """TRL scores hidden states without ever holding all logits, but on anything without Triton it scores every
    position, and most of a row (images, questions, padding) is never learned. Here it gets the others only. The loss
    is the same."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The model declines it, because a count of labels made before it masks placeholders would be wrong. Our collator
        # masks them itself, so that accumulation steps can weigh by their tokens. (Sequence parallelism counts alone.)
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        self.model_accepts_loss_kwargs = not getattr(parallelism, "sp_enabled", False)
        check_saves_whole_models(self.accelerator.state)
        gather_head_before_use(self.model)
        if self.is_fsdp_enabled:
            untie_originals(self.model)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        # accelerate reads batches from the one inside, and makes another of the outer one's settings to skip batches.
        for each in (loader, getattr(loader, "base_dataloader", None)):
            if each is not None:
                protect_workers(each)
        return loader

    def end(self) -> None:
        """Leaves the other processes, once all is saved, and lets go of what only training needs."""
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def leave(self) -> None:
        """Ends this process with code 0 where it is one of several. What `atexit` knows runs, as always.

        In the interpreter's own ending a thread of the process group may still free what belongs to Python, which aborts the
        process, and torch and DeepSpeed hold the group so that destroying it does not end its threads.
        """
        if self.accelerator.num_processes > 1:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with saved_as_one_process(self.model, state_dict):
            super()._save(output_dir, state_dict)

    def create_model_card(self, *args, **kwargs) -> None:
        """None: TRL's tells how to ask a text model. `hub_upload/push.py` writes ours."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # These read logits of all positions; and a batch split along its tokens brings its own labels.
        reads_all = return_outputs or self.label_smoother is not None or self.compute_loss_func is not None
        if not reads_all and "shift_labels" not in inputs:
            inputs = learned_only(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
