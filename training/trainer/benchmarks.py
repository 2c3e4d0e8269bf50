# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of `evaluation/`, asked while a model trains."""

import time

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from evaluation.generate import answer, batches_of_rank
from evaluation.prompts import Question, plain, render
from evaluation.results import score
from evaluation.task import check_records
from evaluation.tasks import TASKS
from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor


class Benchmarks:
    """Asks a model as `evaluation/run.py` does, the same questions in the same batches, and scores its answers.

    Args:
        questions: task -> what is asked.
        batch_size: questions at a time, per process.
    """

    def __init__(self, questions: dict[str, list[Question]], processor: HoneybeeProcessor, batch_size: int):
        self.questions, self.processor, self.batch_size = questions, processor, batch_size
        self.prompts = {
            name: {q.id: plain(render(q, processor), processor) for q in asked} for name, asked in questions.items()
        }

    def metrics(
        self, model: HoneybeeForConditionalGeneration, accelerator: Accelerator, show_progress: bool
    ) -> dict[str, float]:
        """`eval_TASK` for each task, and the parts of its score that have a short name; the same in all processes.

        Raises:
            ValueError: an image cannot be read, or answers cannot be scored.
        """
        found = {}
        for name, questions in self.questions.items():
            task, start = TASKS[name], time.perf_counter()
            records = self._ask(model, name, accelerator, show_progress)
            answered = [records[question.id] for question in questions]
            check_records(task, answered, f"the answers to {name}")
            result = score(task, answered)
            found[f"eval_{name}"] = result["score"]
            parts = list(result["summary"].items())[1:]  # the first is mostly the score itself
            found |= {f"eval_{name}_{part}": value for part, value in parts if "/" not in part}
            found[f"eval_{name}_runtime"] = round(time.perf_counter() - start, 4)
        return found

    def _ask(self, model, name: str, accelerator: Accelerator, show_progress: bool) -> dict[str, dict]:
        """The records of all processes by id. Each process answers its share."""
        task, prompts = TASKS[name], self.prompts[name]
        rank, processes = accelerator.process_index, accelerator.num_processes
        batches = batches_of_rank(self.questions[name], prompts, self.batch_size, rank, processes)
        records = []
        total = sum(map(len, batches))
        with tqdm(total=total, desc=name, leave=False, dynamic_ncols=True, disable=not show_progress) as bar:
            for batch in answer(model, self.processor, batches, task.max_new_tokens):
                records += [question.answered(text, prompts[question.id]) for question, text in batch]
                bar.update(len(batch))
        return {record["id"]: record for record in gather_object(records)}
