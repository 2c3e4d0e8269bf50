# SPDX-License-Identifier: Apache-2.0
"""Judgements by a language model behind any OpenAI-compatible endpoint, for the tasks that cannot be scored by rules.

The endpoint is given in the environment:

    HONEYBEE_JUDGE_URL     base URL, as in https://api.openai.com/v1
    HONEYBEE_JUDGE_MODEL   name of the model; the official scores are GPT-4's
    HONEYBEE_JUDGE_KEY     key, where the endpoint wants one; it is sent, and never written anywhere
    HONEYBEE_JUDGE_PRICE   optional, dollars for a million tokens in and out, as in 2.50/10

What is asked about an answer, and how the reply is read, is in the task's own file, as the benchmark's own script has it.
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

from evaluation.json_files import append_lines, read_lines

ENVIRONMENT = {name: f"HONEYBEE_JUDGE_{name.upper()}" for name in ("url", "model", "key", "price")}


class NotJudgedError(Exception):
    """The endpoint gave no judgement; the text is the reason."""


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
        """The reply as an object. OSError and ValueError: another attempt may help."""
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
        """A judgement.

        Raises:
            NotJudgedError: the endpoint refused, or the last attempt failed.
            ValueError: a cached reply that cannot be read.
        """
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
                raise NotJudgedError(self._refused)
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
                    raise NotJudgedError(reason) from None
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
        raise NotJudgedError(f"{self.attempts} attempts, the last: {reason}")

    def __call__(self, requests: list[Request]) -> Verdicts:
        """Every request ends in `judged` or in `failed`."""
        verdicts = Verdicts()

        def one(request):
            try:
                return request.id, self._ask(request), None
            except (NotJudgedError, ValueError) as error:
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
