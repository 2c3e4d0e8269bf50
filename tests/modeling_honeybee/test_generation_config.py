# SPDX-License-Identifier: Apache-2.0
"""Whatever generation settings a part brings along: the model answers greedily and can be saved."""

import json
import logging

import pytest
import torch

from modeling_honeybee import HoneybeeForConditionalGeneration
from tests.tiny import save_clip, save_llama, tiny_inputs, tiny_model

SAVED = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Of the second, transformers refuses each of the first five when it is loaded.
FOREIGN = [
    {"temperature": 0.9, "top_p": 0.6},
    {
        "num_return_sequences": 3, "early_stopping": "x", "cache_implementation": "of tomorrow", "max_new_tokens": 0,
        "watermarking_config": {"x": 1}, "do_sample": True, "repetition_penalty": 1.8, "begin_suppress_tokens": [5, 6],
        "forced_eos_token_id": 2, "forced_bos_token_id": 9, "max_length": 4, "stop_strings": ["a"], "of_tomorrow": {"x": 1},
        "bad_words_ids": [[5]], "sequence_bias": [[[5], -9.0]], "no_repeat_ngram_size": 1, "num_beams": 4,
    },
    [],
    None,
]  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    return save_clip(root / "vision"), save_llama(root / "text"), root / "text" / "generation_config.json"


def join(parts):
    torch.manual_seed(3)
    return HoneybeeForConditionalGeneration.from_vision_text_pretrained(*parts[:2], projector_type="linear")


def saved(folder) -> dict:
    settings = json.loads((folder / "generation_config.json").read_text())
    settings.pop("transformers_version")
    return settings


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_joined_model_is_greedy_and_savable(parts, tmp_path, caplog, foreign):
    parts[2].write_text("{}")
    plain = join(parts)
    inputs = tiny_inputs(plain)
    expected = plain.generate(**inputs, max_new_tokens=6)
    if foreign is None:
        parts[2].unlink()
    else:
        parts[2].write_text(json.dumps(foreign))
    with caplog.at_level(logging.INFO):
        model = join(parts)
    assert all(f"{name}={value!r}" in caplog.text for name, value in (foreign or {}).items())
    model.save_pretrained(tmp_path)
    assert saved(tmp_path) == {**SAVED, "suppress_tokens": [model.config.image_token_id]}
    again = HoneybeeForConditionalGeneration.from_pretrained(tmp_path)
    for each in (model, again):
        assert torch.equal(each.generate(**inputs, max_new_tokens=6), expected)


def test_special_tokens_of_the_language_model_are_kept(parts, tmp_path):
    parts[2].write_text(
        json.dumps({"eos_token_id": [2, 7], "bos_token_id": 1, "pad_token_id": -1, "suppress_tokens": [9]})
    )
    model = join(parts)
    model.save_pretrained(tmp_path)
    image = model.config.image_token_id
    # -1, which old Llama checkpoints have, is one that cannot be saved
    assert saved(tmp_path) == {"bos_token_id": 1, "eos_token_id": [2, 7], "suppress_tokens": [9, image]}


def test_answers_end_where_training_lets_them_end(parts, tmp_path):
    """With the tokenizer's eos, which the language model's own settings may not have."""
    parts[2].write_text(json.dumps({"eos_token_id": 7}))
    join(parts).save_pretrained(tmp_path)
    assert saved(tmp_path)["eos_token_id"] == [7, 2]


def test_a_checkpoint_keeps_what_can_be_saved(tmp_path, caplog):
    tiny_model().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    before = saved(tmp_path / "model")
    for valid in ({"do_sample": True, "temperature": 0.7, "num_return_sequences": 2}, {"repetition_penalty": 1.1}):
        path.write_text(json.dumps({**before, **valid}))
        HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
        assert saved(tmp_path / "again") == {**before, **valid} and "left out" not in caplog.text
    path.write_text(json.dumps({**before, "temperature": 0.7, "length_penalty": 2.0, "repetition_penalty": 1.1}))
    HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    assert saved(tmp_path / "again") == {**before, "repetition_penalty": 1.1}
    assert "left out: length_penalty=2.0, temperature=0.7" in caplog.text


def test_settings_in_the_language_models_config_do_not_survive(parts, tmp_path):
    """Older checkpoints have them there."""
    parts[2].unlink(missing_ok=True)
    plain = join(parts)
    inputs = tiny_inputs(plain)
    expected = plain.generate(**inputs, max_new_tokens=6)
    path = parts[2].with_name("config.json")
    before = json.loads(path.read_text())
    penalties = {
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
        "min_length": 40,
        "num_beams": 3,
        "do_sample": True,
    }
    path.write_text(json.dumps({**before, **penalties}))
    model = join(parts)
    path.write_text(json.dumps(before))
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["text_config"] |= penalties  # as transformers 4 saves them
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with_file = HoneybeeForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    without = HoneybeeForConditionalGeneration.from_pretrained(tmp_path)
    for each in (model, with_file, without):
        assert torch.equal(each.generate(**inputs, max_new_tokens=6), expected)
        assert each.generation_config.suppress_tokens == [model.config.image_token_id]
