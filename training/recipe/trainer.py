# SPDX-License-Identifier: Apache-2.0
"""Our trainer on a [`Mixture`]."""

import json
import logging
import os

from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from training.trainer import HoneybeeTrainer

from .mixture import Mixture

logger = logging.getLogger(__name__)

STATE_FILE = "mixture.json"


class MixtureTrainer(HoneybeeTrainer):
    """A HoneybeeTrainer whose `train_dataset` is `Mixture.as_dataset()`: read in order, since it is shuffled already."""

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        # transformers 5 has train_sampling_strategy="sequential" for this, 4 has nothing.
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class MixtureCallback(TrainerCallback):
    """Saves with each checkpoint what was mixed and skipped, checks it on resuming, and reports at the end.

    Args:
        mixture: the one that is trained on.
        checkpoint: folder that the run resumes from, or None.

    Raises:
        ValueError: the checkpoint is of another mixture.
        FileNotFoundError: it is of a run without a mixture.
    """

    def __init__(self, mixture: Mixture, checkpoint: str | None = None):
        self.mixture = mixture
        if checkpoint is not None:
            path = os.path.join(checkpoint, STATE_FILE)
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{path!r} does not exist: the checkpoint is of a run without this mixture")
            with open(path, encoding="utf-8") as file:
                mixture.load_state_dict(json.load(file))

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            # The trainer has made the folder and written its state by now.
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            with open(os.path.join(folder, STATE_FILE), "w", encoding="utf-8") as file:
                json.dump(self.mixture.state_dict(), file)

    def on_train_end(self, args, state, control, **kwargs):
        logger.info("Records skipped (process %d): %s", args.process_index, self.mixture.report())
