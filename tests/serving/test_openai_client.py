# SPDX-License-Identifier: Apache-2.0
"""The official client against the server, over HTTP: each field of its `chat.completions.create`, and what goes wrong."""

import asyncio
import base64
import http.client
import inspect
import io
import json
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from serving.answer import Answer
from serving.limits import FIELDS, ChatRequest, Limits
from serving.serve import ChatServer
from tests.tiny import ELASTIC, byte_tokenizer, elastic_processor, picture, tiny_model, tiny_processor

openai = pytest.importorskip("openai", reason='needs openai: pip install -e ".[test]"')
uvicorn = pytest.importorskip("uvicorn", reason='needs uvicorn: pip install -e ".[serve]"')

EOS = 2
ASK = [{"role": "user", "content": "What is in the picture ?"}]
LIMITS = Limits(max_new_tokens=400, max_prompt_chars=2_000, max_image_bytes=20_000)


@contextmanager
def served(model, processor):
    server = uvicorn.Server(
        uvicorn.Config(ChatServer(model, processor, "tiny", LIMITS), port=0, lifespan="off", log_level="warning")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    settings = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none", "max_retries": 0, "timeout": 20}
    yield SimpleNamespace(
        model=model,
        processor=processor,
        port=port,
        settings=settings,
        create=openai.OpenAI(**settings).chat.completions.create,
    )
    server.should_exit = True
    thread.join(timeout=20)


@pytest.fixture(scope="module")
def world():
    processor = tiny_processor()
    with served(tiny_model(config={"image_token_id": processor.image_token_id}), processor) as world:
        yield world


def ask(world, messages=ASK, **fields):
    """The client's reply, without fields that are not given."""
    return world.create(**{"model": "tiny", "messages": messages, "max_tokens": 6, **fields})


def said(world, messages=ASK, **fields) -> str:
    return ask(world, messages, **fields).choices[0].message.content


def streamed(world, messages=ASK, **fields) -> tuple[str, list]:
    chunks = list(ask(world, messages, stream=True, **fields))
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks


def post(world, body, path="/v1/chat/completions") -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=20)
    connection.request("POST", path, body if isinstance(body, (bytes, str)) else json.dumps(body))
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content)


def generated(world, **settings) -> tuple[str, list[int]]:
    """What `generate` itself says to `ASK`."""
    prompt = world.processor.apply_chat_template(ASK, add_generation_prompt=True)
    inputs = world.processor(text=prompt, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        ids = world.model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
    return world.processor.tokenizer.decode(ids, skip_special_tokens=True), ids


def check_reply(reply, model, processor, inputs) -> None:
    """That a reply of at most six tokens is what the model generates from these inputs."""
    prompt_tokens = inputs["input_ids"].shape[1]
    assert reply.usage.prompt_tokens == prompt_tokens
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, prompt_tokens:]
    assert reply.choices[0].message.content == processor.tokenizer.decode(ids, skip_special_tokens=True)


def image_item(size=(40, 24), **more) -> dict:
    file = io.BytesIO()
    picture(size=size).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url, **more}}


def user(*items) -> list[dict]:
    return [{"role": "user", "content": list(items)}]


TEXT = {"type": "text", "text": "a dog ?"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

# Of each field: values that leave the answer as it is without it, and values that are refused.
VALUES = {
    "model": (["tiny", None], ["other", 3, ["tiny"]]),
    "messages": ([], [None, [], "a dog ?", {}, ["a dog ?"], [None]]),
    "stream": ([False, None], [1, "true"]),
    "stream_options": ([None, {}, {"include_usage": False}], [{"include_usage": 1}, {"other": True}, True, []]),
    "max_tokens": ([6], [0, -1, 401, 6.5, 6.0, "6", True, 10**30]),
    "max_completion_tokens": ([None, 6], [0, 401, "6", False]),
    "temperature": ([None, 0, 0.0, 1e-9], [-0.1, 2.1, "0", True, [0], 1e300]),
    "top_p": ([None, 1, 1.0], [-0.1, 1.1, "1", True]),
    "seed": ([None, 0, -1, 2**63 - 1, -(2**63)], [2**63, 0.5, "0", True]),
    "stop": ([None, [], "never said", ["never said"] * 4, "*" * 300_000], ["", [""], ["a"] * 5, 3, [None], {"a": 1}]),
    "frequency_penalty": ([None, 0, 0.0], [2.1, -2.1, "0", True]),
    "presence_penalty": ([None, 0, 0.0], [2.1, -2.1, "0", False]),
    "logit_bias": ([None, {}, {"5": 0}], [{"5": 101}, {"5": "1"}, {"a": 1}, {"-1": 1}, {"100000": 1}, {"9" * 5000: 1}, [1]]),
    "n": ([None, 1], [0, 2, "1", True, 1.5]),
    "logprobs": ([None, False], [True, 0]),
    "top_logprobs": ([None, 0], [1, False]),
    "response_format": ([None, {"type": "text"}], [{"type": "json_object"}, "text", {}]),
    "modalities": ([None, ["text"]], [["audio"], ["text", "audio"], "text"]),
    "tools": ([None, []], [[TOOL], {}, "x"]),
    "tool_choice": ([None, "none", "auto"], ["required", {"type": "function", "function": {"name": "f"}}]),
    "functions": ([None, []], [[{"name": "f"}]]),
    "function_call": ([None, "none", "auto"], [{"name": "f"}]),
    "parallel_tool_calls": ([None, True, False], ["yes"]),
    "reasoning_effort": ([None, "none"], ["low", "high", 1]),
    "verbosity": ([None, "medium"], ["low", "high"]),
    "service_tier": ([None, "auto", "default"], ["flex", "priority", 1]),
    "store": ([None, False], [True]),
    "user": ([None, "", "somebody"], [3, ["somebody"]]),
    "safety_identifier": ([None, "somebody"], [3]),
    "num_query_tokens": ([None, 4, []], [0, -1, 2.5, "4", True, [0], ["4"], [4], {}]),
    "max_visual_tokens": ([None, 1, 10_000], [0, -1, 2.5, "4", True, [4]]),
    "max_crops": ([None, 1, 4, []], [0, -1, 2.5, "4", True, [0], ["4"], [4], {}, 10**9]),
    "metadata": ([None, {}, {"run": "1"}], ["run", ["run"]]),
    "prompt_cache_key": ([None, "key"], [3]),
    "prompt_cache_retention": ([None, "in_memory", "24h"], [24]),
    "prompt_cache_options": ([None, {}, {"mode": "implicit"}], ["implicit"]),
}  # fmt: skip
SIGNATURE = [
    name
    for name in inspect.signature(openai.resources.chat.completions.Completions.create).parameters
    if name not in ("self", "extra_headers", "extra_query", "extra_body", "timeout")
]


@pytest.mark.parametrize("name", sorted({*SIGNATURE, *VALUES}))
def test_each_field_of_the_client(world, name):
    """Fields that are not in the table, those of newer clients among them, are refused with any value."""
    harmless, refused = VALUES.get(name, ([None], ["x", 1, True, [], {}, {"type": "x"}]))
    plain = {"model": "tiny", "messages": ASK, "max_tokens": 6}
    answer = said(world)
    for value in harmless:
        assert said(world, extra_body={name: value}) == answer, value
    for value in refused:
        for stream in [False] if name == "stream" else [False, True]:
            status, reply = post(world, {**plain, "stream": stream, name: value})
            error = reply["error"]
            assert (status, set(error)) == (400, {"message", "type", "param", "code"}), (value, error)
            assert error["type"] == "invalid_request_error" and len(error["message"]) < 400
            assert error["param"] == name and (name in error["message"] or name == "messages")


def test_the_table_is_whole():
    assert {*FIELDS, "model", "messages", "max_tokens", "max_completion_tokens"} == set(VALUES)


def test_values_of_any_type_never_break_it(world):
    odd = ["x" * 10_000, "\ud800", -1, 0.5, 10**40, 1e308, True, [], [[[]]], [None], {}, {"": None}, {"a": {"b": [1]}}, "<image>"]  # fmt: skip
    started = time.monotonic()
    for name in [*set(VALUES) - {"stream"}, "unknown", ""]:
        for value in odd:
            status, reply = post(world, {"messages": ASK, "max_tokens": 1, name: value})
            assert status in (200, 400), (name, value, reply)
            assert "choices" in reply if status == 200 else reply["error"]["message"]
    assert time.monotonic() - started < 60
    assert said(world)


def test_the_client_calls_with_its_own_arguments(world):
    """As typed arguments, not as an extra body: what applications write."""
    reply = world.create(
        model="tiny", messages=ASK, max_completion_tokens=6, n=1, user="somebody", presence_penalty=0, frequency_penalty=0,
        tools=[], tool_choice="auto", logprobs=False, store=False, response_format={"type": "text"}, temperature=0, seed=3,
        metadata={"run": "1"}, service_tier="auto", parallel_tool_calls=True, timeout=20, extra_headers={"x-a": "b"},
        extra_query={"c": "d"},
    )  # fmt: skip
    text, ids = generated(world, max_new_tokens=6, do_sample=False)
    assert reply.choices[0].message.content == text
    assert reply.usage.completion_tokens == len(ids)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + len(ids)
    assert reply.object == "chat.completion" and reply.model == "tiny" and reply.id.startswith("chatcmpl-")
    with openai.OpenAI(**world.settings).chat.completions.stream(model="tiny", messages=ASK, max_tokens=6) as stream:
        assert len(list(stream)) > 2
        assert stream.current_completion_snapshot.choices[0].message.content == text


def test_max_tokens_and_the_reason_of_the_end(world):
    reply = ask(world, max_tokens=3, logit_bias={str(EOS): -100})
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (3, "length")
    assert ask(world, max_completion_tokens=2, max_tokens=5, logit_bias={str(EOS): -100}).usage.completion_tokens == 2
    reply = ask(world, logit_bias={str(EOS): 100})
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (1, "stop")
    assert reply.choices[0].message.content == ""
    _, chunks = streamed(world, max_tokens=3, logit_bias={str(EOS): -100})
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_logit_bias(world):
    token = world.processor.tokenizer.convert_tokens_to_ids("g")
    assert said(world, logit_bias={str(token): 100}) == "gggggg"
    blocked = {str(number): -100 for number in range(300)}  # all alike, the first token too
    assert said(world, logit_bias=blocked) == said(world)
    assert said(world, logit_bias={**blocked, str(token): -1}) == "gggggg"
    assert ask(world, logit_bias={"0": 100}).usage.completion_tokens == 6


def test_a_checkpoints_own_stop_strings_end_the_answer(world, monkeypatch):
    long = {"max_tokens": 40, "logit_bias": {str(EOS): -100}}
    text = said(world, **long)
    monkeypatch.setattr(world.model.generation_config, "stop_strings", [text[3:6]])
    reply = ask(world, **long).choices[0]
    said_until = text.index(text[3:6]) + 3  # and on to the end of its token
    assert text.startswith(reply.message.content) and said_until <= len(reply.message.content) < len(text)
    assert reply.finish_reason == "stop"


def test_stop_ends_the_answer_before_it(world):
    text, _ = generated(world, max_new_tokens=40, do_sample=False, sequence_bias=[[[EOS], -100.0]])
    long = {"max_tokens": 40, "logit_bias": {str(EOS): -100}}
    assert said(world, **long) == streamed(world, **long)[0] == text and len(text) > 15
    for at, length in ((0, 1), (5, 1), (7, 4), (len(text) // 2, 9), (len(text) - 3, 3)):
        stop = text[at : at + length]
        before = text[: text.index(stop)]
        for value in (stop, [stop], ["never said", stop], [stop, stop + "x"]):
            reply = ask(world, stop=value, **long)
            assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (before, "stop")
            assert reply.usage.completion_tokens <= 40
            got, chunks = streamed(world, stop=value, **long)
            assert got == before and chunks[-1].choices[0].finish_reason == "stop"
    assert ask(world, stop=text[:1], **long).usage.completion_tokens < 5  # generation stops, it is not just cut
    # The beginning of a stop text that does not go on is part of the answer.
    assert said(world, stop=text[-2:] + "x", **long) == streamed(world, stop=text[-2:] + "x", **long)[0] == text


def test_sampling_is_generates(world):
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "max_tokens": 12}
    torch.manual_seed(7)
    text, _ = generated(world, max_new_tokens=12, do_sample=True, temperature=1.5, top_p=0.9, top_k=0)
    assert said(world, **settings) == said(world, **settings) == streamed(world, **settings)[0] == text
    assert len({said(world, **{**settings, "seed": seed}) for seed in range(4)}) == 4
    unseeded = [(said(world, **settings), said(world, temperature=1.5, max_tokens=12))[1] for _ in range(4)]
    assert len(set(unseeded)) == 4  # another each time, after a request with a seed as well
    torch.manual_seed(7)
    text, _ = generated(world, max_new_tokens=12, do_sample=True, temperature=1.0, top_p=0.5, top_k=0)
    assert said(world, top_p=0.5, seed=7, max_tokens=12) == text
    assert said(world, temperature=2, top_p=0, seed=1) == said(world, temperature=1e-9, seed=1) == said(world)


@pytest.mark.parametrize(("frequency", "presence"), [(1.5, 0), (0, 2), (-2, 0), (0.7, -0.5)])
def test_penalties(world, frequency, presence):
    prompt = world.processor.apply_chat_template(ASK, add_generation_prompt=True)
    ids = world.processor(text=prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    answer = []
    blocked = world.model.generation_config.suppress_tokens or []
    while len(answer) < 20 and answer[-1:] != [EOS]:
        with torch.inference_mode():
            logits = world.model(input_ids=torch.tensor([[*ids[0].tolist(), *answer]])).logits[0, -1].tolist()
        for token in set(answer):
            logits[token] -= frequency * answer.count(token) + presence
        answer.append(max(set(range(len(logits))) - set(blocked), key=logits.__getitem__))
    text = world.processor.tokenizer.decode(answer, skip_special_tokens=True)
    assert said(world, frequency_penalty=frequency, presence_penalty=presence, max_tokens=20) == text
    assert text != said(world, max_tokens=20)


def test_usage_of_a_stream(world):
    whole = ask(world)
    text, chunks = streamed(world, stream_options={"include_usage": True})
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in streamed(world)[1])


def test_replies_go_back_into_the_history(world):
    history = [*user(image_item(detail="high"), TEXT)]
    first = ask(world, history).choices[0].message
    shapes = [
        first,
        first.model_dump(),
        first.model_dump(exclude_none=True),
        {"role": "assistant", "content": first.content, "refusal": None, "annotations": [], "audio": None,
         "function_call": None, "tool_calls": None, "reasoning_content": None, "name": "bee"},
        {"role": "assistant", "content": [{"type": "text", "text": first.content}]},
    ]  # fmt: skip
    answers = {said(world, [*history, shape, {"role": "user", "content": "and now ?"}]) for shape in shapes}
    assert len(answers) == 1
    assert said(world, [*history, {"role": "assistant", "content": None}, *ASK])


def test_messages_that_are_taken(world):
    assert said(world, user({"type": "text", "text": ASK[0]["content"]})) == said(world)
    assert said(world, [{**ASK[0], "name": "somebody"}]) == said(world)
    system = [{"role": "system", "content": "Say a word ."}, *ASK]
    assert said(world, system) == said(world, [{**system[0], "role": "developer"}, *ASK])
    assert said(world, [{"role": "system", "content": [{"type": "text", "text": "Say a word ."}]}, *ASK]) == said(
        world, system
    )
    assert said(world, user(image_item(), TEXT)) == said(
        world, user({**image_item(), "image_url": image_item()["image_url"]["url"]}, TEXT)
    )
    assert said(world, [*ASK, {"role": "assistant", "content": "a"}])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([*ASK, {"role": "system", "content": "x"}], "messages[1] is a system message; only the first message can be one"),
        ([{"role": "system", "content": "x"}] * 2, "messages[1] is a system message"),
        ([*ASK, {"role": "developer", "content": "x"}], "messages[1] is a system message"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "needs a role"),
        ([{"role": "function", "name": "f", "content": "x"}], "needs a role"),
        ([{"role": ["user"], "content": "x"}], "needs a role"),
        ([{"content": "x"}], "needs a role"),
        ([*ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "does not take: tool_calls"),
        ([*ASK, {"role": "assistant", "content": None, "refusal": "no"}], "does not take: refusal"),
        ([{"role": "user", "content": None}], "messages[0].content must be a text or a list"),
        ([{"role": "user"}], "messages[0].content must be"),
        ([{"role": "user", "content": []}], "messages[0].content must be"),
        ([{"role": "user", "content": 3}], "messages[0].content must be"),
        ([{"role": "user", "content": ["x"]}], "content items are of type text"),
        (user({"type": "input_audio", "input_audio": {}}), "content items are of type text"),
        (user({"type": "text"}), "must be a text"),
        (user({"type": "text", "text": 3}), "must be a text"),
        (user({"type": "text", "text": "x", "continues": True}), "does not take: continues"),
        (user({"type": "image_url"}), "must be a URL"),
        (user(image_item(detail="best")), "detail='best' must be auto, low or high"),
        (user(image_item(max_pixels=1)), "does not take: max_pixels"),
        ([{"role": "assistant", "content": [image_item()]}], "content items are of type text"),
        ([{"role": "user", "content": "\ud800"}], "valid Unicode"),
        ([{"role": "user", "content": "x", "name": 3}], "name must be a text"),
        (ASK * 40, "tokens, images included; the model's context is 512"),
        (user(*[image_item()] * 8, *[TEXT] * 200), "tokens, images included"),
    ],
)  # fmt: skip
def test_messages_that_are_refused(world, messages, words):
    for stream in (False, True):
        status, reply = post(world, {"messages": messages, "max_tokens": 2, "stream": stream})
        assert (status, reply["error"]["param"]) == (400, "messages") and words in reply["error"]["message"]


def test_an_image_with_a_sound_header_and_broken_pixels(world):
    file = io.BytesIO()
    picture(size=(60, 60)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()[:2_000]).decode()
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="image"):
            ask(world, user({"type": "image_url", "image_url": {"url": url}}, TEXT), stream=stream)


def test_the_clients_other_calls(world):
    client = openai.OpenAI(**world.settings)
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="is not served here; use POST /v1/chat/completions"):
        client.responses.create(model="tiny", input="x")


@pytest.mark.parametrize(
    "body", ["", "{", "null", "[]", '"x"', b"\xff\xfe\x00", "[" * 100_000, "1" * 10_000, '{"messages": NaN}']
)
def test_bodies_that_are_no_request(world, body):
    status, reply = post(world, body)
    assert status == 400 and reply["error"]["message"]


def test_a_short_context_shortens_the_answer(world):
    reply = ask(world, max_tokens=400, messages=ASK * 15, logit_bias={str(EOS): -100})
    assert reply.usage.total_tokens == 512 and reply.choices[0].finish_reason == "length"


class Panic(BaseException):
    """As native code raises it: no Exception."""


@contextmanager
def failing(world, call: int, kind: type[BaseException]):
    """The model fails in the given forward pass from now."""
    calls = iter(range(1_000))

    def fail(*_):
        if next(calls) == call:
            raise kind('out of memory "here"\nand there')

    handle = world.model.lm_head.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(("call", "kind"), [(0, RuntimeError), (3, RuntimeError), (3, Panic)])
def test_a_failure_while_generating(world, call, kind):
    long = {"logit_bias": {str(EOS): -100}, "max_tokens": 6}
    before = said(world, **long)
    with failing(world, call, kind), pytest.raises(openai.InternalServerError, match="out of memory") as caught:
        ask(world, **long)
    assert caught.value.type == "server_error" and caught.value.body["param"] is None
    with failing(world, call, kind), pytest.raises(openai.APIError, match="out of memory") as caught:
        streamed(world, **long)
    assert caught.value.type == "server_error"
    assert isinstance(caught.value, openai.InternalServerError) == (call == 0)  # its own status before the first token
    assert said(world, **long) == before


def test_several_clients_at_once(world):
    cases = [{"seed": seed, "temperature": 1.5, "max_tokens": 10} for seed in range(6)] + [
        {"messages": user(image_item(), TEXT)}
    ]
    alone = [said(world, **case) for case in cases]

    async def together():
        async with openai.AsyncOpenAI(**world.settings) as client:
            tasks = [
                client.chat.completions.create(**{"model": "tiny", "messages": ASK, "max_tokens": 6, **c})
                for c in cases * 3
            ]
            return [reply.choices[0].message.content for reply in await asyncio.gather(*tasks)]

    assert asyncio.run(together()) == alone * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_model(world, stream):
    calls = []

    def slowly(*_):
        calls.append(1)
        time.sleep(0.02)

    handle = world.model.lm_head.register_forward_pre_hook(slowly)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=20)
        body = {"messages": ASK, "max_tokens": 400, "stream": stream, "logit_bias": {str(EOS): -100}}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        if stream:
            assert connection.getresponse().read(10)
        while len(calls) < 3:
            time.sleep(0.01)
        connection.sock.close() if connection.sock else None
        connection.close()
        started = time.monotonic()
        assert said(world, max_tokens=1)
        assert time.monotonic() - started < 4 and len(calls) < 200
    finally:
        handle.remove()


def test_half_characters_are_not_streamed():
    tokenizer = byte_tokenizer()
    text = "蜂 🐝 é !"
    answer = Answer(None, SimpleNamespace(tokenizer=tokenizer), ChatRequest([], [], 99, stop=["é"]))
    parts = []
    answer.emit = parts.append
    ids = tokenizer(text)["input_ids"]
    for end in range(1, len(ids) + 1):
        answer.read(ids[:end])
    assert "".join(parts) == answer.text == "蜂 🐝 " and answer.stopped and len(parts) > 2
    assert "\ufffd" not in "".join(parts)


@pytest.fixture(scope="module")
def elastic():
    """A model whose images can have 4, 9 or 16 visual tokens, and one more."""
    processor = elastic_processor()
    with served(tiny_model(config={"image_token_id": processor.image_token_id}, **ELASTIC), processor) as world:
        yield world


@pytest.mark.parametrize(
    ("details", "fields", "numbers"),
    [
        ([None, None], {}, [9, 9]),
        (["low", "high"], {}, [4, 16]),
        (["auto", "low"], {}, [9, 4]),
        ([None, None], {"num_query_tokens": 16}, [16, 16]),
        ([None, "low"], {"num_query_tokens": 16}, [16, 4]),
        ([None, None], {"num_query_tokens": [16, 4]}, [16, 4]),
        ([None, None], {"max_visual_tokens": 33}, [9, 9]),
        (["high", None], {"max_visual_tokens": 33}, [16, 9]),
    ],
)
def test_visual_tokens_of_an_image(elastic, details, fields, numbers):
    messages = user(*(image_item(**({"detail": detail} if detail else {})) for detail in details), TEXT)
    reply = ask(elastic, messages, extra_body=fields)
    processor, images = elastic.processor, [picture()] * 2
    own = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, TEXT]}]
    prompt = processor.apply_chat_template(own, add_generation_prompt=True)
    asked = {"images": images, "text": prompt, "num_query_tokens": numbers, "add_special_tokens": False}
    inputs = processor(**asked, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == sum(numbers) + 2
    check_reply(reply, elastic.model, processor, inputs)


@pytest.mark.parametrize(
    ("fields", "words", "param"),
    [
        ({"num_query_tokens": 25}, "trained for 4, 9, 16 visual tokens", "num_query_tokens"),
        ({"num_query_tokens": 5}, "trained for 4, 9, 16 visual tokens", "num_query_tokens"),
        ({"num_query_tokens": [4]}, "lists 1 numbers, but there are 2 images", "num_query_tokens"),
        ({"max_visual_tokens": 9}, "the 2 images of the prompt need at least 10", "max_visual_tokens"),
    ],
)
def test_visual_tokens_that_are_refused(elastic, fields, words, param):
    body = {"messages": user(image_item(), image_item(), TEXT), "max_tokens": 2, **fields}
    status, reply = post(elastic, body)
    assert status == 400 and words in reply["error"]["message"] and reply["error"]["param"] == param


@pytest.fixture(scope="module")
def cutting():
    """The elastic model with a processor that cuts: 64 x 64 pixels into 4 crops and an overview."""
    processor = elastic_processor()
    processor.max_crops = 4
    with served(tiny_model(config={"image_token_id": processor.image_token_id}, **ELASTIC), processor) as world:
        yield world


LARGE, WIDE, SMALL = (64, 64), (64, 32), (40, 24)


@pytest.mark.parametrize(
    ("sizes", "details", "fields", "crops", "tokens"),
    [
        ([LARGE], [None], {}, [5], 5 * 10),
        ([LARGE, SMALL], [None, None], {}, [5, 1], 6 * 10),
        ([LARGE, LARGE], ["low", "high"], {}, [1, 5], 5 + 5 * 17),
        ([LARGE, LARGE], [None, None], {"max_crops": 1}, [1, 1], 2 * 10),
        ([WIDE, LARGE], [None, None], {"max_crops": [2, 1], "num_query_tokens": 4}, [3, 1], 4 * 5),
        ([LARGE], [None], {"max_visual_tokens": 49}, [5], 5 * 5),
        ([LARGE] * 3, [None] * 3, {}, [1, 1, 1], 3 * 10),
    ],
)
def test_crops_of_an_image(cutting, sizes, details, fields, crops, tokens):
    items = [image_item(size, **({"detail": d} if d else {})) for size, d in zip(sizes, details)]
    reply = ask(cutting, user(*items, TEXT), extra_body=fields)
    processor, images = cutting.processor, [picture(size=size) for size in sizes]
    own = [{"role": "user", "content": [*[{"type": "image"}] * len(images), TEXT]}]
    prompt = processor.apply_chat_template(own, add_generation_prompt=True)
    asked = {**fields, "images": images, "text": prompt, "add_special_tokens": False, "return_tensors": "pt"}
    if details == ["low", "high"]:
        asked |= {"max_crops": [1, None], "num_query_tokens": [4, 16]}
    inputs = processor(**asked)
    assert inputs["num_crops"].tolist() == crops
    assert (inputs["input_ids"] == processor.image_token_id).sum() == tokens
    check_reply(reply, cutting.model, processor, inputs)


@pytest.mark.parametrize(
    ("world_name", "fields", "words"),
    [
        ("cutting", {"max_crops": 5}, "max_crops=5 is more than this model's processor has, 4"),
        ("cutting", {"max_crops": [1, 5]}, "max_crops=5 is more"),
        ("cutting", {"max_crops": [4]}, "lists 1 numbers, but there are 2 images"),
        ("elastic", {"max_crops": 2}, "max_crops=2 is more than this model's processor has, 1"),
    ],
)
def test_crops_that_are_refused(request, world_name, fields, words):
    body = {"messages": user(image_item(), image_item(), TEXT), "max_tokens": 2, **fields}
    status, reply = post(request.getfixturevalue(world_name), body)
    assert status == 400 and words in reply["error"]["message"] and reply["error"]["param"] == "max_crops"
