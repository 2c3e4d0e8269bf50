# SPDX-License-Identifier: Apache-2.0
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, DynamicCache, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from modeling_honeybee import AutoModelForVision2Seq, HoneybeeForConditionalGeneration, HoneybeeModel
from modeling_honeybee.modeling_honeybee import (
    CACHE,
    HoneybeeCausalLMOutputWithPast,
    HoneybeeModelOutputWithPast,
)
from processing import processor_from_vision_text_pretrained
from tests.tiny import (
    IMAGE_SIZE,
    PROJECTORS,
    clip_config,
    picture,
    save_clip,
    save_llama,
    save_qwen2,
    save_siglip,
    tiny_inputs,
    tiny_model,
)

# A sample with two images, a text-only sample, and one image between words.
MIXED = [(5, "image", 6, "image", 7), (8, 9, 10), (11, "image")]


def generate(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    new = model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]
    # A row that ends early is padded only in a batch.
    return [[token for token in row if token != 0] for row in new.tolist()]


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_save_and_load(projector_type, tmp_path):
    model = tiny_model(projector_type)
    inputs = tiny_inputs(model, MIXED)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    for auto_class in (AutoModelForImageTextToText, AutoModelForVision2Seq):
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(loaded, HoneybeeForConditionalGeneration)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(loaded(**inputs).logits, expected)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, HoneybeeModel)
    assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_generation_with_and_without_cache_and_batch(projector_type):
    model = tiny_model(projector_type)
    batched = generate(model, tiny_inputs(model, MIXED))
    assert batched == generate(model, tiny_inputs(model, MIXED), use_cache=False)
    pixels = tiny_inputs(model, MIXED)["pixel_values"]
    for row, (first, last) in enumerate([(0, 2), (2, 2), (2, 3)]):
        single = tiny_inputs(model, [MIXED[row]])
        if last > first:
            single["pixel_values"] = pixels[first:last]
        assert generate(model, single)[0] == batched[row]


def test_images_are_encoded_once_per_generation():
    model, calls = tiny_model(), []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    generate(model, tiny_inputs(model), min_new_tokens=8)
    assert len(calls) == 1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(implementation, tmp_path):
    model = tiny_model("d-abs")
    model.save_pretrained(tmp_path)
    other = HoneybeeForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
    assert other.config.text_config._attn_implementation == implementation
    inputs = tiny_inputs(model, MIXED)
    attended = inputs["attention_mask"].bool()  # what a padding position computes is nobody's business
    torch.testing.assert_close(other(**inputs).logits[attended], model(**inputs).logits[attended], atol=1e-5, rtol=1e-4)
    assert generate(other, inputs) == generate(model, inputs)


def test_beam_search_keeps_images_with_their_rows():
    model = tiny_model()
    batched = generate(model, tiny_inputs(model, MIXED), num_beams=3)
    inputs = tiny_inputs(model, MIXED)
    single = {k: v for k, v in tiny_inputs(model, [MIXED[0]]).items()}
    single["pixel_values"] = inputs["pixel_values"][:2]
    assert generate(model, single, num_beams=3)[0] == batched[0]


def test_each_image_reaches_its_own_row():
    model = tiny_model()
    inputs = tiny_inputs(model, MIXED)
    before = model(**inputs).logits
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][2] += 1  # the image of the third row
    changed = (model(**inputs).logits - before).abs().amax((1, 2)) > 1e-6
    assert changed.tolist() == [False, False, True]


def test_logits_to_keep():
    model = tiny_model()
    inputs = tiny_inputs(model, MIXED)
    full = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, full[:, -1:])
    positions = torch.tensor([2, 5])
    torch.testing.assert_close(model(**inputs, logits_to_keep=positions).logits, full[:, positions])


def test_only_the_blocks_below_the_feature_layer_exist():
    for layer, blocks in ((-2, 2), (-1, 3), (0, 1), (1, 1)):
        model = tiny_model(config={"vision_feature_layer": layer})
        assert len(model.model.vision_tower.encoder.layers) == blocks
        assert model.config.vision_config.num_hidden_layers == 3
        assert model.model.get_visual_tokens(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)).shape == (1, 4, 24)


@pytest.mark.parametrize("layer", [0, 1, -2, -1])
def test_feature_layer_is_the_towers_hidden_state(layer):
    torch.manual_seed(0)
    tower = AutoModel.from_config(clip_config())
    model = tiny_model(config={"vision_feature_layer": layer})
    model.model.vision_tower.load_state_dict(getattr(tower, "vision_model", tower).state_dict(), strict=False)
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    state = tower.eval()(pixels, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(model.model.get_patch_features(pixels), state[:, 1:])


def test_features_of_concurrent_calls_do_not_mix():
    model = tiny_model()
    pixels = [torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE) for _ in range(16)]
    with torch.no_grad():
        expected = [model.model.get_visual_tokens(p) for p in pixels]
        with ThreadPoolExecutor(4) as pool:
            for got, wanted in zip(pool.map(torch.no_grad()(model.model.get_visual_tokens), pixels), expected):
                torch.testing.assert_close(got, wanted)


def test_placeholders_and_images_must_agree():
    model = tiny_model()
    inputs = tiny_inputs(model, [(5, "image")])
    with pytest.raises(ValueError, match=r"4 image placeholders .* 2 images .* need 8"):
        model(**{**inputs, "pixel_values": torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)})
    with pytest.raises(ValueError, match=r"4 image placeholders .* 0 images"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="expected \\(images, 3, height, width\\)"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"][None])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    model.config.image_token_id = 5000
    with pytest.raises(
        ValueError, match="image_token_id=5000 is no token of this vocabulary of .* resize_token_embeddings"
    ):
        model(**inputs)


def test_inputs_embeds_stand_for_input_ids():
    model = tiny_model()
    inputs = tiny_inputs(model, MIXED)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    expected = model(**tiny_inputs(model, MIXED)).logits
    torch.testing.assert_close(model(inputs_embeds=embeds, **inputs).logits, expected)
    new = model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=8, do_sample=False)
    assert [[token for token in row if token != 0] for row in new.tolist()] == generate(
        model, tiny_inputs(model, MIXED)
    )


@pytest.mark.parametrize("trained", [["model.projector"], ["model.projector", "model.language_model", "lm_head"]])
@pytest.mark.parametrize("pixel_values", [None, torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE)], ids=["None", "empty"])
def test_batches_without_images_train(pixel_values, trained):
    model = tiny_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(trained)))
    ids = torch.tensor([[1, 5, 6, 7]])
    loss = model(input_ids=ids, pixel_values=pixel_values, labels=ids).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert all(not p.grad.any() for p in model.model.projector.parameters())


def test_gradient_checkpointing_of_the_whole_model():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("d-abs", dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        inputs = tiny_inputs(model, MIXED)
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_frozen_tower_records_nothing():
    model = tiny_model().train()
    model.model.vision_tower.requires_grad_(False)
    model.enable_input_require_grads()
    assert not model.model.get_patch_features(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)).requires_grad


def test_missing_tensors_are_an_error(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "vision_tower" in name and "q_proj" in name)
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        HoneybeeForConditionalGeneration.from_pretrained(tmp_path)
    assert lost in str(error.value) and "lacks 1 tensors" in str(error.value)


def test_device_map_auto(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = HoneybeeForConditionalGeneration.from_pretrained(tmp_path, device_map="auto")
    inputs = tiny_inputs(model, MIXED)
    torch.testing.assert_close(loaded(**inputs).logits.cpu(), model(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model(dtype, tmp_path):
    model = tiny_model("d-abs")
    model.save_pretrained(tmp_path)
    half = HoneybeeForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    logits = half(**tiny_inputs(model, MIXED)).logits
    assert logits.dtype == dtype and torch.isfinite(logits).all()


@pytest.mark.parametrize(("save_vision", "save_text", "strategy"), [
    (save_clip, save_llama, "default"),
    (save_siglip, save_qwen2, "full"),
])  # fmt: skip
def test_joining_pretrained_parts(save_vision, save_text, strategy, tmp_path):
    vision, text = save_vision(tmp_path / "vision"), save_text(tmp_path / "text")
    model = HoneybeeForConditionalGeneration.from_vision_text_pretrained(
        vision, text, projector_type="c-abs", num_query_tokens=4, hidden_size=32, depth=1
    )
    assert model.config.vision_feature_select_strategy == strategy
    # The parts are the pretrained ones.
    tower = AutoModel.from_pretrained(vision)
    tower = getattr(tower, "vision_model", tower)
    ours = model.model.vision_tower.state_dict()
    assert all(torch.equal(tensor, tower.state_dict()[name]) for name, tensor in ours.items())
    language_model = AutoModel.from_pretrained(text).state_dict()
    for name, tensor in model.model.language_model.state_dict().items():
        rows = language_model[name].shape[0]
        assert torch.equal(tensor[:rows], language_model[name]), name
    embeddings = model.get_input_embeddings().weight
    if strategy == "default":  # every id of this tokenizer was taken, so one row was added, at the mean
        assert embeddings.shape[0] == model.config.image_token_id + 1
        torch.testing.assert_close(embeddings[-1], embeddings[:-1].mean(0))
    assert (model.lm_head.weight is embeddings) == model.config.tie_word_embeddings

    inputs = tiny_inputs(model)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "joined")
    loaded = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "joined")
    assert torch.equal(loaded(**inputs).logits, expected)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == model.config.tie_word_embeddings

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] > 200, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("save_vision", "extra"), [(save_clip, 1), (save_siglip, 0)])
def test_another_image_size_keeps_the_towers_weights(save_vision, extra, tmp_path):
    vision, text = save_vision(tmp_path / "vision"), save_llama(tmp_path / "text")
    settings = {"projector_type": "c-abs", "num_query_tokens": 4, "hidden_size": 32, "depth": 1}
    model = HoneybeeForConditionalGeneration.from_vision_text_pretrained(vision, text, image_size=48, **settings)
    assert model.config.num_patches == 36
    tower = AutoModel.from_pretrained(vision)
    before = getattr(tower, "vision_model", tower).state_dict()
    name = "embeddings.position_embedding.weight"
    for key, tensor in model.model.vision_tower.state_dict().items():
        if key != name:
            assert torch.equal(tensor, before[key]), key
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    assert positions.shape == (36 + extra, 32)
    assert torch.equal(positions[:extra], before[name][:extra])
    image = before[name][extra:].T.reshape(1, 32, 4, 4)
    expected = torch.nn.functional.interpolate(image, scale_factor=1.5, mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(positions[extra:], expected)
    model.save_pretrained(tmp_path / "out")
    loaded = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "out")
    pixels = torch.randn(1, 3, 48, 48)
    assert torch.equal(loaded.model.get_visual_tokens(pixels), model.model.get_visual_tokens(pixels))
    processor = processor_from_vision_text_pretrained(vision, text, 4, image_size=48)
    assert processor(images=picture(), return_tensors="pt")["pixel_values"].shape[-1] == 48


def test_a_new_model_has_the_language_models_dtype(tmp_path):
    vision, text = save_clip(tmp_path / "vision"), save_llama(tmp_path / "text")
    LlamaForCausalLM.from_pretrained(text).to(torch.bfloat16).save_pretrained(text)
    settings = {"projector_type": "d-abs", "num_query_tokens": 4, "hidden_size": 32}
    for dtype, expected in ((None, torch.bfloat16), (torch.float16, torch.float16)):
        model = HoneybeeForConditionalGeneration.from_vision_text_pretrained(vision, text, dtype=dtype, **settings)
        assert {p.dtype for p in model.parameters()} == {expected}
        model.save_pretrained(tmp_path / str(expected))
        loaded = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / str(expected), dtype="auto")
        assert {p.dtype for p in loaded.parameters()} == {expected}


def test_a_new_model_has_the_attention_that_was_asked_for(tmp_path):
    vision, text = save_clip(tmp_path / "vision"), save_llama(tmp_path / "text")
    for asked, expected in (("eager", "eager"), (None, "sdpa")):
        model = HoneybeeForConditionalGeneration.from_vision_text_pretrained(
            vision, text, attn_implementation=asked, projector_type="linear"
        )
        configs = [module.config for module in model.modules() if hasattr(module, "config")]
        assert {config._attn_implementation for config in configs} == {expected}


def test_unknown_projector_setting_is_named(tmp_path):
    with pytest.raises(ValueError, match="num_querry_tokens.*num_query_tokens"):
        HoneybeeForConditionalGeneration.from_vision_text_pretrained("vision", "text", num_querry_tokens=4)


def test_parts_keep_their_order():
    """By which saved optimizers know them, and `dtype="auto"` the dtype of a folder that has several."""
    model = tiny_model()
    assert [name for name, _ in model.named_children()] == ["model", "lm_head"]
    assert [name for name, _ in model.model.named_children()] == ["vision_tower", "projector", "language_model"]


def test_outputs_have_the_librarys_fields_and_ours():
    for ours, theirs in (
        (HoneybeeModelOutputWithPast, BaseModelOutputWithPast),
        (HoneybeeCausalLMOutputWithPast, CausalLMOutputWithPast),
    ):
        names = [field.name for field in fields(theirs)]
        assert [field.name for field in fields(ours)] == [*names, "image_hidden_states"]


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_goes_by_both_of_its_names(name):
    model = tiny_model()
    inputs = tiny_inputs(model)
    ids = inputs["input_ids"]
    expected = model(**inputs).logits[:, -1]
    cache = DynamicCache(config=model.config.text_config)
    model(**{**inputs, "input_ids": ids[:, :-1], "attention_mask": None}, **{name: cache})
    assert cache.get_seq_length() == ids.shape[1] - 1
    output = model(input_ids=ids[:, -1:], **{name: cache})
    torch.testing.assert_close(output.logits[:, -1], expected, atol=1e-5, rtol=0)
    assert output[CACHE] is cache
    with pytest.raises(ValueError, match="two names"):
        model(input_ids=ids[:, -1:], past_key_values=cache, cache=cache)


def test_generation_uses_nothing_that_is_deprecated(caplog, recwarn):
    model = tiny_model()
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        for settings in ({}, {"num_beams": 2}, {"use_cache": False}):
            model.generate(**tiny_inputs(model, MIXED), max_new_tokens=3, do_sample=False, **settings)
    finally:
        library.removeHandler(caplog.handler)
    said = caplog.text + "".join(str(warning.message) for warning in recwarn)
    assert "deprecated" not in said, said
