# SPDX-License-Identifier: Apache-2.0
"""Serves a Honeybee model over the OpenAI API with `transformers serve`.

    python serving/serve.py --model outputs/quickstart/model           # http://127.0.0.1:8000/v1/chat/completions

`transformers serve` looks a model's class up by name in transformers, where ours is not; this registers it and then
runs the command, for one model and with limits on what a request may hold. Needs `pip install -e ".[serve]"`. Flags
that are not listed here go to `transformers serve` (`--device cuda:0`, `--dtype bfloat16`).
"""

import argparse
import json
import os
import sys
from importlib.metadata import entry_points, version
from importlib.util import find_spec

from serving.limits import LimitError, Limits, add_limit_arguments, limits_from

TRANSFORMERS_4 = version("transformers").startswith("4.")
# Everything else of `transformers serve` stays closed: one address loads any model by name, another unloads ours.
CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"
# Not in it: `generation_config` and `chat_template_kwargs`, which would set any limit aside, and what a chat here has
# no use for (tools, audio).
FIELDS = {
    "model", "messages", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop",
    "frequency_penalty",
}  # fmt: skip


def check_chat(body: dict, model: str, limits: Limits) -> dict:
    """The request as `transformers serve` gets it.

    Raises:
        LimitError: what it may not hold.
    """
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise LimitError('the request must be a JSON object with a list of at least one message under "messages"')
    if unknown := sorted(set(body) - FIELDS):
        raise LimitError(f"fields that this server does not take: {', '.join(unknown)}")
    if body.get("model", model) not in (model, f"{model}@main"):  # the second is what the command's replies say
        raise LimitError(f"this server has one model, {model!r}, and not {body['model']!r}")
    images, characters = 0, 0
    for message in body["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, (str, list)) or message.get("role") not in ("system", "user", "assistant"):
            raise LimitError("a message needs a role (system, user or assistant) and content (text or a list of items)")
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = item.get("type") if isinstance(item, dict) else None
            if kind == "text" and isinstance(item.get("text"), str):
                characters += len(item["text"])
            elif kind == "image_url" and message["role"] == "user":
                images += 1
                limits.check_counts(images, characters)
                url = item.get("image_url")
                limits.check_data_url(url.get("url") if isinstance(url, dict) else url)
            else:
                raise LimitError("content items are of type text, and in user messages also image_url")
    limits.check_counts(images, characters)
    asked = (body.pop("max_completion_tokens", None), body.get("max_tokens"), limits.max_new_tokens)
    wanted = next(value for value in asked if value is not None)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= limits.max_new_tokens:
        raise LimitError(f"max_tokens={wanted!r} must be a whole number from 1 to {limits.max_new_tokens}")
    return {**body, "model": model, "max_tokens": wanted}


class LimitedApp:
    """An ASGI application in front of another one: three addresses, requests within `limits`, OpenAI's errors."""

    def __init__(self, app, model: str, limits: Limits):
        self.app, self.model, self.limits = app, model, limits

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        method, path = scope["method"], scope["path"]
        if path == HEALTH and method == "GET":
            return await self.app(scope, receive, send)
        if path == MODELS and method == "GET":
            listed = {"id": self.model, "object": "model", "created": 0, "owned_by": "local"}
            return await self.answer(send, 200, {"object": "list", "data": [listed]})
        if path != CHAT or method != "POST":
            return await self.refuse(send, 404, f"{method} {path} is not served here; use POST {CHAT}")

        content, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            content += message.get("body", b"")
            more = message.get("more_body", False)
            if len(content) > self.limits.max_body_bytes:
                return await self.refuse(
                    send, 413, f"the request is larger than {self.limits.max_body_bytes:,} bytes, the limit"
                )
        try:
            body = check_chat(json.loads(content), self.model, self.limits)
        except LimitError as error:
            return await self.refuse(send, 400, str(error))
        except (ValueError, RecursionError) as error:
            return await self.refuse(send, 400, f"the request is not valid JSON ({error})")
        content = json.dumps(body).encode()
        replaced = {b"content-length": str(len(content)).encode(), b"content-type": b"application/json"}
        headers = [(name, value) for name, value in scope["headers"] if name not in (*replaced, b"transfer-encoding")]
        sent = False

        async def replay():
            nonlocal sent
            if sent:
                return await receive()  # waits for the client to leave
            sent = True
            return {"type": "http.request", "body": content, "more_body": False}

        await self.app({**scope, "headers": [*headers, *replaced.items()]}, replay, send)

    async def refuse(self, send, status: int, message: str):
        kind = "invalid_request_error"
        await self.answer(send, status, {"error": {"message": message, "type": kind, "param": None, "code": status}})

    @staticmethod
    async def answer(send, status: int, content: dict):
        data = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": data})


def register() -> None:
    """Makes transformers find our classes by the names that `transformers serve` looks up. Comes after its import."""
    from transformers import AutoProcessor
    from transformers.models.auto import modeling_auto

    from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration
    from processing import HoneybeeProcessor

    # The module object itself changes while transformers 5 is imported; the command sees the one in sys.modules.
    sys.modules["transformers"].HoneybeeForConditionalGeneration = HoneybeeForConditionalGeneration
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["honeybee"] = HoneybeeForConditionalGeneration.__name__
    AutoProcessor.register(HoneybeeConfig, HoneybeeProcessor, exist_ok=True)
    if TRANSFORMERS_4:
        from transformers.commands.serving import ServeCommand

        # It would go on from the cache of the last request, whose generated tokens need not be those of the same text.
        ServeCommand.is_continuation = lambda self, request: False


def limit_uvicorn(model: str, limits: Limits) -> None:
    """Puts [`LimitedApp`] before whatever application uvicorn is given: the command takes none from outside."""
    import uvicorn

    original = uvicorn.Config.__init__

    def limited(self, app, *args, **kwargs):
        original(self, LimitedApp(app, model, limits), *args, **kwargs)

    uvicorn.Config.__init__ = limited


def main():
    # Waiting threads of torch would spin and take the core from the one that they wait for, wherever other work runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder or Hub name of a Honeybee model")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    add_limit_arguments(parser)
    args, more = parser.parse_known_args()
    try:
        limits = limits_from(args)
        from modeling_honeybee.model_folder import model_folder  # loads for seconds

        model_folder(args.model)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if missing := [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if find_spec(name) is None]:
        sys.exit(f'error: `transformers serve` needs {", ".join(missing)}; install with: pip install -e ".[serve]"')

    (command,) = entry_points(group="console_scripts", name="transformers")
    run = command.load()
    register()
    limit_uvicorn(args.model, limits)
    # 4.57 names the model by a flag, 5 by position.
    named = ["--force_model", args.model] if TRANSFORMERS_4 else [args.model]
    sys.argv = ["transformers", "serve", *named, "--host", args.host, "--port", str(args.port), *more]
    print(f"Serving {args.model} on http://{args.host}:{args.port}{CHAT}", flush=True)
    run()


if __name__ == "__main__":
    main()
