# SPDX-License-Identifier: Apache-2.0
"""What a trainer keeps of a [`Mixture`]."""

import logging
import os

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from modeling_honeybee.model_folder import STATE_FILE
from training.recipe.mixture import Mixture

logger = logging.getLogger(__name__)


class MixtureCallback(TrainerCallback, ExportableState):
    """Keeps in the trainer's state what was mixed and skipped, checks it on resuming, and reports at the end.

    Args:
        mixture: the one that is trained on.
        checkpoint: folder that the run resumes from, or None.

    Raises:
        ValueError: the checkpoint is of another mixture, or of a run without one.
    """

    def __init__(self, mixture: Mixture, checkpoint: str | None = None):
        self.mixture = mixture
        if checkpoint is not None:
            state = TrainerState.load_from_json(os.path.join(checkpoint, STATE_FILE))
            saved = state.stateful_callbacks.get(type(self).__name__)
            if saved is None:
                raise ValueError(f"{checkpoint!r} is the checkpoint of a run without a mixture; start a new run")
            mixture.load_state_dict(saved["attributes"]["mixture"])

    def state(self) -> dict:
        """For `trainer_state.json`."""
        return {"args": {}, "attributes": {"mixture": self.mixture.state_dict()}}

    def on_train_end(self, args, state, control, **kwargs):
        logger.info("Records skipped (process %d): %s", args.process_index, self.mixture.report())
