# SPDX-License-Identifier: Apache-2.0
"""One experiment: a projector is trained between a tower and a language model that stay as they are, and evaluated.

The tower has been run before: the projector reads its features from a file. Points of a run are comparable, because the
learning rate is constant and what is evaluated is a running average of the weights: each point is a run that ended there.

Shapes: B images of a batch, N patches, M visual tokens, Q rows of questions, T tokens of text.
"""

import hashlib
import inspect
import json
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lab.loop import train, write_text, write_whole
from lab.projectors import CANDIDATES, make_projector, projector_config
from lab.rows import Rows
from lab.ways import PLAIN, WAYS, elastic_width
from modeling_honeybee import HoneybeeConfig

WARMUP_STEPS = 20
AVERAGED_STEPS = 50  # how far back the average of the weights reaches

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # as [`Task.batch`] gives it


class Lesson(NamedTuple):
    """What is learned at one M in a step.

    Args:
        number: M.
        batch: images, questions and answers.
        teacher: the largest M and the same with it, where what is answered there teaches what is answered here.
    """

    number: int
    batch: Batch
    teacher: tuple[int, Batch] | None = None


@dataclass(frozen=True)
class Experiment:
    """
    Args:
        task: what makes its data and parts, of which [`Task`] is the interface.
        hidden_size: of the projector; None: the default width.
        num_tokens: M.
        split: on which it is evaluated; learning rates are chosen on `validation`.
        points: numbers of steps at which it is evaluated, ascending; the last is the length of the run.
        elsewhere: other M, at which the projector is evaluated too, without being trained for them. (In the record, all M but
            `num_tokens`.)
        trained_at: elastic: learned at all of these M, ascending, and evaluated at all; () for `num_tokens` alone.
        way: in which an elastic one learns, out of `WAYS`.
    """

    projector: str
    task: "Task"
    num_tokens: int
    learning_rate: float
    points: tuple[int, ...]
    hidden_size: int | None = None
    split: str = "test"
    batch_size: int = 32
    elsewhere: tuple[int, ...] = ()
    trained_at: tuple[int, ...] = ()
    way: str = field(default=PLAIN, repr=False)

    def lessons(self, step: int) -> list[Lesson]:
        """What is learned in a step."""
        way, batch, lessons = WAYS[self.way], self.task.batch, []
        numbers = (self.num_tokens,) if step < way.alone else self.trained_at or (self.num_tokens,)
        for which in range(step * way.batches, (step + 1) * way.batches):
            drawn = way.draw(np.random.default_rng((self.task.seed, which, len(numbers))), self.batch_size, numbers)
            for place, number in enumerate(numbers):
                if count := int((drawn == number).sum()):
                    same = which * len(numbers) + place, count
                    taught = way.taught and number < numbers[-1]
                    teacher = (numbers[-1], batch(*same, numbers[-1])) if taught else None
                    lessons.append(Lesson(number, batch(*same, number), teacher))
        return lessons

    @property
    def name(self) -> str:
        """Of its files. Two experiments that differ in a setting, or in the code of the projector's class, have two names."""
        candidate = CANDIDATES[self.projector]
        settings = [repr(self), repr(candidate.settings), inspect.getsource(candidate.build)]
        if self.way != PLAIN:
            settings += [repr(WAYS[self.way]), inspect.getsource(candidate.scaled) if WAYS[self.way].scaled else ""]
        digest = hashlib.sha256("".join(settings).encode()).hexdigest()[:8]
        return f"{self.projector}-m{self.num_tokens}-{self.task.name}-{self.split}-{digest}"


class Task(ABC):
    """What an experiment needs of its data and parts. Small enough to be sent to another process; opens its files late.

    Attributes:
        tower, seed: by which results are grouped.
        images: tells sets of images apart; tasks that ask about the same images have the same.
        placeholder: the id that stands where a visual token goes.
        device: on which projector and language model run.
    """

    tower: str
    seed: int
    images: int
    placeholder: int
    device: str = "cpu"

    def __getstate__(self) -> dict:
        """Without what was cached."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.tower}-seed{self.seed}"

    @abstractmethod
    def preparations(self) -> dict[str, Callable[[], None]]:
        """What has to be done once before experiments, by the file that it leaves. Tasks may share some."""

    @abstractmethod
    def check(self) -> None:
        """Raises a ValueError or OSError where the data cannot be had or do not fit, before anything is trained."""

    @abstractmethod
    def configs(self) -> tuple:
        """Configs of the tower and of the language model."""

    @abstractmethod
    def language_model(self) -> nn.Module:
        """A causal language model, frozen."""

    @abstractmethod
    def features(self, split: str) -> torch.Tensor:
        """(images, N, D_v) of `train`, `validation` or `test`."""

    @abstractmethod
    def batch(self, step: int, size: int, num_tokens: int) -> Batch:
        """Of a training step: `input_ids` (B, T) with M placeholders a row, `labels` (B, T), `images` (B,)."""

    @abstractmethod
    def rows(self, split: str, num_tokens: int) -> Rows:
        """All that is asked of the images of a split."""

    def ceiling(self, num_tokens: int) -> dict[str, str] | None:
        """What [`evaluate`] finds right of test images whose visual tokens are perfect; None where nobody knows them."""
        return None

    @abstractmethod
    def picture(self) -> tuple[int, np.ndarray]:
        """A test image that is worth looking at: its number, and the picture (S, S) or (S, S, 3), uint8."""

    @property
    def num_patches(self) -> int:
        return HoneybeeConfig(*self.configs()).num_patches


def running_average(average: torch.Tensor, weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The average after a step. Early it reaches back over a share of the steps, so that first weights are soon forgotten."""
    return average + (weight - average) * max(1 / AVERAGED_STEPS, 1 - (1 + int(steps)) / (10 + int(steps)))


def _predictions(language_model, ids, labels, tokens, placeholder: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (asked, V) of what is said where there is a label, and where that is (B, T - 1).

    Args:
        ids, labels: (B, T) and, without the first of each row, (B, T - 1).
        tokens: (B, M, D_lm), which take the places of the placeholders.
    """
    visual = ids == placeholder
    embeds = language_model.get_input_embeddings()(ids.masked_fill(visual, 0))
    embeds = embeds.masked_scatter(visual.unsqueeze(-1), tokens.to(embeds.dtype))
    # No mask: rows are padded on the right, where a causal model does not look.
    hidden = language_model.base_model(inputs_embeds=embeds).last_hidden_state[:, :-1]
    asked = labels != -100
    return language_model.get_output_embeddings()(hidden[asked]), asked


@torch.inference_mode()
def evaluate(
    visual_tokens: Callable[[torch.Tensor], torch.Tensor], language_model, rows: Rows, placeholder: int, device: str
) -> tuple[dict[str, str], float]:
    """By kind, `1` for each row whose labelled tokens are all what the model finds likeliest there, and `0` for others; and
    the cross-entropy of a labelled token, in nats.

    Args:
        visual_tokens: makes the tokens (images, M, D_lm) of images, given by number (images,).
    """
    right, losses = defaultdict(str), []
    size = max(1, 40_000 // rows.ids.shape[1])
    for start in range(0, len(rows.ids), size):
        ids, labels = (each[start : start + size].to(device) for each in (rows.ids, rows.labels[:, 1:]))
        images, each = rows.images[start : start + size].unique_consecutive(return_inverse=True)
        tokens = visual_tokens(images)[each.to(device)]
        logits, asked = _predictions(language_model, ids, labels, tokens, placeholder)
        logits = logits.float()
        losses.append(F.cross_entropy(logits, labels[asked], reduction="none"))
        wrong = torch.zeros(labels.shape, dtype=torch.bool, device=device)
        wrong[asked] = logits.argmax(-1) != labels[asked]
        for kind, failed in zip(rows.kinds[start : start + size], wrong.any(1).tolist()):
            right[kind] += "01"[not failed]
    return dict(right), float(torch.cat(losses).mean())


def lesson_losses(lesson: Lesson, say: Callable[[int, Batch], tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Losses (asked,) of a lesson.

    Args:
        say: from M and a batch, the logits (asked, V) of what is said, and what is right (asked,).
    """
    logits, right = say(lesson.number, lesson.batch)
    losses = [F.cross_entropy(logits, right, reduction="none")]
    if lesson.teacher is not None:
        best, right = say(*lesson.teacher)
        losses.append(F.cross_entropy(best, right, reduction="none"))
        best = best.detach().log_softmax(-1)
        losses.append(F.kl_div(logits.log_softmax(-1), best, log_target=True, reduction="none").sum(-1))
    return losses


def run(experiment: Experiment, folder: str) -> str:
    """Trains and evaluates, or goes on where an earlier run was stopped. Writes `folder/NAME.json` and the projector's
    weights beside it; returns the path of the first."""
    path = os.path.join(folder, experiment.name)
    task, num_tokens = experiment.task, experiment.num_tokens
    torch.manual_seed(task.seed)
    config = projector_config(
        experiment.projector, *task.configs(), num_tokens, experiment.hidden_size, experiment.trained_at
    )
    projector = make_projector(experiment.projector, config, WAYS[experiment.way].scaled).to(task.device)
    averaged = AveragedModel(projector, avg_fn=running_average).requires_grad_(False)
    language_model, features = task.language_model().to(task.device), task.features("train")
    tested = task.features(experiment.split)
    numbers = {num_tokens, *experiment.trained_at, *experiment.elsewhere}
    asked = {number: task.rows(experiment.split, number) for number in sorted(numbers)}

    def say(number: int, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels, images = batch
        ids, labels = ids.to(task.device), labels[:, 1:].to(task.device)
        projector.num_query_tokens = number
        tokens = projector(features[images].to(task.device).float())
        logits, learned = _predictions(language_model, ids, labels, tokens, task.placeholder)
        return logits, labels[learned]

    def loss_at(step: int) -> torch.Tensor:
        return torch.cat([loss for lesson in experiment.lessons(step) for loss in lesson_losses(lesson, say)]).mean()

    task.batch(0, 1, num_tokens)  # reads what is read once, which is no part of training's time

    def ask(number: int) -> tuple[dict[str, str], float]:
        evaluated = averaged.module.eval()
        evaluated.num_query_tokens = number
        return evaluate(
            lambda images: evaluated(tested[images].to(task.device).float()),
            language_model,
            asked[number],
            task.placeholder,
            task.device,
        )

    def at_point(step: int, seconds: float) -> dict:
        found = {number: ask(number) for number in asked}
        return {"step": step, "cpu_seconds": round(seconds, 2), **_answers(experiment, found)}

    points = train(
        nn.ModuleDict({"projector": projector, "average": averaged}),
        experiment.learning_rate,
        lambda step: min(1.0, (step + 1) / WARMUP_STEPS),
        loss_at,
        experiment.points[-1],
        experiment.points,
        at_point,
        path + ".state",
        after_step=lambda: averaged.update_parameters(projector),
    )
    write_whole(path + ".pt", partial(torch.save, averaged.module.state_dict()))
    write_text(path + ".json", json.dumps(_record(experiment, config, projector, points)))
    os.remove(path + ".state")
    return path + ".json"


def _answers(experiment: Experiment, found: dict[int, tuple[dict[str, str], float]]) -> dict:
    """Of a point, from what [`evaluate`] found by M."""
    loss = float(np.mean([found[number][1] for number in experiment.trained_at or (experiment.num_tokens,)]))
    right = {number: right for number, (right, _) in found.items()}
    own = right.pop(experiment.num_tokens)
    return {"loss": loss, "right": own, "elsewhere": {str(number): each for number, each in right.items()}}


def _record(experiment: Experiment, config: HoneybeeConfig, projector: nn.Module, points: list[dict]) -> dict:
    task, width = experiment.task, "default" if experiment.hidden_size is None else "matched"
    return {
        "name": experiment.name,
        "projector": experiment.projector,
        "tower": task.tower,
        "seed": task.seed,
        "num_tokens": experiment.num_tokens,
        "width": elastic_width(experiment.way) if experiment.trained_at else width,
        "trained_at": experiment.trained_at,
        "hidden_size": config.projector_config.hidden_size,
        "parameters": sum(parameter.numel() for parameter in projector.parameters()),
        "learning_rate": experiment.learning_rate,
        "split": experiment.split,
        "points": points,
    }
