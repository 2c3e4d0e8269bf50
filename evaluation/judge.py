# SPDX-License-Identifier: Apache-2.0
"""Judgements by a language model behind any OpenAI-compatible endpoint, for the tasks that cannot be scored by rules.

The endpoint is given in the environment:

    HONEYBEE_JUDGE_URL     base URL, as in https://api.openai.com/v1
    HONEYBEE_JUDGE_MODEL   name of the model; the official scores are GPT-4's
    HONEYBEE_JUDGE_KEY     key, where the endpoint wants one; it is sent, and never written anywhere
    HONEYBEE_JUDGE_PRICE   optional, dollars for a million tokens in and out, as in 2.50/10

Prompts and settings are those of the benchmarks' own scripts: LLaVA's `eval_gpt_review_bench.py`, MM-Vet's evaluator,
MMBench's answer extraction.
"""

import hashlib
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.predictions import append_lines, read_lines
from evaluation.scorers import parse_mmbench

ENVIRONMENT = {name: f"HONEYBEE_JUDGE_{name.upper()}" for name in ("url", "model", "key", "price")}


class JudgeRefusedError(Exception):
    """The endpoint will not answer this or any other request: wrong key, wrong model, wrong path."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None  # urllib would take the key along to another host


@dataclass
class Request:
    """One question to the judge.

    Attributes:
        id: of the record that is judged.
        messages: chat messages.
        read: makes a judgement of the reply's text; ValueError if there is none in it.
    """

    id: str
    messages: list[dict]
    read: Callable
    temperature: float = 0.0
    max_tokens: int = 1024


@dataclass
class Verdicts:
    """Judgements by id, the reason for every id without one, and what it took."""

    judged: dict = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    cost: dict = field(default_factory=dict)


class Judge:
    """Asks an endpoint, several requests at a time, and keeps every good reply in a file.

    Args:
        cache: JSONL file of replies; a request that is in it is not sent again.
        workers: requests at the same time.
        timeout: seconds for one request, from connection to last byte.
        attempts: for each item; between them it waits, twice as long each time, or as long as the endpoint asks for.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None,
        cache: Path,
        price: tuple[float, float] | None = None,
        workers: int = 8,
        timeout: float = 120.0,
        attempts: int = 6,
        first_wait: float = 1.0,
        longest_wait: float = 60.0,
    ):
        self.endpoint = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self._key, self.price = model, key, price
        self.cache_file, self.workers, self.timeout, self.attempts = cache, workers, timeout, attempts
        self.first_wait, self.longest_wait = first_wait, longest_wait
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock = threading.Lock()
        self._cached = {r["request"]: r["reply"] for r in read_lines(cache, torn=True)} if cache.exists() else {}
        self._refused: str | None = None
        self.counts = dict.fromkeys(("requests", "from_cache", "prompt_tokens", "completion_tokens"), 0)

    @classmethod
    def from_environment(cls, cache: Path, **settings) -> "Judge | None":
        """None where no URL is set.

        Raises:
            ValueError: a URL without a model, or a price that cannot be read.
        """
        values = {name: os.environ.get(variable) or None for name, variable in ENVIRONMENT.items()}
        if values["url"] is None:
            return None
        if values["model"] is None:
            raise ValueError(f"{ENVIRONMENT['url']} is set but {ENVIRONMENT['model']} is not; name the judging model")
        if not values["url"].startswith(("http://", "https://")):
            raise ValueError(f"{ENVIRONMENT['url']}={values['url']!r} is no URL; it looks like https://host/v1")
        price = None
        if values["price"]:
            try:
                into, out = map(float, values["price"].split("/"))
                price = (into, out)
            except ValueError as error:
                raise ValueError(f"{ENVIRONMENT['price']}={values['price']!r} is not as in 2.50/10") from error
        return cls(values["url"], values["model"], values["key"], cache, price, **settings)

    def _hide(self, text: str) -> str:
        text = text if len(text) <= 300 else text[:300] + "..."
        return text.replace(self._key, "[key]") if self._key else text

    def _send(self, body: dict) -> dict:
        """The reply as an object. OSError and ValueError: another attempt may help; else JudgeRefusedError."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.endpoint, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self.timeout
        with self._lock:
            self.counts["requests"] += 1
        with self._opener.open(request, timeout=self.timeout) as response:
            data = b""
            while chunk := response.read1(65536):
                data += chunk
                if time.monotonic() > deadline:  # the socket's own timeout starts anew with every byte
                    raise TimeoutError(f"no whole reply within {self.timeout:g} s")
        reply = json.loads(data)
        usage = reply.get("usage") if isinstance(reply, dict) else None
        if isinstance(usage, dict):
            with self._lock:
                for name in ("prompt_tokens", "completion_tokens"):
                    self.counts[name] += usage.get(name) or 0
        return reply

    def _ask(self, request: Request):
        """A judgement. Raises JudgeRefusedError or, after the last attempt, RuntimeError with the last reason."""
        body = {
            "model": self.model,
            "messages": request.messages,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
        }
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self._lock:
            known = self._cached.get(key)
        if known is not None:
            with self._lock:
                self.counts["from_cache"] += 1
            return request.read(known)
        reason = ""
        for attempt in range(self.attempts):
            if self._refused:
                raise JudgeRefusedError(self._refused)
            wait = min(self.longest_wait, self.first_wait * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                reply = self._send(body)
                text = reply["choices"][0]["message"]["content"]
                if not isinstance(text, str):
                    raise ValueError("the reply has no text")
                judgement = request.read(text)
            except urllib.error.HTTPError as error:
                text = error.read(2000).decode(errors="replace")
                reason = self._hide(f"status {error.code}: {text}")
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    # 400, 413 and 422 are about this item, the others about all of them
                    if error.code not in (400, 413, 422):
                        self._refused = reason
                    raise JudgeRefusedError(reason) from None
                asked = error.headers.get("Retry-After", "")
                if re.fullmatch(r"\d+(\.\d+)?", asked):
                    wait = min(self.longest_wait, float(asked))
            except (OSError, ValueError, KeyError, IndexError, TypeError, http.client.HTTPException) as error:
                reason = self._hide(f"{type(error).__name__}: {error}")
            else:
                with self._lock:
                    self._cached[key] = text
                    append_lines(self.cache_file, [{"request": key, "id": request.id, "reply": text}])
                return judgement
            if attempt + 1 < self.attempts:
                time.sleep(wait)
        raise RuntimeError(f"{self.attempts} attempts, the last: {reason}")

    def __call__(self, requests: list[Request]) -> Verdicts:
        """Every request ends in `judged` or in `failed`."""
        verdicts = Verdicts()

        def one(request):
            try:
                return request.id, self._ask(request), None
            except (JudgeRefusedError, RuntimeError, ValueError) as error:
                return request.id, None, str(error)

        before = dict(self.counts)
        self.cache_file.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.workers) as pool:
            for key, judgement, reason in pool.map(one, requests):
                if reason is None:
                    verdicts.judged[key] = judgement
                else:
                    verdicts.failed[key] = reason
        verdicts.cost = {name: self.counts[name] - before[name] for name in self.counts}
        if self.price:
            tokens = verdicts.cost["prompt_tokens"], verdicts.cost["completion_tokens"]
            verdicts.cost["dollars"] = round(sum(p * n for p, n in zip(self.price, tokens)) / 1e6, 6)
        return verdicts


# What is asked ---------------------------------------------------------------------------------------------------------

LLAVA_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
LLAVA_RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the image "
    "is represented with a few sentences describing the image. \nPlease rate the helpfulness, relevance, accuracy, level of "
    "details of their responses. Each assistant receives an overall score on a scale of 1 to 10, where a higher score "
    "indicates better overall performance.\nPlease first output a single line containing only two values indicating the "
    "scores for Assistant 1 and 2, respectively. The two scores are separated by a space.\nIn the subsequent line, please "
    "provide a comprehensive explanation of your evaluation, avoiding any potential bias and ensuring that the order in "
    "which the responses were presented does not affect your judgment."
)


def read_pair(reply: str) -> tuple[float, float]:
    """The two scores on the first line."""
    words = reply.strip().split("\n")[0].replace(",", " ").split()
    if len(words) != 2:
        raise ValueError(f"the first line of the reply is not two scores: {reply[:80]!r}")
    first, second = map(float, words)
    if not (0 <= first <= 10 and 0 <= second <= 10):
        raise ValueError(f"scores outside 0 to 10: {reply[:80]!r}")
    return first, second


def llava_w_request(record: dict) -> Request:
    parts = (
        f"[Context]\n{record['context']}\n\n[Question]\n{record['question']}\n\n"
        f"[Assistant 1]\n{record['reference']}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{record['pred']}\n\n[End of Assistant 2]\n\n[System]\n{LLAVA_RULE}\n\n"
    )
    messages = [{"role": "system", "content": LLAVA_SYSTEM}, {"role": "user", "content": parts}]
    return Request(str(record["id"]), messages, read_pair, temperature=0.2, max_tokens=1024)


_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and Greenland "
    "are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland is mostly covered "
    "in ice and snow. The meme is saying that the person has trust issues because the names of these countries do not "
    "accurately represent their landscapes. | "
)
MM_VET_PROMPT = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in the "
    "ground truth means it is totally right only when all elements in the ground truth are present in the prediction, and "
    "<OR> means it is totally right when any one element in the ground truth is present in the prediction. The correctness "
    "score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the "
    "last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    + _MEME
    + "The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very icy and "
    "Greenland isn't very green. | 0.4\n"
    + _MEME
    + "The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, despite its "
    "name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I have trust "
    "issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The humor in this meme "
    "is derived from the unexpected contrast between the names of the countries and their actual physical characteristics. "
    "| 1.0\n"
)


def read_correctness(reply: str) -> float:
    """The number that the reply begins with."""
    number = re.match(r"\s*\|?\s*([01](?:\.\d+)?)(?![\d.]*\d)", reply)
    if not number or float(number[1]) > 1:
        raise ValueError(f"the reply does not begin with a number from 0 to 1: {reply[:80]!r}")
    return float(number[1])


def mm_vet_request(record: dict) -> Request:
    truth = record["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    text = MM_VET_PROMPT + "\n" + " | ".join((record["question"], truth, record["pred"], ""))
    return Request(str(record["id"]), [{"role": "user", "content": text}], read_correctness, 0.0, 16)


MMBENCH_PROMPT = (
    "You are an AI assistant who will help me to match an answer with several options of a single-choice question. You are "
    "provided with a question, several options, and an answer, and you need to find which option is most similar to the "
    "answer. If the meaning of all options are significantly different from the answer, output E. Your should output a "
    "single uppercase character in A, B, C, D (if they are valid options), and E. \n"
    "Example 1: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: a cute teddy bear\nYour output: A\n"
    "Example 2: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: Spider\nYour output: E\n"
    "Example 3: \nQuestion: {question}?\nOptions: {options}\nAnswer: {answer}\nYour output: "
)


def mmbench_request(record: dict) -> Request:
    options = {k: v for k, v in record["options_dict"].items() if v != "N/A" and k in "ABCD"}
    text = MMBENCH_PROMPT.format(
        question=record["question"], options=" ".join(f"{k}. {v}" for k, v in options.items()), answer=record["pred"]
    )

    def read(reply: str) -> str:
        letter = parse_mmbench(reply, {**options, **dict.fromkeys(set("ABCD") - set(options), "\0")})
        if letter is None:
            raise ValueError(f"no option in the reply: {reply[:80]!r}")
        return letter

    return Request(str(record["id"]), [{"role": "user", "content": text}], read, 0.0, 16)
