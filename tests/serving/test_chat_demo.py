# SPDX-License-Identifier: Apache-2.0
"""The chat page: its conversation, its limits, and the page itself in a browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

from serving.chat_demo import Chat, as_messages, build_page
from serving.limits import LimitError, Limits
from tests.tiny import ELASTIC, REPOSITORY, elastic_processor, picture, tiny_model, tiny_processor

CHROMIUM = shutil.which("chromium")
LIMITS = Limits(max_image_pixels=5_000, max_image_bytes=20_000, max_images=3, max_prompt_chars=100, max_new_tokens=6)


def make_world(root, processor, **settings) -> dict:
    model = tiny_model(config={"image_token_id": processor.image_token_id}, **settings)
    for seed in range(4):
        picture(seed).save(root / f"{seed}.png")
    picture(size=(64, 64)).save(root / "square.png")
    picture(size=(100, 60)).save(root / "large.png")
    (root / "text.png").write_text("no image")
    return {"root": root, "model": model, "processor": processor, "chat": Chat(model, processor, LIMITS)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("chat"), tiny_processor())


@pytest.fixture(scope="module")
def cutting(tmp_path_factory):
    """A picture of 64 x 64 pixels becomes 4 crops and an overview."""
    processor = elastic_processor()
    processor.max_crops = 4
    return make_world(tmp_path_factory.mktemp("cutting"), processor, **ELASTIC)


@pytest.fixture(scope="module")
def elastic(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("elastic"), elastic_processor(), **ELASTIC)


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


def test_visual_tokens_of_an_answer(elastic):
    chat, path = elastic["chat"], str(elastic["root"] / "0.png")
    answers = []
    for number in (None, 4, 9, 16):
        (text,) = list(chat.answer({"text": "What is it ?", "files": [path]}, [], number))[-1:]
        answers.append(text)
    assert answers[0] == answers[2] and len(set(answers)) == 3
    with pytest.raises(LimitError, match="trained for 4, 9, 16"):
        list(chat.answer({"text": "What is it ?", "files": [path]}, [], 25))


def test_crops_of_an_answer(cutting):
    """As many as the processor makes, fewer where the page asks for fewer, and never more."""
    chat, path = cutting["chat"], str(cutting["root"] / "square.png")
    answers = []
    for most in (None, 4, 1):
        (text,) = list(chat.answer({"text": "What is it ?", "files": [path]}, [], max_crops=most))[-1:]
        answers.append(text)
    assert answers[0] == answers[1] != answers[2]
    with pytest.raises(LimitError, match="max_crops=9 is more than this model's processor has, 4"):
        list(chat.answer({"text": "What is it ?", "files": [path]}, [], max_crops=9))


@pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio: pip install gradio")
@pytest.mark.parametrize("name", ["world", "elastic", "cutting"])
def test_what_the_page_lets_choose(request, name):
    """A slider for each choice that the model has; the page's own call takes their values in this order."""
    world = request.getfixturevalue(name)
    page = build_page(world["chat"], "tiny")
    sliders = [(box.minimum, box.maximum, box.value) for box in page.additional_inputs]
    assert sliders == {"world": [], "elastic": [(4, 16, 9)], "cutting": [(4, 16, 9), (1, 4, 4)]}[name]
    if name == "cutting":
        message = {"text": "What is it ?", "files": [str(world["root"] / "square.png")]}
        for values in ((14, 4), (9, 2)):  # 16 is the nearest to 14
            (shown,) = list(page.fn(message, [], *values))[-1:]
            number = 16 if values[0] == 14 else 9
            (text,) = list(world["chat"].answer(message, [], number, values[1]))[-1:]
            assert shown == text


@contextmanager
def opened(world):
    """The page of a model, in a browser."""
    from playwright.sync_api import sync_playwright

    for part in ("model", "processor"):
        world[part].save_pretrained(world["root"] / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "serving" / "chat_demo.py", "--model", world["root"] / "model", "--port", str(port),
         "--device", "cpu", "--max_new_tokens", "6", "--max_image_pixels", "5000"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])},
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
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
            page = browser.new_page()
            page.goto(address)
            yield page
            browser.close()
    finally:
        process.terminate()
        process.wait(timeout=30)


def say(page, text, image):
    page.set_input_files("input[type=file]", image)
    page.wait_for_selector(".thumbnail-item, .thumbnail-image, img[alt]", timeout=20_000)
    page.wait_for_timeout(1_000)  # the upload
    page.fill("textarea", text)
    page.press("textarea", "Enter")


IN_A_BROWSER = pytest.mark.skipif(
    find_spec("gradio") is None or find_spec("playwright") is None or CHROMIUM is None,
    reason="needs gradio, playwright and a chromium: pip install gradio playwright, apt install chromium",
)


@IN_A_BROWSER
def test_the_page_in_a_browser(world):
    from playwright.sync_api import expect

    root = world["root"]
    (answer,) = list(world["chat"].answer({"text": "What is it ?", "files": [str(root / "2.png")]}, []))[-1:]
    with opened(world) as page:
        say(page, "What is it ?", root / "2.png")
        expect(page.locator(".bot.message").first).to_contain_text(answer.strip(), timeout=30_000)
        assert page.locator("input[type=range]").count() == 0
        say(page, "And this ?", root / "large.png")
        expect(page.locator("body")).to_contain_text("6,000 pixels; the limit is 5,000", timeout=30_000)


@IN_A_BROWSER
def test_the_slider_in_a_browser(elastic):
    from playwright.sync_api import expect

    root = elastic["root"]
    (answer,) = list(elastic["chat"].answer({"text": "What is it ?", "files": [str(root / "2.png")]}, [], 16))[-1:]
    with opened(elastic) as page:
        slider = page.locator("input[type=range]")
        assert slider.input_value() == "9"
        box = slider.bounding_box()
        page.mouse.click(
            box["x"] + 0.85 * box["width"], box["y"] + box["height"] / 2
        )  # at 14, to which 16 is the nearest
        expect(slider).to_have_value("16", timeout=10_000)
        if path := os.environ.get("HONEYBEE_SCREENSHOT"):
            page.screenshot(path=path)
        say(page, "What is it ?", root / "2.png")
        expect(page.locator(".bot.message").first).to_contain_text(answer.strip(), timeout=30_000)
