# SPDX-License-Identifier: Apache-2.0
"""Pictures that are several squares: what comes out is what each square, each picture and each row gives alone."""

import json
import logging

import pytest
import torch
import transformers

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration, HoneybeeProjectorConfig
from tests.tiny import (
    ELASTIC,
    IMAGE_SIZE,
    PROJECTORS,
    assert_same,
    logits_and_gradients,
    picture,
    tiny_config,
    tiny_inputs,
    tiny_model,
    tiny_processor,
)

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
# A picture of three squares and one that is not cut, none, and one of two squares between words.
ROWS = [(5, *["image"] * 3, 6, "image", 7), (8, 9, 10), (11, *["image"] * 2, 12)]
CROPS = [3, 1, 2]
NUMBERS = [16, 16, 4, 9, 4, 4]  # of each square
SQUARES = [(0, 4), (4, 4), (4, 6)]  # of each row
PICTURES = [(0, 2), (2, 2), (2, 3)]
KINDS = [*PROJECTORS, "elastic c-abs", "elastic d-abs", "elastic resampler"]


def model_of(kind: str):
    elastic, projector_type = kind.startswith("elastic"), kind.split()[-1]
    plain = {} if projector_type in ("linear", "mlp") else {"dropout": 0.0, "num_eos_tokens": 1}
    return tiny_model(projector_type, **{**plain, **(ELASTIC if elastic else {})})


def batch_of(model, kind: str) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(model, ROWS, numbers=NUMBERS if kind.startswith("elastic") else None)
    return {**inputs, "num_crops": torch.tensor(CROPS)}


def rows_alone(model, kind: str) -> list[dict[str, torch.Tensor]]:
    pixels, alone = tiny_inputs(model, ROWS)["pixel_values"], []
    for row, squares, pictures in zip(ROWS, SQUARES, PICTURES):
        numbers = NUMBERS[slice(*squares)] if kind.startswith("elastic") else None
        inputs = tiny_inputs(model, [row], numbers=numbers)
        if "pixel_values" in inputs:
            inputs |= {"pixel_values": pixels[slice(*squares)], "num_crops": torch.tensor(CROPS[slice(*pictures)])}
        alone.append(inputs)
    return alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_rows_one_by_one(kind):
    model = model_of(kind)
    batch = batch_of(model, kind)
    batched = logits_and_gradients(model, [batch])
    assert_same(batched, logits_and_gradients(model, rows_alone(model, kind)))
    checkpointed = model_of(kind).train()
    checkpointed.gradient_checkpointing_enable()
    assert_same(logits_and_gradients(checkpointed, [batch]), batched)
    # Which squares are one picture changes no number.
    with torch.no_grad():
        apart = model(**{**batch, "num_crops": None})
        for crops in (CROPS, [4, 2], [1] * 6, torch.tensor(CROPS, dtype=torch.int32)):
            together = model(**{**batch, "num_crops": crops})
            assert torch.equal(together.logits, apart.logits)
            assert torch.equal(together.image_hidden_states, apart.image_hidden_states)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_each_square_alone(kind):
    model = model_of(kind)
    batch = batch_of(model, kind)
    pixels, asked = batch["pixel_values"], {name: batch.get(name) for name in ("num_query_tokens", "num_crops")}
    numbers = NUMBERS if kind.startswith("elastic") else [None] * 6
    with torch.no_grad():
        squares = [model.model.get_visual_tokens(square[None], number)[0] for square, number in zip(pixels, numbers)]
        expected = [torch.cat(squares[:3]), squares[3], torch.cat(squares[4:])]
        output = model.get_image_features(pixels, **asked, return_dict=True)
        assert isinstance(output.pooler_output, list) and output.last_hidden_state.shape == (6, 17, 32)
        for tokens, theirs in zip(output.pooler_output, expected, strict=True):
            assert tokens.shape == theirs.shape
            torch.testing.assert_close(tokens, theirs, atol=1e-5, rtol=0)
        plain = model.get_image_features(pixels, **asked)
        plain = plain if TRANSFORMERS_4 else plain.pooler_output
        assert all(map(torch.equal, plain, model.model.get_visual_tokens(pixels, **asked)))
        assert all(map(torch.equal, plain, output.pooler_output))
        # What the language model reads, in order.
        placed = model(**batch).image_hidden_states.reshape(-1, 24)
        torch.testing.assert_close(placed, torch.cat(expected), atol=1e-5, rtol=0)
    counted = model.model.count_image_tokens(asked["num_query_tokens"], 6, asked["num_crops"])
    assert counted == [len(tokens) for tokens in expected]


def answers(model, inputs, **settings) -> list[list[int]]:
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False, **settings)[:, inputs["input_ids"].shape[1] :]
    return [[token for token in row if token != 0] for row in new.tolist()]  # padded where another row is longer


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "no cache", "beams", "sequences"],
)
@pytest.mark.parametrize("kind", [*PROJECTORS, "elastic c-abs"])
def test_generation_of_a_batch_is_that_of_its_rows(kind, settings):
    model = model_of(kind)
    batch = batch_of(model, kind)
    expected = [answer for inputs in rows_alone(model, kind) for answer in answers(model, inputs, **settings)]
    assert len(set(map(tuple, expected))) > 2  # what a model says that reads the pictures
    assert answers(model, batch, **settings) == expected
    if kind == "c-abs":  # a number for all squares
        assert answers(model, {**batch, "num_query_tokens": 4}, **settings) == expected
    # The same through embeddings.
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    new = model.generate(inputs_embeds=embeds, **batch, max_new_tokens=6, do_sample=False, **settings)
    assert [[token for token in row if token != 0] for row in new.tolist()] == expected


def test_beams_keep_pictures_whole():
    """Rows are repeated with the pictures that they own, and a picture with its squares."""
    model = model_of("elastic c-abs")
    batch = batch_of(model, "elastic c-abs")
    _, repeated = model._expand_inputs_for_generation(2, **batch)
    assert repeated["num_crops"].tolist() == [3, 1, 3, 1, 2, 2]
    assert repeated["num_query_tokens"].tolist() == [16, 16, 4, 9] * 2 + [4, 4] * 2
    order = [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 4, 5]
    assert torch.equal(repeated["pixel_values"], batch["pixel_values"][order])


@pytest.mark.parametrize("kind", ["c-abs", "elastic d-abs"])
def test_several_turns_with_a_cache(kind):
    """A second picture comes in a later turn; the cache has the first."""
    model = model_of(kind)
    batch = rows_alone(model, kind)[0]
    ids = batch["input_ids"]
    images = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
    tokens = model.model.count_image_tokens(batch.get("num_query_tokens"), 4, batch["num_crops"])
    cut = int(images[tokens[0]]) - 1  # behind the first picture and before a word
    first, rest = (slice(0, 3), slice(0, 1)), (slice(3, 4), slice(1, 2))

    def turn(places, squares, pictures) -> dict:
        of_images = {name: batch[name][squares] for name in ("pixel_values", "num_query_tokens") if name in batch}
        return {"input_ids": ids[:, places], **of_images, "num_crops": batch["num_crops"][pictures]}

    with torch.no_grad():
        expected = model(**batch).logits
        one = model(**turn(slice(0, cut), *first), use_cache=True)
        two = model(**turn(slice(cut, None), *rest), past_key_values=one.past_key_values)
    torch.testing.assert_close(torch.cat([one.logits, two.logits], dim=1), expected, atol=1e-5, rtol=0)
    # `generate` goes on from a cache in the same way: only the new picture comes with the whole text.
    cache = transformers.DynamicCache()
    asked = {"max_new_tokens": 4, "do_sample": False, "past_key_values": cache}
    said = model.generate(**turn(slice(0, cut), *first), **asked)
    follow = torch.cat([said, ids[:, cut:]], dim=1)
    later = {**turn(slice(0, 0), *rest), "input_ids": follow, "attention_mask": torch.ones_like(follow)}
    whole = {**batch, "input_ids": follow, "attention_mask": torch.ones_like(follow)}
    assert torch.equal(model.generate(**later, **asked), model.generate(**whole, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("kind", ["c-abs", "elastic d-abs"])
def test_packed_rows_are_the_rows_one_by_one(kind):
    model = model_of(kind)
    alone = rows_alone(model, kind)
    lengths = [inputs["input_ids"].shape[1] for inputs in alone]
    packed = batch_of(model, kind)
    del packed["attention_mask"]
    packed["input_ids"] = torch.cat([inputs["input_ids"] for inputs in alone], dim=1)
    packed["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        logits = model(**packed).logits[0].split(lengths)
        for ours, inputs in zip(logits, alone, strict=True):
            torch.testing.assert_close(ours, model(**inputs).logits[0], atol=1e-5, rtol=0)


def test_several_levels():
    model = tiny_model("d-abs", dropout=0.0, pooled_v_target="none", config={"vision_feature_layer": [1, 2, -2]})
    assert_same(
        logits_and_gradients(model, [batch_of(model, "d-abs")]),
        logits_and_gradients(model, rows_alone(model, "d-abs")),
    )


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 encodes no images beforehand")
@pytest.mark.parametrize("kind", ["c-abs", "elastic c-abs"])
def test_pictures_that_were_encoded_before(kind):
    model = model_of(kind)
    batch = batch_of(model, kind)
    expected, chosen = model(**batch).logits, answers(model, batch)
    in_beams = answers(model, batch, num_beams=3)
    for size in (1, 5, 64):  # pieces of a prompt that end within a picture and within a square
        assert answers(model, batch, prefill_chunk_size=size) == chosen
    assert answers(model, batch, prefill_chunk_size=5, num_beams=3) == in_beams
    asked = {name: batch.pop(name) for name in ("pixel_values", "num_query_tokens", "num_crops") if name in batch}

    def encoded() -> dict:  # beams repeat them in place
        return {"mm_encoder_outputs": {"image": model.get_image_features(**asked)}}

    torch.testing.assert_close(model(**batch, **encoded()).logits, expected)
    assert answers(model, {**batch, **encoded()}) == chosen
    assert answers(model, {**batch, **encoded()}, num_beams=3) == in_beams


def test_compiles_whole():
    model = model_of("c-abs")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = batch_of(model, "c-abs")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "crops",
    [[3, 1, 1], [3, 1, 3], [6, 1], [3, 1, 0, 2], [4, -1, 3], [], [3.0, 1.0, 2.0], [True] * 6, [[3, 1, 2]], 6],
    ids=str,
)
def test_crops_that_cannot_be(crops):
    model = model_of("elastic c-abs")
    batch = batch_of(model, "elastic c-abs")
    words = r"num_crops=.* must be whole numbers of at least 1, one for each image, and 6 together"
    for batch["num_crops"] in (crops, torch.tensor(crops)):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=words):
                call(**batch)
        with pytest.raises(ValueError, match=words):
            model.get_image_features(batch["pixel_values"], num_crops=batch["num_crops"])


def test_pictures_stay_whole_within_a_row():
    model = model_of("c-abs")
    batch = batch_of(model, "c-abs")
    # 20 and 10 placeholders, and pictures of 15, 5 and 10; or of 10, 15 and 5, of which the second would be torn.
    words = r"rows of \[20, 0, 10\], but 3 images of 5 or 10 or 15 visual tokens need 30, each image whole within a row"
    for call in (model, lambda **inputs: model.generate(**inputs, num_beams=2, max_new_tokens=2)):
        with pytest.raises(ValueError, match=words):
            call(**{**batch, "num_crops": torch.tensor([2, 3, 1])})
    short = {**batch, "pixel_values": batch["pixel_values"][:5], "num_crops": torch.tensor([3, 2])}
    with pytest.raises(
        ValueError, match=r"30 image placeholders .* need 25.*num_query_tokens and num_crops of the proc"
    ):
        model(**short)


@pytest.mark.parametrize("train_tower", [False, True])
def test_a_batch_without_pictures_trains(train_tower):
    model = model_of("elastic c-abs").train()
    model.model.vision_tower.requires_grad_(train_tower)
    ids = torch.tensor([[1, 5, 6, 7]])
    none = torch.zeros(0, dtype=torch.long)
    empty = {"pixel_values": torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE), "num_query_tokens": none, "num_crops": none}
    for images in ({}, empty, {"num_crops": none}):
        model.zero_grad()
        model(input_ids=ids, labels=ids, **images).loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.model.projector.parameters())
        reached = [p.grad is not None for p in model.model.vision_tower.encoder.parameters()]
        assert all(reached) if train_tower else not any(reached)
    batch = batch_of(model, "elastic c-abs")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad.any() for name, p in model.model.projector.named_parameters() if "bias" not in name)


# With at most 6 crops 5 x 1, whole, 2 x 3, 2 x 1, 1 x 3, 3 x 1; the last three are too many for a prompt to be cut.
SIZES = [(160, 32), (20, 20), (64, 96), (36, 32), (1, 2016), (2016, 1), (20, 1000), (32, 32), (64, 64)]
TEXTS = ["<image> and <image>?", "none", "<image>?", "<image>", "a <image><image> b", "<image> <image> <image>"]


@pytest.mark.parametrize("overview", [None, 4])
def test_what_the_processor_makes_is_what_the_model_takes(overview):
    processor = tiny_processor(
        10, elastic_num_query_tokens=[4, 9, 16], num_eos_tokens=1, max_crops=6, overview_num_query_tokens=overview
    )
    model = tiny_model(config={"image_token_id": processor.image_token_id}, **ELASTIC)
    pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
    pictures[5] = pictures[5].convert("P")
    numbers = [9, 16, 4, None, 9, 4, 16, None, 4]
    options = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    batch = processor(images=pictures, text=TEXTS, num_query_tokens=numbers, **options)
    assert batch["num_crops"].tolist() == [6, 1, 7, 3, 4, 4, 1, 1, 1]
    with torch.no_grad():
        logits = model(**batch).logits
    said = answers(model, batch)
    for row, text in enumerate(TEXTS):
        count = text.count("<image>")
        own, pictures = pictures[:count], pictures[count:]
        asked, numbers = numbers[:count], numbers[count:]
        inputs = processor(images=own or None, text=text, num_query_tokens=asked or None, return_tensors="pt")
        with torch.no_grad():
            alone = model(**inputs).logits[0]
        torch.testing.assert_close(logits[row, -len(alone) :], alone, atol=1e-5, rtol=0)
        assert answers(model, inputs) == [said[row]]


def test_the_m_of_overviews_is_a_setting_of_the_model(tmp_path, caplog):
    plain = tiny_config(**ELASTIC)
    plain.save_pretrained(tmp_path)
    assert "overview" not in (tmp_path / "config.json").read_text()
    model = tiny_model("d-abs", num_query_tokens=9, overview_num_query_tokens=4)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["projector_config"]["overview_num_query_tokens"] == 4
    loaded = HoneybeeForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.projector_config.overview_num_query_tokens == 4
    assert HoneybeeConfig.from_pretrained(tmp_path).projector_config.is_trained(4)
    inputs = tiny_inputs(model, [(5, *["image"] * 3, 6)], numbers=[9, 9, 4]) | {"num_crops": torch.tensor([3])}
    with caplog.at_level(logging.WARNING, "modeling_honeybee"):
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert "trained" not in caplog.text
    assert not HoneybeeProjectorConfig(num_query_tokens=9).is_trained(4)
    # Queries are learned for the largest M that is used.
    for projector_type in ("d-abs", "resampler"):
        assert HoneybeeProjectorConfig(projector_type, 9, overview_num_query_tokens=16).num_learned_queries == 16
        assert HoneybeeProjectorConfig(projector_type, 9, overview_num_query_tokens=4).num_learned_queries == 9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"overview_num_query_tokens": 5}, "overview_num_query_tokens=5 is not a perfect square.*use 4 or 9"),
        ({"overview_num_query_tokens": 0}, "overview_num_query_tokens=0 must be a whole number of at least 1"),
        ({"overview_num_query_tokens": "4"}, "overview_num_query_tokens='4' must be a whole number"),
        (
            {"projector_type": "mlp", "overview_num_query_tokens": 4},
            "overview_num_query_tokens=4: a mlp projector makes",
        ),
    ],
)
def test_numbers_of_an_overview_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        HoneybeeProjectorConfig(**settings)
