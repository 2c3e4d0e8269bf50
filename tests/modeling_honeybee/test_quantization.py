# SPDX-License-Identifier: Apache-2.0
"""Quantized loading touches the language model and nothing that an image goes through."""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration
from modeling_honeybee.modeling_honeybee import UNQUANTIZED, _keep_unquantized
from tests.tiny import clip_config, llama_config, projector_settings, tiny_inputs


def config_of(kind: str):
    if kind == "torchao":
        pytest.importorskip("torchao", reason="torchao is not installed")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    return BitsAndBytesConfig(load_in_8bit=kind == "8 bit", load_in_4bit=kind == "4 bit")


def is_quantized(module: torch.nn.Module) -> bool:
    weight = module.weight
    return (
        type(module) is not torch.nn.Linear or type(weight.data) is not torch.Tensor or not weight.is_floating_point()
    )


def linears(module: torch.nn.Module) -> list[bool]:
    return [is_quantized(part) for part in module.modules() if isinstance(part, torch.nn.Linear)]


@pytest.mark.parametrize("projector_type", ["c-abs", "d-abs"])
@pytest.mark.parametrize("kind", ["8 bit", "4 bit", "torchao"])
def test_only_the_language_model_is_quantized(kind, projector_type, tmp_path):
    quantization_config = config_of(kind)
    # Wide enough for blocks of 64 weights.
    torch.manual_seed(0)
    text = llama_config(hidden_size=64, intermediate_size=128)
    config = HoneybeeConfig(clip_config(), text, projector_settings(projector_type), image_token_id=299)
    model = HoneybeeForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    loading = {"quantization_config": quantization_config, "device_map": "cpu", "dtype": torch.float32}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, **loading)
    assert all(linears(loaded.model.language_model)) and linears(loaded.model.language_model)
    for name in ("projector", "vision_tower"):
        kept, before = loaded.model.get_submodule(name), model.model.get_submodule(name)
        assert linears(kept) and not any(linears(kept)), name
        for (key, value), (_, old) in zip(kept.state_dict().items(), before.state_dict().items(), strict=True):
            assert torch.equal(value, old), key
    assert not is_quantized(loaded.lm_head)
    headless = AutoModel.from_pretrained(tmp_path, **loading)
    assert all(linears(headless.language_model)) and not any(linears(headless.projector))
    inputs = tiny_inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.get_visual_tokens(inputs["pixel_values"]),
                                   model.model.get_visual_tokens(inputs["pixel_values"]), atol=1e-5, rtol=0)  # fmt: skip
        assert torch.isfinite(loaded(**inputs).logits).all()


def test_a_list_of_ones_own_counts():
    given = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    assert _keep_unquantized(given).llm_int8_skip_modules == ["lm_head"]


def test_the_callers_config_stays_as_it_is():
    given = BitsAndBytesConfig(load_in_8bit=True)
    assert _keep_unquantized(given).llm_int8_skip_modules == list(UNQUANTIZED)
    assert given.llm_int8_skip_modules is None
    from_dict = _keep_unquantized({"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert from_dict.llm_int8_skip_modules == list(UNQUANTIZED)
