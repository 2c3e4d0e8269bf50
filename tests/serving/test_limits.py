# SPDX-License-Identifier: Apache-2.0
"""What a server refuses, without a server."""

import base64
import io
import json
import re
import sys
import zlib

import pytest
from PIL import Image

from serving import chat_demo, serve
from serving.limits import LimitError, Limits, check_chat
from tests.tiny import picture, save_tiny, tiny_processor

LIMITS = Limits(max_image_bytes=20_000, max_image_pixels=5_000, max_images=2, max_prompt_chars=50, max_new_tokens=16)


def png(size=(40, 24)) -> bytes:
    file = io.BytesIO()
    picture(size=size).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def chat(*items, **fields) -> dict:
    return {"messages": [{"role": "user", "content": list(items)}], **fields}


def image(url) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


TEXT = {"type": "text", "text": "What is it?"}


def test_what_keeps_the_limits_passes():
    url = data_url(png())
    request = check_chat(chat(image(url), image(url), TEXT, max_tokens=16), "m", LIMITS)
    assert request.messages == [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, TEXT]}]
    assert (request.images, request.max_tokens) == ([url, url], 16)
    assert check_chat(chat(TEXT), "m", LIMITS).max_tokens == 16
    assert check_chat(chat(TEXT, model="m"), "m", LIMITS)
    assert check_chat(chat(TEXT, max_tokens=None), "m", LIMITS).max_tokens == 16
    assert check_chat(chat(TEXT, max_tokens=3, max_completion_tokens=2), "m", LIMITS).max_tokens == 2
    assert check_chat({"messages": [{"role": "user", "content": "x" * 50}]}, "m", LIMITS)


def bomb() -> bytes:
    """A PNG of 40,000 x 40,000 pixels in some bytes: to decode it would take gigabytes."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (40_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (chat(image(data_url(png((80, 80)))), TEXT), "80 x 80 = 6,400 pixels; the limit is 5,000"),
        (chat(image(data_url(bomb())), TEXT), "pixels"),
        (chat(image(data_url(b"x" * 20_003)), TEXT), "bytes; the limit is 20,000"),
        (chat(image(data_url(b"no image")), TEXT), "an image cannot be read (of no known format); send"),
        (chat(image("data:image/png;base64,???"), TEXT), "not valid base64"),
        (chat(image("http://127.0.0.1/secret.png"), TEXT), "not an address"),
        (chat(image("file:///etc/passwd"), TEXT), "not an address"),
        (chat(image("/etc/passwd"), TEXT), "not an address"),
        (chat(image(None), TEXT), "not an address"),
        (chat(*[image(data_url(png()))] * 3, TEXT), "3 images; the limit is 2"),
        (chat({"type": "text", "text": "x" * 51}), "51 characters; the limit is 50"),
        (chat({"type": "image", "url": "/etc/passwd"}), "type text"),
        (chat({"type": "video_url", "video_url": {"url": "x"}}), "type text"),
        (chat(TEXT, max_tokens=17), "max_tokens=17 must be a whole number from 1 to 16"),
        (chat(TEXT, max_completion_tokens=17), "max_completion_tokens=17"),
        (chat(TEXT, max_tokens=True), "max_tokens=True"),
        (chat(TEXT, max_tokens=0), "max_tokens=0"),
        (chat(TEXT, max_completion_tokens=0, max_tokens=16), "max_completion_tokens=0"),
        (chat(TEXT, generation_config=json.dumps({"max_new_tokens": 10**6})), "generation_config"),
        (chat(TEXT, chat_template_kwargs={"chat_template": "x"}), "chat_template_kwargs"),
        (chat(TEXT, model="other/model"), "'other/model'"),
        (chat(TEXT, model="m@other"), "'m@other'"),
        ({"messages": []}, "at least one message"),
        ([], "JSON object"),
        ({"messages": ["hello"]}, "role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
    ],
)  # fmt: skip
def test_what_is_refused(body, words):
    with pytest.raises(LimitError, match=re.escape(words)):
        check_chat(body, "m", LIMITS)


def test_limits_are_checked_themselves():
    with pytest.raises(ValueError, match="max_images=0 must be"):
        Limits(max_images=0)


def test_a_request_of_the_largest_allowed_parts_fits_the_body_limit():
    image_bytes = base64.b64encode(bytes(LIMITS.max_image_bytes)).decode()
    body = chat(
        *[image("data:image/jpeg;base64," + image_bytes)] * LIMITS.max_images, {"type": "text", "text": "蜂" * 50}
    )
    assert len(json.dumps(body)) <= LIMITS.max_body_bytes


def test_a_palette_or_webp_image_is_fine():
    for kind in ("GIF", "WEBP", "BMP"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind)
        LIMITS.check_image(file.getvalue())


@pytest.mark.parametrize("script", [serve, chat_demo], ids=["serve", "chat_demo"])
def test_a_model_that_cannot_be_served_is_named(script, tmp_path, monkeypatch):
    def error(model) -> str:
        monkeypatch.setattr(sys, "argv", ["script", "--model", str(model)])
        with pytest.raises(SystemExit) as stop:
            script.main()
        return str(stop.value)

    monkeypatch.setattr(chat_demo, "find_spec", lambda name: "there")
    assert "--model outputs/nonexist is no folder, and cannot be downloaded as a Hub name" in error("outputs/nonexist")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "an adapter is merged first" in error(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "is of type 'llama'" in error(tmp_path)
    folder = save_tiny(tmp_path / "elastic", elastic=True)
    tiny_processor(10, elastic_num_query_tokens=[9, 10]).save_pretrained(folder)
    assert "the numbers of visual tokens that are trained: [9, 10] and [4, 9, 16]" in error(folder)
