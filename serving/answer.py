# SPDX-License-Identifier: Apache-2.0
"""One answer of a model to a checked chat request, text by text as it is generated."""

from collections.abc import Callable

import torch
from jinja2 import TemplateError
from transformers import LogitsProcessor, StoppingCriteria

from serving.limits import ChatRequest, LimitError


class Penalties(LogitsProcessor):
    """OpenAI's: each token loses `frequency` for each time that the answer has it, and `presence` if it has it at all."""

    def __init__(self, prompt_tokens: int, frequency: float, presence: float):
        self.prompt_tokens, self.frequency, self.presence = prompt_tokens, frequency, presence

    def __call__(self, input_ids, scores):
        answer = input_ids[:, self.prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


class LogitBias(LogitsProcessor):
    """OpenAI's: what is added to single tokens. (transformers 4 refuses to bias the token 0.)"""

    def __init__(self, bias: dict[int, float]):
        self.bias = bias

    def __call__(self, input_ids, scores):
        added = torch.zeros_like(scores)
        added[:, list(self.bias)] = torch.tensor([*self.bias.values()], dtype=scores.dtype, device=scores.device)
        return scores + added


class Answer(StoppingCriteria):
    """An answer to `request`. [`run`] generates it; it is the criterion that ends it, too.

    Attributes:
        text: the answer so far, without a stop text and what follows it.
        finish_reason: "stop" (it ended by itself, or at a stop text) or "length".
        prompt_tokens, completion_tokens: their numbers.
        cancelled: set it, from any thread, to end the answer at its next token.
    """

    def __init__(self, model, processor, request: ChatRequest):
        self.model, self.tokenizer, self.processor, self.request = model, processor.tokenizer, processor, request
        self.text, self.finish_reason = "", "length"
        self.prompt_tokens = self.completion_tokens = 0
        self.stopped = self.cancelled = False

    def run(self, emit: Callable[[str | BaseException | None], None]) -> None:
        """Generates. Calls `emit` with each new part of the text, and at the end with None or with what went wrong: a
        LimitError where the images cannot be decoded, or the prompt is longer than the model's context.

        One answer at a time: the seed is that of the whole process.
        """
        self.emit = emit
        try:
            if not self.cancelled:
                self.generate()
            emit(None)
        except BaseException as error:  # whoever waits must hear of it; a panic in tokenizers is no Exception
            emit(error)

    def generate(self) -> None:
        inputs, settings = self.prepare()
        if self.request.seed is None:
            torch.seed()
        else:
            torch.manual_seed(self.request.seed)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, **settings, stopping_criteria=[self])[0, self.prompt_tokens :].tolist()
        self.read(ids, final=True)
        ends = self.model.generation_config.eos_token_id
        if self.stopped or ids[-1] in (ends if isinstance(ends, list) else [ends]):
            self.finish_reason = "stop"

    def prepare(self) -> tuple[dict, dict]:
        """Inputs and settings of `generate`."""
        request = self.request
        try:
            prompt = self.processor.apply_chat_template(request.messages, add_generation_prompt=True)
            inputs = self.processor(
                images=request.images or None, text=prompt, add_special_tokens=False, return_tensors="pt"
            )
        except (OSError, TemplateError, ValueError) as error:
            raise LimitError(str(error), "messages") from error
        self.prompt_tokens = inputs["input_ids"].shape[1]
        text_config = self.model.config.get_text_config()
        context = getattr(text_config, "max_position_embeddings", None) or float("inf")
        if self.prompt_tokens >= context:
            raise LimitError(
                f"the prompt has {self.prompt_tokens:,} tokens, images included; the model's context is {context:,}",
                "messages",
            )
        if too_high := [token for token in request.logit_bias if token >= text_config.vocab_size]:
            raise LimitError(
                f"logit_bias has token {too_high[0]}; the last one is {text_config.vocab_size - 1}", "logit_bias"
            )
        settings = {"max_new_tokens": int(min(request.max_tokens, context - self.prompt_tokens)), "num_beams": 1}
        settings |= {"num_return_sequences": 1, "return_dict_in_generate": False, **self.sampling()}
        processors = [LogitBias(request.logit_bias)] if request.logit_bias else []
        if request.frequency_penalty or request.presence_penalty:
            processors.append(Penalties(self.prompt_tokens, request.frequency_penalty, request.presence_penalty))
        settings["logits_processor"] = processors
        return inputs.to(self.model.device), settings

    def sampling(self) -> dict:
        """Greedy unless the request asks for sampling, by a temperature or by a `top_p` below 1."""
        temperature, top_p = self.request.temperature, self.request.top_p
        if temperature is None:
            temperature = 1.0 if top_p is not None and top_p < 1 else 0.0
        if temperature < 1e-5:  # as good as none, and logits divided by less overflow
            return {"do_sample": False}
        return {"do_sample": True, "temperature": temperature, "top_p": 1.0 if top_p is None else top_p, "top_k": 0}

    def __call__(self, input_ids, scores, **kwargs):
        self.read(input_ids[0, self.prompt_tokens :].tolist())
        return torch.full((len(input_ids),), self.stopped or self.cancelled, device=input_ids.device)

    def read(self, ids: list[int], final: bool = False) -> None:
        """Emits what can no longer change: not the bytes of half a character, nor the beginning of a stop text."""
        if self.stopped:
            return
        self.completion_tokens = len(ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if found := [at for stop in self.request.stop if (at := text.find(stop)) >= 0]:
            text, self.stopped = text[: min(found)], True
        elif not final:
            text = text.rstrip("\ufffd")
            lengths = [(stop, n) for stop in self.request.stop for n in range(1, min(len(stop), len(text) + 1))]
            text = text[: len(text) - max((n for stop, n in lengths if text.endswith(stop[:n])), default=0)]
        if len(text) > len(self.text):
            self.emit(text[len(self.text) :])
            self.text = text
