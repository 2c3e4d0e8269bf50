# SPDX-License-Identifier: Apache-2.0
"""Honeybee as a model of lmms-eval, found there by its entry point as `honeybee`.

    lmms-eval --model honeybee --model_args pretrained=outputs/instruct,dtype=float32 --tasks mme --batch_size 8

A task's text and images become one user turn after the system line, the images first; tasks in lmms-eval bring their
own instructions, which are not the ones of prompts.py.
"""

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from evaluation.generate import answer, load
from evaluation.prompts import Question
from modeling_honeybee.model_folder import model_folder

manifest = ModelManifest("honeybee", simple_class_path="evaluation.lmms_eval_bridge.HoneybeeForLmmsEval")


class HoneybeeForLmmsEval(lmms):
    """Greedy answers of one process.

    Args:
        pretrained: folder or Hub name of a saved Honeybee.
        dtype: auto, float32, bfloat16 or float16.
    """

    def __init__(self, pretrained: str, device: str | None = None, batch_size: int = 1, dtype: str = "auto", **kwargs):
        super().__init__()
        if kwargs := {name: value for name, value in kwargs.items() if name != "max_batch_size"}:
            raise ValueError(f"model_args has {', '.join(kwargs)}; known are pretrained, device, batch_size, dtype")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, self.processor = load(model_folder(pretrained), dtype, device, None)
        self.batch_size = int(batch_size)

    def generate_until(self, requests) -> list[str]:
        groups: dict[int, list[Question]] = {}
        for number, request in enumerate(requests):
            context, settings, doc_to_visual, doc_id, task, split = request.args
            images = doc_to_visual(self.task_dict[task][split][doc_id])
            if len(images) > 1:
                raise ValueError(f"{task}: document {doc_id} has {len(images)} images; this bridge passes one")
            # images[0] by default argument, as the loop's variable moves on
            image = (lambda image=images[0]: image) if images else None
            question = Question(str(number), "own", context, image=image)
            groups.setdefault(settings.get("max_new_tokens", 128), []).append(question)
        answers = {}
        for max_new_tokens, questions in groups.items():
            batches = [questions[i : i + self.batch_size] for i in range(0, len(questions), self.batch_size)]
            for batch in answer(self.model, self.processor, batches, max_new_tokens):
                answers.update((int(question.id), text) for question, text in batch)
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests):
        raise NotImplementedError("this bridge answers generate_until tasks; loglikelihood tasks are not supported")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("this bridge answers generate_until tasks; multi-round tasks are not supported")
