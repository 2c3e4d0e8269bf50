# SPDX-License-Identifier: Apache-2.0
"""What vLLM's Transformers backend does with a model and its processor, done here without vLLM.

From its documentation ("Writing custom models") and its `model_executor/models/transformers/` (base.py, multimodal.py).
These tests need no vLLM and show that what it asks for is there and means the same; `test_vllm.py` runs it.
"""

import inspect

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoProcessor, ProcessorMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_honeybee import HoneybeeModel
from tests.tiny import ELASTIC, PROJECTORS, picture, save_tiny, tiny_inputs, tiny_model

ONLY_MARKED = "this transformers has no replacement offsets; vLLM reads mm_token_type_ids there"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def test_config_and_weight_names(folder):
    config = AutoConfig.from_pretrained(folder)
    assert config.auto_map["AutoModel"].endswith(".HoneybeeModel")
    text_config = config.get_text_config()
    assert text_config.model_type == "llama" and text_config.vocab_size and text_config.hidden_size
    assert HoneybeeModel._supports_attention_backend and HoneybeeModel.base_model_prefix == "model"
    model = tiny_model()
    names = {name.split(".")[0] + "." + name.split(".")[1] for name in model.state_dict()}
    assert names == {"model.vision_tower", "model.projector", "model.language_model", "lm_head.weight"}
    assert {name for name, _ in model.model.named_children()} == {"vision_tower", "projector", "language_model"}
    assert model.model.get_decoder() is model.model.language_model


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_visual_tokens_of_each_image_alone_and_together(projector_type):
    """vLLM computes them apart from the text, and splits them by image. It asks for an output, and older ones for what
    the line of transformers gives; where that is an output, it reads the same field."""
    model = tiny_model(projector_type)
    pixels = tiny_inputs(model, rows=[("image", "image", 5)])["pixel_values"]
    with torch.no_grad():
        features = model.model.get_image_features(pixels, return_dict=True).pooler_output
        assert isinstance(features, torch.Tensor)
        older = model.model.get_image_features(pixels)
        assert torch.equal(getattr(older, "pooler_output", older), features)
        assert features.shape == (2, model.config.num_image_tokens, model.config.text_config.hidden_size)
        for image, alone in zip(features, (model.model.get_visual_tokens(p[None])[0] for p in pixels)):
            torch.testing.assert_close(image, alone, atol=1e-5, rtol=0)


def test_a_given_attention_function_serves_the_language_model(folder):
    """The model is made by AutoModel.from_config on the meta device with the text's attention replaced, and called with
    embeddings, positions and what the attention needs."""
    called = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        called.append((module.layer_idx, kwargs["attention_instances"][module.layer_idx], query.shape[1]))
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True)

    AttentionInterface.register("probe", attention)
    config = AutoConfig.from_pretrained(folder)
    config.get_text_config()._attn_implementation = "probe"
    with torch.device("meta"):
        shape = AutoModel.from_config(config)
    assert isinstance(shape, HoneybeeModel)
    model = AutoModel.from_config(config).eval()
    reference = tiny_model(config={"image_token_id": config.image_token_id})
    model.load_state_dict(reference.model.state_dict())
    inputs = tiny_inputs(reference)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        visual = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        embeddings[inputs["input_ids"] == config.image_token_id] = visual.flatten(0, 1)
        positions = torch.arange(embeddings.shape[1])[None]
        hidden = model(
            input_ids=None, inputs_embeds=embeddings, position_ids=positions, use_cache=False, return_dict=False,
            attention_instances={0: "first", 1: "second"},
        )[0]  # fmt: skip
        expected = reference.model(**inputs).last_hidden_state
    heads = config.text_config.num_attention_heads
    assert called == [(0, "first", heads), (1, "second", heads)]  # and no layer of the vision tower
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)


def test_processor_counts_and_places_images(processor):
    counts = processor._get_num_multimodal_tokens(image_sizes=[[10_000, 10_000], (24, 40)])
    assert counts["num_image_tokens"] == [4, 4] and counts["num_image_patches"] == [1, 1]
    assert processor.image_token == "<image>" and "image_processor" in vars(processor)
    assert processor.tokenizer.encode(processor.image_token, add_special_tokens=False) == [processor.image_token_id]
    # Its dummy text is placeholders side by side.
    text, images = processor.image_token * 2, [picture(0), picture(1)]
    marked = processor(
        images=images, text=text, return_mm_token_type_ids=True, truncation=False, add_special_tokens=False,
        return_tensors="pt",
    )  # fmt: skip
    assert marked["mm_token_type_ids"].tolist() == [[1] * 8] and marked["pixel_values"].shape[0] == 2
    text = "What is <image> and <image>?"
    marked = processor(images=images, text=text, return_mm_token_type_ids=True, return_tensors="pt")
    assert torch.equal(marked["mm_token_type_ids"] == 1, marked["input_ids"] == processor.image_token_id)
    # Its prompt comes as tokens with one placeholder an image, which it replaces itself; the result must be ours.
    replaced = []
    for token in processor.tokenizer.encode(text, add_special_tokens=False):
        replaced += [token] * (4 if token == processor.image_token_id else 1)
    assert replaced == processor(images=images, text=text, add_special_tokens=False)["input_ids"][0]


def test_processor_tells_where_it_put_them(processor):
    if not hasattr(ProcessorMixin, "get_text_with_replacements"):
        pytest.skip(ONLY_MARKED)
    text = "What is <image> and <image>?"
    found = processor(images=[picture(0), picture(1)], text=text, return_text_replacement_offsets=True)
    (offsets,) = found["text_replacement_offsets"]
    assert [text[slice(*entry["span"])] for entry in offsets] == ["<image>", "<image>"]
    assert [entry["replacement"] for entry in offsets] == ["<image>" * 4] * 2
    assert [entry["type"] for entry in offsets] == ["image", "image"]
    assert "image_inputs" in inspect.signature(type(processor).replace_image_token).parameters


@pytest.mark.parametrize("asked", [{}, {"num_query_tokens": 4}, {"num_query_tokens": 16}, {"max_visual_tokens": 27}])
def test_numbers_of_visual_tokens_by_mm_processor_kwargs(asked, tmp_path):
    """It gives them to the loading of the processor, to each call and to the count of tokens, and slices what a call
    returns by image. What it makes of the text is not our placeholders: those come as `num_query_tokens` with the pixels."""
    folder = save_tiny(tmp_path, elastic=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, **asked)
    assert processor.num_image_tokens == 10 and processor.elastic_num_query_tokens == [4, 9, 16]
    text, images = processor.image_token * 2, [picture(0), picture(1)]
    expected = asked.get("num_query_tokens", 9) + ELASTIC["num_eos_tokens"]
    (most,) = processor._get_num_multimodal_tokens(image_sizes=([10_000, 10_000],), **asked)["num_image_tokens"]
    assert most >= expected
    counts = processor._get_num_multimodal_tokens(image_sizes=[[24, 40]] * 2, **asked)["num_image_tokens"]
    assert counts == [expected, expected]
    inputs = processor(
        images=images, text=text, return_mm_token_type_ids=True, truncation=False, add_special_tokens=False,
        return_tensors="pt", **asked,
    )  # fmt: skip
    assert inputs["mm_token_type_ids"].tolist() == [[1] * sum(counts)]
    assert ("num_query_tokens" in inputs) == (expected != 10)
    model = AutoModel.from_pretrained(folder).eval()
    # Two requests together, whose tensors it joins where they have the same fields.
    given = {name: torch.cat([inputs[name]] * 2) for name in ("pixel_values", "num_query_tokens") if name in inputs}
    with torch.no_grad():
        features = model.get_image_features(**given, return_dict=True).pooler_output
    assert [tuple(image.shape) for image in features] == [(expected, 24)] * 4
    assert not isinstance(features, tuple)  # of which it would take the first


def test_numbers_of_visual_tokens_in_the_replacements(tmp_path):
    processor = AutoProcessor.from_pretrained(save_tiny(tmp_path, elastic=True), trust_remote_code=True)
    if not hasattr(ProcessorMixin, "get_text_with_replacements"):
        pytest.skip(ONLY_MARKED)
    found = processor(
        images=[picture(0), picture(1)], text="<image> or <image>?", return_text_replacement_offsets=True,
        num_query_tokens=[4, 16],
    )  # fmt: skip
    (offsets,) = found["text_replacement_offsets"]
    assert [entry["replacement"].count("<image>") for entry in offsets] == [5, 17]


@pytest.mark.parametrize("asked", [{}, {"max_crops": 1}])
def test_cut_pictures_one_by_one(asked, tmp_path):
    """It counts squares by `image_grid_thw`, or asks for them with the engine's settings alone; takes as many rows of the other
    fields for a picture; and keeps a picture for other prompts, so that the number of pictures beside it must not matter."""
    folder = save_tiny(tmp_path, elastic=True)
    crops = {"max_crops": 4, "overview_num_query_tokens": 4}
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, **crops)
    images = [picture(0, (64, 64)), picture(1), picture(2, (64, 32)), picture(3, (64, 64))]
    counts = processor._get_num_multimodal_tokens(image_sizes=[(p.height, p.width) for p in images], **asked)
    squares, tokens = ([5, 1, 3, 5], [45, 10, 25, 45]) if not asked else ([1] * 4, [10] * 4)
    assert (counts["num_image_patches"], counts["num_image_tokens"]) == (squares, tokens)
    if not hasattr(ProcessorMixin, "get_text_with_replacements"):
        pytest.skip(ONLY_MARKED)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, **{**crops, **asked})
    given = {"images": images, "text": processor.image_token * 4, "truncation": False, "return_tensors": "pt", **asked}
    inputs = processor(**given, return_text_replacement_offsets=True)
    (offsets,) = inputs["text_replacement_offsets"]
    assert [entry["replacement"].count("<image>") for entry in offsets] == tokens
    grid = inputs["image_grid_thw"]
    assert grid.prod(-1).tolist() == squares and "num_crops" not in inputs
    fields = [name for name in ("pixel_values", "num_query_tokens") if name in inputs]
    items = list(zip(*(inputs[name].split(squares) for name in fields), grid))
    model = AutoModel.from_pretrained(folder).eval()
    others = [items[number] for number in (2, 0, 1)]  # as they come together for the tower
    with torch.no_grad():
        joined = {name: torch.cat(parts) for name, parts in zip(fields, zip(*others))}
        grids = torch.stack([item[-1] for item in others])
        found = model.get_image_features(**joined, image_grid_thw=grids, return_dict=True).pooler_output
        assert [len(features) for features in found] == [tokens[number] for number in (2, 0, 1)]
        for features, number in zip(found, (2, 0, 1)):
            alone = processor(images=images[number], text=processor.image_token, return_tensors="pt", **asked)
            pixels = {name: alone[name] for name in fields}
            expected = model.get_image_features(**pixels, return_dict=True).pooler_output
            expected = torch.cat(list(expected)) if not isinstance(expected, torch.Tensor) else expected.flatten(0, 1)
            torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_who_asks_for_offsets_with_them_gets_crops(tmp_path):
    """transformers 5 itself, for the mask of what an assistant says."""
    processor = AutoProcessor.from_pretrained(save_tiny(tmp_path), trust_remote_code=True, max_crops=4)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture(0, (64, 64))}]}]
    chat += [{"role": "assistant", "content": "a dog"}]
    settings = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    inputs = processor.apply_chat_template(chat, **settings)
    assert list(inputs["num_crops"]) == [5] and "image_grid_thw" not in inputs
