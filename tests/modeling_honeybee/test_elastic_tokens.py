# SPDX-License-Identifier: Apache-2.0
"""Images of one batch with an M each: what comes out is what each image gives alone."""

import logging
import math

import pytest
import torch
import transformers

from modeling_honeybee import HoneybeeForConditionalGeneration
from tests.tiny import ELASTIC, IMAGE_SIZE, assert_same, logits_and_gradients, tiny_inputs, tiny_model

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
# Two images, none, and one between words; the second image stands between two M of its row and the next.
ROWS = [(5, "image", 6, "image", 7), (8, 9, 10), (11, "image", 12)]
NUMBERS = [16, 4, 9]
IMAGES = [(0, 2), (2, 2), (2, 3)]
KINDS = {
    "c-abs": {},
    "c-abs-without-blocks": {"depth": 0},
    "d-abs": {},
    "d-abs-tgt": {"pooled_v_target": "tgt"},
    "d-abs-none": {"pooled_v_target": "none"},
    "resampler": {},
}


def elastic_model(kind: str = "c-abs", **settings):
    projector_type = "-".join(kind.split("-")[: 1 if kind == "resampler" else 2])
    model = tiny_model(projector_type, dropout=0.0, **{**ELASTIC, **KINDS[kind], **settings})
    with torch.no_grad():  # otherwise every displacement is 0
        for name, parameter in model.model.projector.named_parameters():
            if name == "reference_points":
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def rows_alone(model) -> list[dict[str, torch.Tensor]]:
    pixels = tiny_inputs(model, ROWS)["pixel_values"]
    alone = [tiny_inputs(model, [row], numbers=NUMBERS[slice(*images)]) for row, images in zip(ROWS, IMAGES)]
    for inputs, images in zip(alone, IMAGES):
        if "pixel_values" in inputs:
            inputs["pixel_values"] = pixels[slice(*images)]
    return alone


@pytest.mark.parametrize("num_eos_tokens", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_rows_one_by_one(kind, num_eos_tokens):
    model = elastic_model(kind, num_eos_tokens=num_eos_tokens)
    batch = tiny_inputs(model, ROWS, numbers=NUMBERS)
    batched = logits_and_gradients(model, [batch])
    assert_same(batched, logits_and_gradients(model, rows_alone(model)))
    checkpointed = elastic_model(kind, num_eos_tokens=num_eos_tokens).train()
    checkpointed.gradient_checkpointing_enable()
    assert_same(logits_and_gradients(checkpointed, [batch]), batched)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_the_rows_one_by_one(kind):
    model = elastic_model(kind)
    alone = rows_alone(model)
    lengths = [inputs["input_ids"].shape[1] for inputs in alone]
    packed = {
        "input_ids": torch.cat([inputs["input_ids"] for inputs in alone], dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "pixel_values": tiny_inputs(model, ROWS)["pixel_values"],
        "num_query_tokens": torch.tensor(NUMBERS),
    }
    logits, gradients = logits_and_gradients(model, [packed])
    expected = logits_and_gradients(model, alone)
    for ours, theirs in zip(logits[0].split(lengths), expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    # The loss above is a mean over a row; here over each part of it.
    model.zero_grad()
    sum(part.sin().mean() for part in model(**packed).logits[0].split(lengths)).backward()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=0, msg=name)


def answers(model, inputs, **settings) -> list[list[int]]:
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    new = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    return [[token for token in row if token != 0] for row in new.tolist()]  # padded where another row is longer


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "no cache", "beams", "sequences"],
)
@pytest.mark.parametrize("kind", ["c-abs", "d-abs", "resampler"])
def test_generation_of_a_batch_is_that_of_its_rows(kind, settings):
    model = elastic_model(kind)
    batch = tiny_inputs(model, ROWS, numbers=NUMBERS)
    expected = [answer for inputs in rows_alone(model) for answer in answers(model, inputs, **settings)]
    assert answers(model, batch, **settings) == expected
    # The same through embeddings.
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    new = model.generate(inputs_embeds=embeds, **batch, max_new_tokens=6, do_sample=False, **settings)
    assert [[token for token in row if token != 0] for row in new.tolist()] == expected


def test_one_number_for_all_images():
    model = elastic_model()
    for number in (4, 16):
        batch = tiny_inputs(model, ROWS, numbers=[number] * 3)
        listed = model(**batch)
        batch["num_query_tokens"] = number
        plain = model(**batch)
        assert plain.image_hidden_states.shape == (3, number + 1, 24)
        assert listed.image_hidden_states.shape == (3 * (number + 1), 24)
        attended = batch["attention_mask"].bool()
        torch.testing.assert_close(plain.logits[attended], listed.logits[attended], atol=1e-5, rtol=0)
        assert answers(model, batch, num_beams=2) == answers(
            model, {**batch, "num_query_tokens": torch.tensor([number] * 3)}, num_beams=2
        )
    default = tiny_inputs(model, ROWS)
    assert torch.equal(model(**default).logits, model(**default, num_query_tokens=9).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_each_image(kind):
    """In the form that tools read: a list with a tensor for each image, which is not a tuple of outputs."""
    model = elastic_model(kind)
    pixels = torch.randn(5, 3, IMAGE_SIZE, IMAGE_SIZE)
    numbers = [9, 16, 4, 16, 9]
    with torch.no_grad():
        output = model.get_image_features(pixels, num_query_tokens=torch.tensor(numbers), return_dict=True)
        assert isinstance(output.pooler_output, list) and output.last_hidden_state.shape == (5, 17, 32)
        for tokens, image, number in zip(output.pooler_output, pixels, numbers, strict=True):
            (alone,) = model.model.get_visual_tokens(image[None], number)
            assert alone.shape == (number + 1, 24)
            torch.testing.assert_close(tokens, alone, atol=1e-5, rtol=0)
        plain = model.get_image_features(pixels, num_query_tokens=torch.tensor(numbers))
        plain = plain if TRANSFORMERS_4 else plain.pooler_output
        assert isinstance(plain, list) and all(map(torch.equal, plain, output.pooler_output))


def test_several_levels():
    levels = {"vision_feature_layer": [1, 2, -2]}
    model = elastic_model("d-abs-none", config=levels)
    assert_same(
        logits_and_gradients(model, [tiny_inputs(model, ROWS, numbers=NUMBERS)]),
        logits_and_gradients(model, rows_alone(model)),
    )


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 encodes no images beforehand")
def test_images_that_were_encoded_before():
    model = elastic_model()
    batch = tiny_inputs(model, ROWS, numbers=NUMBERS)
    expected, chosen = model(**batch).logits, answers(model, batch)
    encoded = model.get_image_features(batch.pop("pixel_values"), num_query_tokens=batch.pop("num_query_tokens"))
    torch.testing.assert_close(model(**batch, mm_encoder_outputs={"image": encoded}).logits, expected)
    whole = tiny_inputs(model, ROWS, numbers=NUMBERS)
    assert answers(model, whole, prefill_chunk_size=5) == chosen


def bilinear(side: int, target: int) -> torch.Tensor:
    """(target, side), weights of the cells of one axis."""
    place = (torch.arange(target) + 0.5) * side / target - 0.5
    weights = (1 - (place[:, None] - torch.arange(side)).abs()).clamp(min=0)
    weights[:, 0] += (-place).clamp(min=0)  # outside the outermost cells, their value
    weights[:, -1] += (place - (side - 1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("number", [1, 4, 9, 25])
@pytest.mark.parametrize("kind", KINDS)
def test_a_number_is_a_fixed_model_with_these_weights(kind, number):
    """As stated by the method: nothing of C-Abs depends on M; the first queries of a resampler; of D-Abs the queries and
    the displacements interpolated, here by a second formula."""
    model = elastic_model(kind)
    number = min(number, 16) if kind == "resampler" else number  # of which it has no more
    fixed = elastic_model(kind, num_query_tokens=number, elastic_num_query_tokens=None)
    weights = model.state_dict()
    prefix = "model.projector."
    if kind == "resampler":
        weights[f"{prefix}query_tokens"] = weights[f"{prefix}query_tokens"][:, :number]
    if kind.startswith("d-abs"):
        side, target = 4, math.isqrt(number)
        matrix = torch.kron(bilinear(side, target), bilinear(side, target))  # (M, 16)

        def cells(side: int) -> torch.Tensor:
            return torch.tensor([[(x + 0.5) / side, (y + 0.5) / side] for y in range(side) for x in range(side)])

        name = f"{prefix}query_embeddings.weight"
        weights[name] = matrix @ weights[name]
        name = f"{prefix}reference_points"
        weights[name] = cells(target) + matrix @ (weights[name] - cells(side))
    fixed.load_state_dict(weights)
    inputs = tiny_inputs(model, ROWS, numbers=[number] * 3)
    given = {**inputs, "num_query_tokens": number}
    del inputs["num_query_tokens"]
    torch.testing.assert_close(model(**given).logits, fixed(**inputs).logits, atol=1e-5, rtol=0)


def test_new_reference_points_are_a_regular_grid_for_every_number():
    projector = tiny_model("d-abs", **ELASTIC).model.projector
    for number in (1, 4, 9, 16, 25):
        side = math.isqrt(number)
        _, points = projector._queries(number, torch.device("cpu"))
        expected = [[(x + 0.5) / side, (y + 0.5) / side] for y in range(side) for x in range(side)]
        torch.testing.assert_close(points[0], torch.tensor(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model = elastic_model(kind)
    inputs = tiny_inputs(model, ROWS, numbers=NUMBERS)
    model.save_pretrained(tmp_path)
    loaded = HoneybeeForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.projector_config.elastic_num_query_tokens == [4, 9, 16]
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype):
    model = elastic_model(kind)
    features = torch.randn(3, 16, 32)
    full = model.model.projector(features, NUMBERS)
    half = model.model.projector.to(dtype)(features.to(dtype), NUMBERS)
    assert half.dtype == dtype and half.shape == (sum(NUMBERS) + 3, 24)
    assert (half.float() - full).norm() / full.norm() < 3e-2


@pytest.mark.parametrize(
    ("settings", "numbers", "words"),
    [
        ({}, 5, "num_query_tokens=5 is not a perfect square, and c-abs .*; use 4 or 9"),
        ({}, 0, "num_query_tokens=0 must be a whole number of at least 1"),
        ({}, -4, "num_query_tokens=-4 must be a whole number"),
        ({}, True, "num_query_tokens=True must be a whole number"),
        ({}, torch.tensor([4.0]), r"num_query_tokens=4.0 must be a whole number"),
        ({}, torch.tensor([4, 9]), "lists 2 numbers, but pixel_values has 1 rows"),
        ({}, torch.tensor([], dtype=torch.long), "lists 0 numbers, but pixel_values has 1 rows"),
        ({"projector_type": "resampler"}, 17, "num_query_tokens=17: the resampler has 16 learned queries.*at most 16"),
    ],
)
def test_numbers_that_cannot_be(settings, numbers, words):
    model = elastic_model(settings.get("projector_type", "c-abs"))
    inputs = tiny_inputs(model)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=words):
            call(**inputs, num_query_tokens=numbers)
    with pytest.raises(ValueError, match=words):
        model.get_image_features(inputs["pixel_values"], num_query_tokens=numbers)


@pytest.mark.parametrize("projector_type", ["linear", "mlp"])
def test_one_visual_token_a_patch_stays_one(projector_type):
    model = tiny_model(projector_type)
    inputs = tiny_inputs(model)
    assert torch.equal(model(**inputs, num_query_tokens=16).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match=f"num_query_tokens=4: a {projector_type} projector .* each of the 16 patches"):
        model(**inputs, num_query_tokens=4)


def test_placeholders_and_numbers_must_agree():
    model = elastic_model()
    inputs = tiny_inputs(model, ROWS, numbers=NUMBERS)
    with pytest.raises(
        ValueError, match=r"32 image placeholders .* 3 images of 10 visual tokens need 30.*num_query_tok"
    ):
        model(**{**inputs, "num_query_tokens": None})
    words = r"rows of \[22, 0, 10\], but 3 images of 5 or 10 or 17 visual tokens need 32, each image whole within a row"
    with pytest.raises(ValueError, match=words):
        model(**{**inputs, "num_query_tokens": torch.tensor([16, 9, 4])})


def test_numbers_that_promise_little_are_told_once(caplog):
    model = elastic_model()
    inputs = tiny_inputs(model, numbers=[49])
    library = logging.getLogger("modeling_honeybee")
    for _ in range(2):
        with caplog.at_level(logging.WARNING, library.name):
            model(**inputs)
    said = [record.getMessage() for record in caplog.records if "num_query_tokens=49" in record.getMessage()]
    assert len(said) == 2
    assert "more than the 16 patches of an image" in said[0] and "trained for ([4, 9, 16])" in said[1]


def test_a_batch_without_images_takes_no_numbers():
    model = elastic_model().train()
    ids = torch.tensor([[1, 5, 6, 7]])
    empty = {
        "pixel_values": torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE),
        "num_query_tokens": torch.zeros(0, dtype=torch.long),
    }
    for images in ({}, empty):
        model.zero_grad()
        model(input_ids=ids, labels=ids, **images).loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.model.projector.parameters())
