# SPDX-License-Identifier: Apache-2.0
"""The number of visual tokens of each image, as a call, a budget or a message asks for it."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers import pipeline

from modeling_honeybee import HoneybeeProjectorConfig
from processing import HoneybeeProcessor, processor_from_vision_text_pretrained
from processing.prepare_tokenizer import check_processor
from tests.tiny import (
    ELASTIC,
    byte_tokenizer,
    elastic_processor,
    picture,
    save_clip,
    save_llama,
    tiny_config,
    tiny_model,
    tiny_processor,
)

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
EXTRA = ELASTIC["num_eos_tokens"]  # of each image, whatever its M
ROWS = ["<image> and <image>?", "none", "<image>?"]


def call(processor, rows=ROWS, **settings):
    images = [picture(seed) for seed in range(sum(row.count("<image>") for row in rows))]
    return processor(images=images, text=rows, padding=True, return_tensors="pt", **settings)


def placeholders(processor, inputs) -> list[int]:
    """The length of each run of placeholders; those of two images never touch here."""
    runs = []
    for row in (inputs["input_ids"] == processor.image_token_id).int().tolist():
        text = "".join(map(str, row))
        runs += [len(run) for run in text.split("0") if run]
    return runs


def user(*content):
    return [{"role": "user", "content": list(content)}]


def image(seed: int = 0, **settings) -> dict:
    return {"type": "image", "image": picture(seed), **settings}


def text(words: str = "What?") -> dict:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({}, [9, 9, 9]),
        ({"num_query_tokens": 9}, [9, 9, 9]),
        ({"num_query_tokens": 4}, [4, 4, 4]),
        ({"num_query_tokens": [16, 4, 9]}, [16, 4, 9]),
        ({"num_query_tokens": [16, None, 4]}, [16, 9, 4]),
        ({"num_query_tokens": torch.tensor([16, 4, 9])}, [16, 4, 9]),
        ({"num_query_tokens": np.array([16, 4, 9])}, [16, 4, 9]),
        ({"num_query_tokens": [np.int64(16), None, torch.tensor(4)]}, [16, 9, 4]),
        ({"num_query_tokens": np.int64(4)}, [4, 4, 4]),
        ({"num_query_tokens": [25, 1, 9], "allow_untrained": True}, [25, 1, 9]),
        # For each row, extra tokens included: 2 * (16 + 1) = 34, 2 * (9 + 1) = 20, 2 * (4 + 1) = 10.
        ({"max_visual_tokens": 34}, [16, 16, 16]),
        ({"max_visual_tokens": 33}, [9, 9, 16]),
        ({"max_visual_tokens": 20}, [9, 9, 16]),
        ({"max_visual_tokens": 16}, [4, 4, 9]),
        ({"max_visual_tokens": 10}, [4, 4, 9]),
        ({"max_visual_tokens": 22, "num_query_tokens": [16, None, None]}, [16, 4, 16]),
    ],
)
def test_numbers_of_a_call(settings, numbers):
    processor = elastic_processor()
    inputs = call(processor, **settings)
    assert placeholders(processor, inputs) == [number + EXTRA for number in numbers]
    assert inputs["pixel_values"].shape == (3, 3, 32, 32)
    if numbers == [9, 9, 9]:
        assert "num_query_tokens" not in inputs
    else:
        assert inputs["num_query_tokens"].dtype == torch.int64 and inputs["num_query_tokens"].tolist() == numbers
    alone = processor(images=[picture(seed) for seed in range(3)], **{**settings, "max_visual_tokens": None})
    assert ("num_query_tokens" in alone) == ("num_query_tokens" in settings and numbers != [9, 9, 9])


def test_any_square_between_is_allowed():
    processor = tiny_processor(16, elastic_num_query_tokens=[16, 64])
    for number in (16, 25, 36, 49, 64):
        assert placeholders(processor, call(processor, ["<image>?"], num_query_tokens=number)) == [number]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"num_query_tokens": 25},
            "num_query_tokens=25: the model is trained for 4, 9, 16 visual.*between 4 and 16, or allow_",
        ),
        ({"num_query_tokens": 1}, "num_query_tokens=1: the model is trained for 4, 9, 16"),
        ({"num_query_tokens": 5}, "num_query_tokens=5: the model is trained for 4, 9, 16"),
        ({"num_query_tokens": 0}, "num_query_tokens=0 must be a whole number of at least 1"),
        ({"num_query_tokens": 0, "allow_untrained": True}, "num_query_tokens=0 must be a whole number"),
        ({"num_query_tokens": "9"}, "num_query_tokens='9' must be a whole number"),
        ({"num_query_tokens": True}, "num_query_tokens=True must be a whole number"),
        ({"num_query_tokens": [4, 9]}, "num_query_tokens lists 2 numbers, but there are 3 images"),
        ({"images_kwargs": {"num_query_tokens": 16}}, "num_query_tokens stands in images_kwargs"),
        ({"max_visual_tokens": 9}, "max_visual_tokens=9 is too small: the 2 images of the prompt need at least 10"),
        ({"max_visual_tokens": 0}, "max_visual_tokens=0 must be a whole number of at least 1"),
        ({"num_query_tokens": 16, "max_visual_tokens": 20}, "max_visual_tokens=20 is too small.* at least 34"),
    ],
)
def test_numbers_that_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        call(elastic_processor(), **settings)


def test_a_fixed_model_has_one_number():
    processor = tiny_processor(4)
    assert placeholders(processor, call(processor, num_query_tokens=4, max_visual_tokens=8)) == [4, 4, 4]
    words = (
        "num_query_tokens=9: the model is trained for 4 visual tokens an image; use one of these, or allow_untrained"
    )
    with pytest.raises(ValueError, match=words):
        call(processor, num_query_tokens=9)
    with pytest.raises(ValueError, match="max_visual_tokens=7 is too small"):
        call(processor, max_visual_tokens=7)
    inputs = call(processor, num_query_tokens=9, allow_untrained=True)
    assert inputs["num_query_tokens"].tolist() == [9, 9, 9] and placeholders(processor, inputs) == [9, 9, 9]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"elastic_num_query_tokens": [16, 4]}, r"elastic_num_query_tokens=\[16, 4\] .* ascending"),
        ({"elastic_num_query_tokens": []}, r"elastic_num_query_tokens=\[\]"),
        ({"elastic_num_query_tokens": 4}, "elastic_num_query_tokens=4 must be a list"),
        ({"elastic_num_query_tokens": [9, 16]}, "num_query_tokens=4: the model is trained for 9, 16"),
        ({"num_eos_tokens": 4}, "num_eos_tokens=4 must be .* from 0 to num_image_tokens=4 - 1"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny_processor(4, **settings)


def test_settings_are_saved_where_there_are_some(tmp_path):
    for processor in (tiny_processor(4), elastic_processor()):
        processor.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "processor_config.json").read_text())
        assert {"elastic_num_query_tokens", "num_eos_tokens"} & set(saved) == set(
            ("elastic_num_query_tokens", "num_eos_tokens") if processor.elastic_num_query_tokens else ()
        )
        loaded = HoneybeeProcessor.from_pretrained(tmp_path)
        for name in ("num_image_tokens", "num_query_tokens", "elastic_num_query_tokens", "num_eos_tokens"):
            assert getattr(loaded, name) == getattr(processor, name), name


ASKED = [
    ([image()], {}, [9]),
    ([image(num_query_tokens=16)], {}, [16]),
    ([image(detail="low")], {}, [4]),
    ([image(detail="high")], {}, [16]),
    ([image(detail="auto"), text(), image(1, detail="high")], {}, [9, 16]),
    ([image(detail="auto"), text(), image(1, detail="high")], {"num_query_tokens": 4}, [4, 16]),
    ([image(), text(), image(1, num_query_tokens=4)], {"num_query_tokens": [16, 9]}, [16, 4]),
    ([image(num_query_tokens=16), text(), image(1)], {"max_visual_tokens": 27}, [16, 9]),
    ([image(), text(), image(1)], {"processor_kwargs": {"num_query_tokens": 4}}, [4, 4]),
    ([image(num_query_tokens=1), text(), image(1)], {"allow_untrained": True}, [1, 9]),
]


@pytest.mark.parametrize(("content", "settings", "numbers"), ASKED)
def test_numbers_of_a_message(content, settings, numbers, caplog):
    processor = elastic_processor()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    conversation = user(*content)
    inputs = processor.apply_chat_template(conversation, **options, **settings)
    assert placeholders(processor, inputs) == [number + EXTRA for number in numbers]
    assert inputs.get("num_query_tokens", torch.tensor([9] * len(numbers))).tolist() == numbers
    assert "have to be in `processor_kwargs`" not in caplog.text
    # By hand: what a collator or a server does that renders and reads pictures itself.
    rendered = processor.apply_chat_template(conversation, add_generation_prompt=True)
    given = settings.get("processor_kwargs", settings)
    each = given.get("num_query_tokens")
    each = each if isinstance(each, list) else [each] * len(numbers)
    own = processor.image_query_tokens(conversation)
    by_hand = processor(
        images=[item["image"] for item in content if item["type"] == "image"], text=rendered, add_special_tokens=False,
        return_tensors="pt", **{**given, "num_query_tokens": [a or b for a, b in zip(own, each, strict=True)]},
    )  # fmt: skip
    assert set(by_hand) == set(inputs) and all(torch.equal(by_hand[name], inputs[name]) for name in inputs)


def test_openai_items_and_batches(tmp_path):
    picture().save(tmp_path / "a.png")

    def item(**settings) -> dict:
        return {"type": "image_url", "image_url": {"url": str(tmp_path / "a.png"), **settings}}

    processor = elastic_processor(byte_tokenizer())
    batch = [user(item(detail="low"), text()), user(text()), user(item(), {**item(), "num_query_tokens": 16})]
    inputs = processor.apply_chat_template(batch, tokenize=True, return_dict=True, return_tensors="pt", padding=True)
    assert inputs["num_query_tokens"].tolist() == [4, 9, 16]
    assert [processor.image_query_tokens(messages) for messages in batch] == [[4], [], [None, 16]]
    with pytest.raises(ValueError, match="detail='medium' of an image must be low, high or auto"):
        processor.apply_chat_template(user(item(detail="medium")), tokenize=True)
    with pytest.raises(ValueError, match="detail={'a': 1} of an image must be low, high or auto"):
        processor.apply_chat_template(user(item(detail={"a": 1})), tokenize=True)
    for settings in ({"num_query_tokens": 16}, {"max_visual_tokens": 20}):
        with pytest.raises(ValueError, match="text alone does not hold numbers of visual tokens; add tokenize=True"):
            processor.apply_chat_template(user(item(detail="low")), **settings)
    fixed = tiny_processor(4)
    assert fixed.image_query_tokens(user(item(detail="medium"), item(detail="high"))) == [None, 4]
    with pytest.raises(ValueError, match="lists 2 numbers, but there are 1 images"):
        processor.apply_chat_template(user(item(detail="low")), tokenize=True, num_query_tokens=[4, 4])


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 computes this mask before expansion")
def test_assistant_mask_after_expansion():
    processor = elastic_processor(byte_tokenizer())
    answer = {"role": "assistant", "content": [text("yes")]}
    inputs = processor.apply_chat_template(
        [[*user(image(num_query_tokens=16), text("q")), answer]],
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt",
    )  # fmt: skip
    supervised = inputs["input_ids"][inputs["assistant_masks"].bool()]
    assert processor.tokenizer.decode(supervised) == "yes<|endoftext|>"


def test_serving_interface():
    processor = elastic_processor()
    sizes = [(10, 20), (30, 40)]
    for settings, expected in (
        ({}, [10, 10]),
        ({"num_query_tokens": 16}, [17, 17]),
        ({"num_query_tokens": [4, 16]}, [5, 17]),
        ({"max_visual_tokens": 30, "some_other": 1}, [10, 10]),
        ({"num_query_tokens": 25, "allow_untrained": True}, [26, 26]),
    ):
        counted = processor._get_num_multimodal_tokens(sizes, **settings)
        assert counted["num_image_tokens"] == expected and counted["num_image_patches"] == [1, 1]
    with pytest.raises(ValueError, match="num_query_tokens=25: the model is trained for"):
        processor._get_num_multimodal_tokens(sizes, num_query_tokens=25)


def test_model_and_processor_must_agree(tmp_path):
    processor = elastic_processor()
    ids = {"image_token_id": processor.image_token_id}
    check_processor(tiny_config(config=ids, **ELASTIC), processor)
    for settings, words in (
        ({"elastic_num_query_tokens": [4, 9]}, r"numbers of visual tokens .* trained: \[4, 9, 16\] and \[4, 9\]"),
        ({"elastic_num_query_tokens": None}, r"numbers of visual tokens .* trained: \[4, 9, 16\] and None"),
        ({"num_query_tokens": 4}, "visual tokens an image: 10 and 5"),
        ({"num_query_tokens": 4, "num_eos_tokens": 6}, "extra tokens of an image: 1 and 6"),
    ):
        with pytest.raises(ValueError, match=words):
            check_processor(tiny_config(config=ids, **{**ELASTIC, **settings}), processor)
    # Folders of before say nothing of extra tokens.
    check_processor(tiny_config(config=ids, num_eos_tokens=2), tiny_processor(6))
    # A new processor for a model.
    projector = HoneybeeProjectorConfig(**ELASTIC)
    made = processor_from_vision_text_pretrained(
        save_clip(tmp_path / "vision"), save_llama(tmp_path / "text"), projector.num_visual_tokens,
        elastic_num_query_tokens=projector.elastic_num_query_tokens, num_eos_tokens=projector.num_eos_tokens,
    )  # fmt: skip
    assert made.trained_num_query_tokens == [4, 9, 16] and made.num_query_tokens == 9


@pytest.mark.parametrize("number", [4, 9, 16])
def test_pipeline(number):
    processor = elastic_processor()
    model = tiny_model(config={"image_token_id": processor.image_token_id}, **ELASTIC)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(user(image(), text()), **options, num_query_tokens=number)
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(ids[0], skip_special_tokens=True)
    how = {"max_new_tokens": 5, "return_full_text": False}
    in_item = user(image(num_query_tokens=number), text())
    assert ask(text=in_item, **how)[0]["generated_text"] == expected
    if not TRANSFORMERS_4:  # whose pipeline gives a processor none of its settings with a chat
        assert ask(text=user(image(), text()), num_query_tokens=number, **how)[0]["generated_text"] == expected
    # A pipeline's batch has the same inputs for each chat: `num_query_tokens` for all, or for none.
    other = image(num_query_tokens=9 if number == 9 else 4)
    batched = ask(text=[in_item, user(other, text("Is it?"))] * 2, batch_size=4, **how)
    assert batched[0][0]["generated_text"] == batched[2][0]["generated_text"] == expected
    rendered = processor.apply_chat_template(in_item, add_generation_prompt=True)
    plain = ask(images=picture(), text=rendered, num_query_tokens=number, add_special_tokens=False, **how)
    assert plain[0]["generated_text"] == expected
