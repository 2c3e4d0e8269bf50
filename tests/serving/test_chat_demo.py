# SPDX-License-Identifier: Apache-2.0
"""The chat page: its conversation, its limits, and the page itself in a browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import pytest
import torch

from serving.chat_demo import Chat, as_messages
from serving.limits import LimitError, Limits
from tests.tiny import REPOSITORY, picture, tiny_model, tiny_processor

CHROMIUM = shutil.which("chromium")
LIMITS = Limits(max_image_pixels=5_000, max_image_bytes=20_000, max_images=3, max_prompt_chars=100, max_new_tokens=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    processor = tiny_processor()
    model = tiny_model(config={"image_token_id": processor.image_token_id})
    for seed in range(4):
        picture(seed).save(root / f"{seed}.png")
    picture(size=(100, 60)).save(root / "large.png")
    (root / "text.png").write_text("no image")
    return {"root": root, "model": model, "processor": processor, "chat": Chat(model, processor, LIMITS)}


def file(path) -> dict:
    return {"type": "file", "file": {"path": str(path)}}


def test_conversation():
    history = [
        {"role": "user", "content": [file("a"), file("b"), {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [file("refused"), {"type": "text", "text": "never answered"}]},
    ]
    messages, paths = as_messages({"text": "and this ?", "files": ["c"]}, history[:2])
    assert paths == ["a", "b", "c"]
    image = {"type": "image"}
    assert messages == [
        {"role": "user", "content": [image, image, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [image, {"type": "text", "text": "and this ?"}]},
    ]
    unnormalised = [
        {"role": "user", "content": [{"path": "a"}, {"path": "b"}, "two"]},
        {"role": "assistant", "content": "yes"},
    ]
    assert as_messages({"text": "and this ?", "files": ["c"]}, unnormalised) == (messages, paths)
    messages, paths = as_messages({"text": "again", "files": []}, history)
    assert paths == ["a", "b"] and messages[-1]["content"] == [{"type": "text", "text": "again"}]


def test_answers_grow_and_are_the_models(world):
    paths = [str(world["root"] / f"{seed}.png") for seed in (0, 1)]
    history = [
        {"role": "user", "content": [file(paths[0]), {"type": "text", "text": "What is it ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
    ]
    parts = list(world["chat"].answer({"text": "and this ?", "files": paths[1:]}, history))
    assert all(after.startswith(before) for before, after in zip(parts, parts[1:]))
    messages, _ = as_messages({"text": "and this ?", "files": paths[1:]}, history)
    processor, model = world["processor"], world["model"]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=paths, text=prompt, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        new = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    assert parts[-1] == processor.tokenizer.decode(new, skip_special_tokens=True) != ""


@pytest.mark.parametrize(
    ("text", "files", "words"),
    [
        ("x" * 101, [], "101 characters; the limit is 100"),
        ("x", ["large.png"], "6,000 pixels; the limit is 5,000"),
        ("x", ["0.png"] * 4, "4 images; the limit is 3"),
        ("x", ["text.png"], "cannot be read"),
        ("", [], "the message is empty"),
    ],
)
def test_over_the_limit_nothing_is_computed(world, text, files, words):
    message = {"text": text, "files": [str(world["root"] / name) for name in files]}
    with pytest.raises(LimitError, match=words):
        next(world["chat"].answer(message, []))


def test_a_failure_while_generating_is_not_silent(world):
    chat = Chat(world["model"], world["processor"], LIMITS)
    handle = world["model"].lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            list(chat.answer({"text": "hello", "files": []}, []))
    finally:
        handle.remove()


@pytest.mark.skipif(
    find_spec("gradio") is None or find_spec("playwright") is None or CHROMIUM is None,
    reason="needs gradio, playwright and a chromium: pip install gradio playwright, apt install chromium",
)
def test_the_page_in_a_browser(world):
    from playwright.sync_api import expect, sync_playwright

    root = world["root"]
    world["model"].save_pretrained(root / "model")
    world["processor"].save_pretrained(root / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "serving" / "chat_demo.py", "--model", root / "model", "--port", str(port),
         "--device", "cpu", "--max_new_tokens", "6", "--max_image_pixels", "5000"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(address, timeout=5)
                break
            except OSError:
                assert process.poll() is None
                time.sleep(1)
        (answer,) = list(world["chat"].answer({"text": "What is it ?", "files": [str(root / "2.png")]}, []))[-1:]
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
            page = browser.new_page()
            page.goto(address)

            def say(text, name):
                page.set_input_files("input[type=file]", root / name)
                page.wait_for_selector(".thumbnail-item, .thumbnail-image, img[alt]", timeout=20_000)
                page.wait_for_timeout(1_000)  # the upload
                page.fill("textarea", text)
                page.press("textarea", "Enter")

            say("What is it ?", "2.png")
            expect(page.locator(".bot.message").first).to_contain_text(answer.strip(), timeout=30_000)
            say("And this ?", "large.png")
            expect(page.locator("body")).to_contain_text("6,000 pixels; the limit is 5,000", timeout=30_000)
            browser.close()
    finally:
        process.terminate()
        process.wait(timeout=30)
