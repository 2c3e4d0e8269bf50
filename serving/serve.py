# SPDX-License-Identifier: Apache-2.0
"""Serves a Honeybee model over the OpenAI API (chat completions).

    python serving/serve.py --model outputs/quickstart/model           # http://127.0.0.1:8000/v1/chat/completions

One model, one answer at a time, with limits on what a request may hold. Needs `pip install -e ".[serve]"`.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING

from serving.limits import ChatRequest, LimitError, Limits, add_limit_arguments, check_chat, limits_from

if TYPE_CHECKING:
    from serving.answer import Answer

CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"
logger = logging.getLogger("uvicorn.error")


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None) -> dict:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def failure(error: BaseException) -> tuple[int, dict]:
    """Status and body for what ended a request. What is not the client's fault goes into the server's log, too."""
    if isinstance(error, LimitError):
        return 400, error_body(str(error), param=error.param)
    logger.error("A request failed", exc_info=error)
    return 500, error_body(f"the answer could not be generated ({type(error).__name__}: {error})", "server_error")


class ChatServer:
    """An ASGI application that answers chats with `model`, called `name`. Answers are generated one after the other."""

    def __init__(self, model, processor, name: str, limits: Limits):
        self.model, self.processor, self.name, self.limits = model, processor, name, limits
        self.worker = ThreadPoolExecutor(max_workers=1)

    async def __call__(self, scope, receive, send):
        method, path = scope["method"], scope["path"]
        if (method, path) == ("GET", HEALTH):
            return await self.reply(send, 200, {"status": "ok"})
        if (method, path) == ("GET", MODELS):
            listed = {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}
            return await self.reply(send, 200, {"object": "list", "data": [listed]})
        if (method, path) != ("POST", CHAT):
            return await self.reply(send, 404, error_body(f"{method} {path} is not served here; use POST {CHAT}"))

        content, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            content += message.get("body", b"")
            more = message.get("more_body", False)
            if len(content) > self.limits.max_body_bytes:
                words = f"the request is larger than {self.limits.max_body_bytes:,} bytes, the limit"
                return await self.reply(send, 413, error_body(words))
        try:
            # In a thread: large images must not hold up the other clients.
            request = await asyncio.to_thread(self.check, content)
        except Exception as error:
            return await self.reply(send, *failure(error))
        await self.chat(request, receive, send)

    def check(self, content: bytearray) -> ChatRequest:
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise LimitError(f"the request is not valid JSON ({error})") from error
        return check_chat(body, self.name, self.limits)

    async def chat(self, request: ChatRequest, receive, send):
        """Generates in the worker's thread and sends, until all is sent, something fails or the client leaves."""
        from serving.answer import Answer

        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        answer = Answer(self.model, self.processor, request)

        def emit(event: str | BaseException | None):
            loop.call_soon_threadsafe(events.put_nowait, event)

        async def watch():
            while (await receive())["type"] != "http.disconnect":
                pass
            answer.cancelled = True

        watcher = asyncio.create_task(watch())
        self.worker.submit(answer.run, emit)
        try:
            await (self.stream if request.stream else self.whole)(answer, events, send)
        finally:
            answer.cancelled = True
            watcher.cancel()

    async def whole(self, answer: "Answer", events: asyncio.Queue, send):
        while isinstance(event := await events.get(), str):
            pass
        if event is not None:
            return await self.reply(send, *failure(event))
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        head = self.head("chat.completion")
        await self.reply(send, 200, {**head, "choices": [choice], "usage": usage(answer)})

    async def stream(self, answer: "Answer", events: asyncio.Queue, send):
        """Server-sent events. What fails before the first token still has its own status."""
        event = await events.get()
        if isinstance(event, BaseException):
            return await self.reply(send, *failure(event))
        head = self.head("chat.completion.chunk")
        with_usage = answer.request.stream_options.get("include_usage", False)

        async def push(data: dict | str):
            text = data if isinstance(data, str) else json.dumps(data)
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        async def chunk(delta: dict, finish_reason: str | None = None):
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            await push({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await chunk({"role": "assistant", "content": ""})
        while isinstance(event, str):
            await chunk({"content": event})
            event = await events.get()
        if event is None:
            await chunk({}, answer.finish_reason)
            if with_usage:
                await push({**head, "choices": [], "usage": usage(answer)})
        else:
            await push(failure(event)[1])
        await push("[DONE]")
        await send({"type": "http.response.body", "body": b""})

    def head(self, kind: str) -> dict:
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}

    @staticmethod
    async def reply(send, status: int, content: dict):
        data = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": data})


def usage(answer: "Answer") -> dict:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def main():
    # Waiting threads of torch would spin and take the core from the one that they wait for, wherever other work runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder or Hub name of a Honeybee model")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda:0, ... (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="(default: as it was saved)"
    )
    parser.add_argument("--attn_implementation", help="sdpa, eager, flash_attention_2, ... (default: what there is)")
    add_limit_arguments(parser)
    args = parser.parse_args()
    if find_spec("uvicorn") is None:
        sys.exit('error: the server needs uvicorn; install with: pip install -e ".[serve]"')
    try:
        limits = limits_from(args)
        # Only here: these load for seconds.
        from modeling_honeybee import HoneybeeForConditionalGeneration
        from modeling_honeybee.model_folder import model_folder
        from modeling_honeybee.processes import use_attention_for_any_shape
        from processing import HoneybeeProcessor, check_processor

        use_attention_for_any_shape()
        folder = model_folder(args.model)
        model = HoneybeeForConditionalGeneration.from_pretrained(
            folder, dtype=args.dtype, device_map=args.device, attn_implementation=args.attn_implementation
        ).eval()
        processor = HoneybeeProcessor.from_pretrained(folder)
        check_processor(model.config, processor)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:  # the first for a torch without CUDA
        sys.exit(f"error: {error}")

    import uvicorn

    print(f"Serving {args.model} on http://{args.host}:{args.port}{CHAT}", flush=True)
    uvicorn.run(
        ChatServer(model, processor, args.model, limits),
        host=args.host,
        port=args.port,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    main()
