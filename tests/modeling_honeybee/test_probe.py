# SPDX-License-Identifier: Apache-2.0
"""Parts that still answer and see as they do alone are joined, and others refused with the figures."""

import json

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration
from modeling_honeybee.probe_honeybee import ask_tower, check_parts, check_tower
from tests.tiny import (
    IMAGE_SIZE,
    REPOSITORY,
    clip_config,
    run_script,
    save_clip,
    save_llama,
    tiny_model,
    tiny_processor,
    word_tokenizer,
)

TRANSFORMERS_4 = int(transformers.__version__.split(".")[0]) < 5
TOKENS = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
USUAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**USUAL, "num_key_value_heads": 2}
OLDER = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
LANGUAGE_MODELS = {
    "llama": {**GROUPED, "head_dim": 16, "rope_theta": 50000.0},
    "qwen2": {**GROUPED, "tie_word_embeddings": True},
    "qwen3": {**GROUPED, "head_dim": 16},
    "gemma3_text": {**GROUPED, "head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 6},
    "gpt2": OLDER,
    "opt": {**USUAL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": USUAL,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {**USUAL, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_bigcode": OLDER,
    "starcoder2": GROUPED,
    "stablelm": GROUPED,
    "olmo2": GROUPED,
    "smollm3": GROUPED,
    "granite": {**GROUPED, "embedding_multiplier": 12.0, "residual_multiplier": 0.2},
    "glm4": {**GROUPED, "head_dim": 16},
    "qwen3_moe": {**GROUPED, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
RECURRENT_GEMMA = {
    **USUAL, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16,
    "block_types": ["recurrent", "recurrent", "attention"], "w_init_variance_scale": 1.0,
}  # fmt: skip
LFM2 = {**GROUPED, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
MAMBA = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}


def text_config(model_type, settings):
    return CONFIG_MAPPING[model_type](**{**TOKENS, "initializer_range": 0.2, **settings})


def save_language_model(folder, model_type, settings, dtype=torch.float32):
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(text_config(model_type, settings)).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # all of them, and far from what a default would make
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def join(tmp_path, text, **settings):
    vision = save_clip(tmp_path / "vision")
    return HoneybeeForConditionalGeneration.from_vision_text_pretrained(
        vision, text, projector_type="linear", **settings
    )


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_language_models_that_answer_as_alone_are_joined(model_type, tmp_path):
    text = save_language_model(tmp_path / "text", model_type, LANGUAGE_MODELS[model_type])
    model = join(tmp_path, text)
    alone = AutoModelForCausalLM.from_pretrained(text).eval()
    ids = torch.tensor([[5, 9, 17, 33, 65, 129, 257, 100, 101, 102]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, alone(ids).logits)
    check_parts(model, "the model")
    model.save_pretrained(tmp_path / "joined")
    check_parts(HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "joined").eval(), "the folder")


REFUSED = {
    "recurrent_gemma": (RECURRENT_GEMMA, "in one forward, as it does alone"),
    "mamba": (MAMBA, "in one forward" if TRANSFORMERS_4 else "generating with a cache"),
    "lfm2": (LFM2, r"generating with a cache, as it does alone \(AttributeError: .*conv_cache"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_language_models_that_answer_otherwise_are_refused(model_type, tmp_path):
    if model_type == "lfm2" and not TRANSFORMERS_4:
        pytest.skip("on transformers 5 LFM2 answers as alone")
    settings, words = REFUSED[model_type]
    text = save_language_model(tmp_path / "text", model_type, settings)
    if not TRANSFORMERS_4 and model_type == "recurrent_gemma":
        words += r": -?\d.* instead of -?\d.* \(limit of the difference .*\) for a logit"
    with pytest.raises(
        ValueError, match=f"{text} does not answer as a part of a Honeybee, {words}.*; use another lang"
    ):
        join(tmp_path, text)


def test_a_language_model_that_takes_tokens_alone_is_refused(tmp_path):
    """It answers to text as alone, and could not be shown a picture."""
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no Gemma 4")
    settings = {**GROUPED, "head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    text = save_language_model(tmp_path / "text", "gemma4_text", {**settings, "hidden_size_per_layer_input": 8})
    with pytest.raises(ValueError, match="given what is no token, as it does alone .RuntimeError: .*inputs_embeds"):
        join(tmp_path, text)


def test_lfm2_answers_with_and_without_a_cache(tmp_path):
    if TRANSFORMERS_4:
        pytest.skip("refused on transformers 4")
    join(tmp_path, save_language_model(tmp_path / "text", "lfm2", LFM2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text"])
def test_half_precision(model_type, dtype, tmp_path):
    text = save_language_model(tmp_path / "text", model_type, LANGUAGE_MODELS[model_type])
    model = join(tmp_path, text, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_a_language_model_that_would_answer_with_the_placeholder(tmp_path):
    """`<image>` is a row of the vocabulary that nobody has trained, and may be the likeliest."""
    text = save_language_model(tmp_path / "text", "llama", LANGUAGE_MODELS["llama"])
    own = AutoModelForCausalLM.from_pretrained(text)
    image_token_id = len(word_tokenizer())  # by default
    with torch.no_grad():  # one of the two is the likeliest
        own.lm_head.weight[image_token_id] = 9 * own.lm_head.weight[5]
        own.lm_head.weight[image_token_id + 1] = -9 * own.lm_head.weight[5]
    own.save_pretrained(text)
    join(tmp_path, text)
    join(tmp_path, text, image_token_id=image_token_id + 1)


def test_weights_that_say_nothing_are_joined_as_they_are(tmp_path):
    """Other processes than the first hold numbers of no meaning where FSDP loads a model in one."""
    text = save_language_model(tmp_path / "text", "llama", LANGUAGE_MODELS["llama"])
    own = AutoModelForCausalLM.from_pretrained(text)
    torch.nn.init.constant_(own.lm_head.weight, torch.nan)
    own.save_pretrained(text)
    join(tmp_path, text)


def test_attention_for_other_devices_is_asked_as_eager():
    model = tiny_model()
    configs = [m.config for m in model.modules() if hasattr(m, "config") and hasattr(m.config, "num_attention_heads")]
    for config in configs:
        config._attn_implementation = "flash_attention_2"
    check_parts(model, "the model")
    assert {config._attn_implementation for config in configs} == {"flash_attention_2"}


def test_a_tower_that_sees_otherwise_is_refused():
    model = tiny_model()
    tower = transformers.CLIPVisionModel(clip_config()).eval()
    inner = getattr(tower, "vision_model", tower)
    inner.load_state_dict(model.model.vision_tower.state_dict(), strict=False)  # one block more
    features = ask_tower(tower, model.config.vision_hidden_states, "the tower")
    check_tower(model, features, "the tower")
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight[3, 5] += 0.1
    with pytest.raises(
        ValueError, match=r"the tower does not see .* instead of .* \(limit .*\) for a feature; use another"
    ):
        check_tower(model, features, "the tower")


def test_a_model_that_could_not_be_loaded_again_is_refused(tmp_path):
    """Whisper's decoder is a causal language model, and `AutoModel` makes the whole of Whisper of its config."""
    settings = {"d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4}
    settings |= {"encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48}
    settings |= {"max_target_positions": 64, "max_source_positions": 16, "decoder_start_token_id": 1}
    text = save_language_model(tmp_path / "text", "whisper", settings)
    with pytest.raises(
        ValueError, match="the language model .* a saved Honeybee could not be loaded, because .* use another one"
    ):
        join(tmp_path, text)


def test_a_folder_is_asked_too(tmp_path):
    """As publishing does it, in a process without this project."""
    check = REPOSITORY / "hub_upload" / "load_check.py"
    processor, good, bad = tiny_processor(), tmp_path / "good", tmp_path / "bad"
    ids = {"image_token_id": processor.image_token_id}
    tiny_model(config=ids).save_pretrained(good)
    torch.manual_seed(0)
    config = HoneybeeConfig(
        clip_config(), text_config("recurrent_gemma", RECURRENT_GEMMA), {"projector_type": "linear"}, **ids
    )
    model = HoneybeeForConditionalGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.save_pretrained(bad)
    for folder, number in ((good, 4), (bad, (IMAGE_SIZE // 8) ** 2)):
        tiny_processor(number).save_pretrained(folder)
    run_script(check, tmp_path / "result.json", good)
    assert json.loads((tmp_path / "result.json").read_text())["parameters"]
    result = run_script(check, tmp_path / "bad.json", bad, check=False)
    assert result.returncode and "does not answer as a part of a Honeybee" in result.stdout.splitlines()[-1]
    assert not (tmp_path / "bad.json").exists()


def test_save_llama_and_its_settings_stay(tmp_path):
    """The probe leaves nothing behind: generation settings and modes are those of a new model."""
    model = join(tmp_path, save_llama(tmp_path / "text"))
    assert not model.training and model.generation_config.suppress_tokens == [model.config.image_token_id]
    assert model.generation_config.eos_token_id == 2
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in model.parameters())
