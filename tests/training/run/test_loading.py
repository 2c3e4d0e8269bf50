# SPDX-License-Identifier: Apache-2.0
"""The bytes that a run is said to take, against what is there."""

import pytest
import torch
from transformers import LlamaForCausalLM
from trl import ModelConfig, SFTConfig

from modeling_honeybee import HoneybeeForConditionalGeneration
from tests.tiny import save_clip, save_llama, tiny_model
from training.run.arguments import HoneybeeArguments
from training.run.plan import bytes_of, state_bytes
from training.run.settings import Settings
from training.stages import keep_trained_in_float32, parameter_counts, set_trained


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_bytes_of_weights_and_optimizer(stage, dtype, mixed, tmp_path):
    model = tiny_model().to(getattr(torch, dtype))
    set_trained(model, stage)
    if mixed:
        keep_trained_in_float32(model)
    training_args = SFTConfig(tmp_path, bf16=mixed, use_cpu=True, optim="adamw_torch")
    settings = Settings(HoneybeeArguments(stage), training_args, ModelConfig(dtype=dtype))
    sizes = state_bytes(parameter_counts(model), model.config, settings)
    model.save_pretrained(tmp_path)
    names = (tmp_path / "model.safetensors").stat().st_size - sizes["weights"]
    assert 0 < names < 20_000, "what is left is the file's list of tensors"
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sizes["trained"] == sum(p.nbytes for p in trained)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(p.detach().float()) for p in trained])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [s for state in optimizer.state.values() for name, s in state.items() if name != "step"]
    assert sizes["optimizer"] == sum(tensor.nbytes for tensor in moments)


@pytest.mark.parametrize("dtype", ["auto", None])
def test_a_new_model_is_of_its_language_models_dtype(dtype, tmp_path):
    parts = save_clip(tmp_path / "vision"), save_llama(tmp_path / "text")
    LlamaForCausalLM.from_pretrained(parts[1], dtype=torch.bfloat16).save_pretrained(parts[1])
    settings = {"projector_type": "c-abs", "num_query_tokens": 4, "hidden_size": 32, "depth": 1}
    config = HoneybeeForConditionalGeneration.config_from_vision_text_pretrained(*parts, **settings)
    model = HoneybeeForConditionalGeneration.from_vision_text_pretrained(*parts, **settings)
    assert bytes_of(dtype, config) == 2 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
