# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from transformers import AutoConfig, PretrainedConfig

from modeling_honeybee import HoneybeeConfig, HoneybeeProjectorConfig
from tests.tiny import PROJECTORS, clip_config, llama_config, projector_settings, tiny_config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_query_tokens": 150}, ["150", "perfect square", "144", "169"]),
        ({"projector_type": "d-abs", "num_query_tokens": 2}, ["num_query_tokens=2", "1 or 4"]),
        ({"projector_type": "q-former"}, ["q-former", "linear, mlp, resampler, c-abs, d-abs"]),
        ({"num_query_tokens": 0}, ["num_query_tokens=0", "at least 1"]),
        ({"num_query_tokens": "144"}, ["'144'", "whole number"]),
        ({"depth": -1}, ["depth=-1"]),
        ({"projector_type": "mlp", "depth": 0}, ["depth=0", "at least 1"]),
        ({"projector_type": "d-abs", "hidden_size": 30}, ["hidden_size=30", "num_attention_heads=8"]),
        ({"pooled_v_target": "both"}, ["both", "query, tgt, none"]),
        ({"dropout": 1.0}, ["dropout=1.0"]),
        ({"dropout": "none"}, ["dropout='none'"]),
        ({"pos_emb": "no"}, ["pos_emb='no'", "True or False"]),
        ({"elastic_num_query_tokens": [16, 150]}, ["num_query_tokens=150", "perfect square", "144", "169"]),
        ({"elastic_num_query_tokens": [0, 144]}, ["[0, 144]", "at least 1"]),
        ({"elastic_num_query_tokens": [144, 16]}, ["[144, 16]", "ascending"]),
        ({"elastic_num_query_tokens": [144, 144]}, ["[144, 144]", "without repetition"]),
        ({"elastic_num_query_tokens": []}, ["elastic_num_query_tokens=[]", "list of whole numbers"]),
        ({"elastic_num_query_tokens": "16,64"}, ["'16,64'", "list of whole numbers"]),
        ({"elastic_num_query_tokens": [16, 64]}, ["num_query_tokens=144", "the default", "[16, 64]"]),
        ({"projector_type": "mlp", "elastic_num_query_tokens": [16]}, ["'mlp'", "one visual token of each patch"]),
    ],
)
def test_projector_config_names_what_is_wrong(settings, words):
    with pytest.raises(ValueError) as error:
        HoneybeeProjectorConfig(**settings)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("projector", "settings", "words"),
    [
        ({"projector_type": "linear", "num_query_tokens": 9}, {}, ["num_query_tokens=9", "16 patches"]),
        ({}, {"vision_feature_layer": -5}, ["vision_feature_layer=-5", "3 blocks", "-4 to 3"]),
        ({}, {"vision_feature_layer": [1, 2]}, ["[1, 2]", "d-abs"]),
        ({"projector_type": "d-abs"}, {"vision_feature_layer": [1, 2]}, ["pooled_v_target='query'", "'none'"]),
        ({}, {"image_token_id": -1}, ["image_token_id=-1"]),
        ({}, {"vision_feature_select_strategy": "cls"}, ["'cls'", "'default'", "'full'"]),
    ],
)
def test_config_names_what_does_not_fit(projector, settings, words):
    projector = {"num_query_tokens": 4, **projector}
    with pytest.raises(ValueError) as error:
        HoneybeeConfig(clip_config(), llama_config(), projector, **settings)
    assert all(word in str(error.value) for word in words)


def test_unknown_model_type_is_named():
    with pytest.raises(ValueError, match="no-such-model"):
        HoneybeeConfig(text_config={"model_type": "no-such-model"})

    class TheirConfig(PretrainedConfig):
        model_type = "theirs"

    with pytest.raises(ValueError, match="vision_config: model_type='theirs' is not transformers' own"):
        HoneybeeConfig(vision_config=TheirConfig())
    with pytest.raises(ValueError, match="model_type='resnet' has no num_hidden_layers; .* vision transformer"):
        HoneybeeConfig(vision_config={"model_type": "resnet"})


def test_visual_tokens_of_a_projector_without_a_tower():
    assert HoneybeeProjectorConfig(num_query_tokens=9, num_eos_tokens=1).num_visual_tokens == 10
    with pytest.raises(ValueError, match="number of patches"):
        print(HoneybeeProjectorConfig(projector_type="linear").num_visual_tokens)


def test_defaults_are_the_papers():
    config = HoneybeeConfig()
    assert (config.num_patches, config.num_image_tokens, config.vision_feature_layer) == (256, 144, -2)
    projector = config.projector_config
    assert (projector.projector_type, projector.hidden_size, projector.depth, projector.mlp_depth) == (
        "c-abs",
        1024,
        3,
        2,
    )
    assert HoneybeeProjectorConfig("linear").depth == 1 and HoneybeeProjectorConfig("mlp").depth == 2
    assert HoneybeeProjectorConfig("resampler").num_attention_heads == 16
    assert HoneybeeConfig(projector_config={"projector_type": "linear"}).num_image_tokens == 256


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_config_survives_the_disk(projector_type, tmp_path):
    config = tiny_config(projector_type, num_eos_tokens=2)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, HoneybeeConfig)
    assert loaded.projector_config.to_dict() == config.projector_config.to_dict()
    assert loaded.num_image_tokens == config.num_image_tokens
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoModelForVision2Seq",
        "AutoProcessor",
    }


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}},
        {"rope_theta": 123456.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 123456.0}},
        {"rope_theta": 123456.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
)
def test_rope_settings_of_either_line_are_read(rope):
    base = {k: v for k, v in llama_config().to_dict().items() if not k.startswith("rope_")}
    config = HoneybeeConfig(clip_config(), {**base, **rope}, projector_settings("c-abs"))
    text = config.text_config
    read = getattr(text, "rope_parameters", None) or {"rope_theta": text.rope_theta, **(text.rope_scaling or {})}
    assert read["rope_theta"] == 123456.0
    if "linear" in str(rope):
        assert (read["rope_type"], read["factor"]) == ("linear", 4.0)


@pytest.mark.parametrize("tied", [True, False])
def test_weight_tying_is_set_at_both_levels(tied):
    config = HoneybeeConfig(clip_config(), llama_config(tie_word_embeddings=tied), projector_settings("c-abs"))
    assert config.tie_word_embeddings is tied and config.text_config.tie_word_embeddings is tied
    loaded = HoneybeeConfig.from_dict(config.to_dict())
    assert loaded.tie_word_embeddings is tied and loaded.text_config.tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"model_type": "cohere", "logit_scale": 0.25}, "logit_scale=0.25"),
        ({"model_type": "gemma"}, "model_type='gemma' scales its input embeddings"),
    ],
)
def test_language_models_with_hidden_scales_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        HoneybeeConfig(clip_config(), {**text, "hidden_size": 32, "num_hidden_layers": 1}, projector_settings("c-abs"))


def test_the_callers_configs_stay_as_they_are():
    vision, text, projector = clip_config(), llama_config(), HoneybeeProjectorConfig("linear")
    before = [config.to_dict() for config in (vision, text, projector)]
    HoneybeeConfig(vision, text, projector)
    assert [config.to_dict() for config in (vision, text, projector)] == before


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        ({"image_size": 30}, "image_size=30 is not a multiple of patch_size=8; use 24"),
        ({"image_size": [32, 48]}, "not the edge of a square"),
    ],
)
def test_image_sizes_that_do_not_fit_are_named(vision, words):
    settings = {**clip_config().to_dict(), **vision}
    with pytest.raises(ValueError, match=words):
        HoneybeeConfig(settings, llama_config(), projector_settings("c-abs"))


@pytest.mark.parametrize("projector_type", ["resampler", "c-abs", "d-abs"])
def test_elastic_numbers_are_saved_where_there_are_some(projector_type, tmp_path):
    trained = [4, 9, 16]
    for elastic in (None, trained):
        config = tiny_config(projector_type, elastic_num_query_tokens=elastic)
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())["projector_config"]
        assert ("elastic_num_query_tokens" in saved) == (elastic is not None)
        loaded = HoneybeeConfig.from_pretrained(tmp_path)
        assert loaded.projector_config.elastic_num_query_tokens == elastic
        assert loaded.num_image_tokens == 4 and loaded.projector_config.num_learned_queries == (16 if elastic else 4)
        assert loaded.to_dict() == config.to_dict()


def test_what_is_trained():
    elastic = HoneybeeProjectorConfig(num_query_tokens=16, elastic_num_query_tokens=[16, 64, 144])
    assert [n for n in range(1, 200) if elastic.is_trained(n)] == [16, 25, 36, 49, 64, 81, 100, 121, 144]
    fixed = HoneybeeProjectorConfig(num_query_tokens=16)
    assert [n for n in range(1, 200) if fixed.is_trained(n)] == [16]
    resampler = HoneybeeProjectorConfig(
        projector_type="resampler", num_query_tokens=8, elastic_num_query_tokens=[8, 20]
    )
    assert [n for n in range(1, 200) if resampler.is_trained(n)] == [8, 9, 16, 20]
