# SPDX-License-Identifier: Apache-2.0
"""The one training loop of the lab: it can be killed at any moment and goes on from its last saved point."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn


def write_whole(path: str, write: Callable[[str], None]) -> None:
    """Writes a file that is either there and whole, or not there."""
    write(path + ".part")
    os.replace(path + ".part", path)


def write_text(path: str, text: str) -> None:
    write_whole(path, lambda part: Path(part).write_text(text, encoding="utf-8"))


def train(
    modules: nn.ModuleDict,
    learning_rate: float,
    share_of_rate: Callable[[int], float],
    loss_at: Callable[[int], torch.Tensor],
    steps: int,
    points: Iterable[int],
    at_point: Callable[[int, float], dict | None],
    state_file: str,
    after_step: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Trains the weights that require gradients, with AdamW and clipped gradients.

    Args:
        modules: all state that changes; what an average of weights needs, too.
        share_of_rate: of the learning rate, by step.
        loss_at: the loss of a step. Its data must follow from the step alone.
        points: the steps behind which `at_point` is called, with the number of steps done and the seconds of CPU time that
            training took so far, and behind which the state is saved. The last step is one of them.
        at_point: returns what is to be kept of a point.
        after_step: called after each step, as a part of it.

    Returns:
        What `at_point` returned, point by point.
    """
    trained = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate)
    first, seconds, kept = 0, 0.0, []
    if os.path.isfile(state_file):
        saved = torch.load(state_file, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["rng"])
        first, seconds, kept = saved["step"], saved["seconds"], saved["kept"]
    points = {*points, steps}
    for step in range(first, steps):
        started = time.process_time()
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        after_step()
        seconds += time.process_time() - started
        if step + 1 in points:
            kept.append(at_point(step + 1, seconds))
            state = {
                "modules": modules.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "rng": torch.get_rng_state(),
                "step": step + 1,
                "seconds": seconds,
                "kept": kept,
            }
            write_whole(state_file, lambda path, state=state: torch.save(state, path))
    return kept
