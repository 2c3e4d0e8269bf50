# SPDX-License-Identifier: Apache-2.0
"""The server as a command, asked over HTTP."""

import base64
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import REPOSITORY, picture, tiny_model, tiny_processor

pytestmark = pytest.mark.skipif(
    find_spec("uvicorn") is None, reason='the server needs uvicorn: pip install -e ".[serve]"'
)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    processor = tiny_processor()
    model = tiny_model(config={"image_token_id": processor.image_token_id})
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (root / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "serving" / "serve.py", "--model", "model", "--port", str(port), "--device", "cpu",
         "--max_image_pixels", "5000", "--max_image_bytes", "20000"],
        cwd=root,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=log,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    served = {"port": port, "model": model, "processor": processor, "root": root}
    try:
        for _ in range(120):
            try:
                if ask(served, "GET", "/health")[0] == 200:
                    break
            except OSError:
                assert process.poll() is None, (root / "log").read_text()[-3000:]
                time.sleep(1)
        else:
            raise AssertionError((root / "log").read_text()[-3000:])
        yield served
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()


def ask(served, method, path, body=None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", served["port"], timeout=120)
    content = json.dumps(body) if body is not None else None
    connection.request(method, path, content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def image(served, seed=0, size=(40, 24)) -> dict:
    path = served["root"] / "picture.png"
    picture(seed, size).save(path)
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def say(served, messages, **fields) -> str:
    """The answer, streamed or not."""
    status, text = ask(served, "POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 5, **fields})
    assert status == 200, text
    if not text.startswith("data:"):
        return json.loads(text)["choices"][0]["message"]["content"]
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def expected(served, messages, images) -> str:
    processor, model = served["processor"], served["model"]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=images or None, text=prompt, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        new = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True)


TEXT = {"type": "text", "text": "What is in the picture ?"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("seeds", [(), (0,), (0, 1)], ids=["text", "image", "two images"])
def test_answers_are_the_models(served, seeds, stream):
    messages = [{"role": "user", "content": [*(image(served, seed) for seed in seeds), TEXT]}]
    ours = [{"role": "user", "content": [*[{"type": "image"}] * len(seeds), TEXT]}]
    answer = say(served, messages, stream=stream)
    assert answer.strip() == expected(served, ours, [picture(seed) for seed in seeds]).strip() != ""


def test_pictures_are_opened_as_everywhere(served):
    """A phone's photo, which lies on its side in the file, and a picture of 16 bits."""
    turned, deep = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(4).save(turned, "JPEG", exif=exif)
    Image.fromarray(np.asarray(picture(5).convert("L")).astype(np.uint16) * 256).save(deep, "PNG")
    for file in (turned, deep):
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, TEXT]}]
        ours = [{"role": "user", "content": [{"type": "image"}, TEXT]}]
        assert say(served, messages).strip() == expected(served, ours, [file.getvalue()]).strip() != ""


def test_a_second_turn_sees_the_first_ones_image(served):
    first = {"role": "user", "content": [image(served, 3), TEXT]}
    answer = say(served, [first])
    again = [first, {"role": "assistant", "content": answer}, {"role": "user", "content": "a dog ?"}]
    ours = [{"role": "user", "content": [{"type": "image"}, TEXT]}, *again[1:]]
    assert say(served, again).strip() == expected(served, ours, [picture(3)]).strip()


def test_over_the_limit_the_answer_is_clear(served):
    chat = "/v1/chat/completions"
    large = {"messages": [{"role": "user", "content": [image(served, size=(100, 60)), TEXT]}]}
    status, text = ask(served, "POST", chat, large)
    assert status == 400 and "6,000 pixels; the limit is 5,000" in json.loads(text)["error"]["message"]
    status, text = ask(served, "POST", chat, {"messages": [{"role": "user", "content": "x" * 8001}]})
    assert status == 400 and "8,001 characters" in text
    status, text = ask(served, "POST", chat, {"messages": [{"role": "user", "content": "x" * 3_000_000}]})
    assert status == 413 and "larger than" in text
    status, text = ask(served, "POST", chat, "no object")
    assert status == 400 and "JSON object" in text
    assert say(served, [{"role": "user", "content": [TEXT]}])  # and it goes on


def test_other_addresses_are_closed(served):
    for method, path in (("POST", "/load_model"), ("POST", "/reset"), ("POST", "/v1/responses"), ("GET", "/docs")):
        assert ask(served, method, path, {"model": "x"})[0] == 404
    status, text = ask(served, "GET", "/v1/models")
    assert status == 200 and [entry["id"] for entry in json.loads(text)["data"]] == ["model"]


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="needs Linux's /proc")
def test_it_listens_on_the_loopback_address_only(served):
    listening = []
    for family in ("tcp", "tcp6"):
        with open(f"/proc/net/{family}") as table:
            rows = [line.split() for line in table.readlines()[1:]]
        listening += [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{served['port']:04X}")]
    assert listening == [f"0100007F:{served['port']:04X}"]
