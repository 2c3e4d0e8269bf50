# SPDX-License-Identifier: Apache-2.0
"""Liger's kernels and compiled blocks are faster code for the same numbers."""

import copy
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import REPOSITORY, SHORT_RUN, llama_config, run_script, sample, write_dataset
from training.run.settings import parse_arguments
from training.trainer import kernels
from training.trainer.packed_attention import use_packed_attention

SFT = REPOSITORY / "training" / "sft.py"
ON_A_GPU = pytest.mark.skipif(
    not (torch.cuda.is_available() and find_spec("liger_kernel")), reason="Liger's kernels need a GPU, and liger-kernel"
)


@pytest.mark.parametrize("checkpointing", ["True", "False"])
def test_compiled_blocks_train_the_same(saved, tmp_path, checkpointing):
    data = write_dataset(tmp_path / "data", [sample(i, image=i % 2 == 0) for i in range(12)])
    run = [*SHORT_RUN, "--model_name_or_path", saved, "--dataset", data, "--max_steps", 3, "--learning_rate", 1e-3]
    run += ["--adam_epsilon", 1e-6, "--gradient_checkpointing", checkpointing]
    run_script(SFT, *run, "--output_dir", tmp_path / "plain")
    run_script(SFT, *run, "--output_dir", tmp_path / "compiled", "--torch_compile_backend", "aot_eager")
    plain, compiled = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    before = load_file(saved / "model.safetensors")
    assert plain.keys() == compiled.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert any(not torch.equal(plain[name], before[name]) for name in plain if "language_model" in name)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_graphs_serve_all_blocks_and_lengths(checkpointing):
    from transformers import LlamaModel

    eager = LlamaModel(llama_config(num_hidden_layers=12)).train()
    use_packed_attention(eager)
    compiled = copy.deepcopy(eager)
    if checkpointing:
        compiled.gradient_checkpointing_enable({"use_reentrant": False})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert kernels.compile_blocks(compiled, "eager") == 12
    for lengths in [(7, 5), (9, 11), (20, 3, 4), (13,), (6, 31), (17, 8, 9, 2), (25, 26)]:
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        ids = torch.randint(3, 300, positions.shape)
        states = []
        for model in (eager, compiled):
            found = model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            found.square().mean().backward()
            states.append(found)
        torch.testing.assert_close(*states)
    for one, other in zip(eager.parameters(), compiled.parameters()):
        torch.testing.assert_close(other.grad, one.grad)
    # A norm, an MLP, and attention before and behind the kernel, whose output has other strides for one conversation.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5


def test_the_trainer_compiles_nothing_else():
    settings = parse_arguments(["--output_dir", "out", "--use_cpu", "--torch_compile"])
    assert settings.compile == {"backend": "inductor", "mode": None} and not settings.liger
    assert not settings.training.torch_compile and settings.training.torch_compile_backend is None
    settings = parse_arguments(["--output_dir", "out", "--use_cpu", "--use_liger_kernel"])
    assert settings.liger and settings.compile is None and not settings.training.use_liger_kernel


@ON_A_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_computes_the_same(dtype):
    from transformers import LlamaModel

    torch.manual_seed(0)
    plain = LlamaModel(llama_config(hidden_size=64, initializer_range=0.05)).to("cuda", dtype)
    liger = copy.deepcopy(plain)
    positions = torch.cat([torch.arange(length) for length in (40, 7, 90)])[None].cuda()
    ids = torch.randint(3, 300, positions.shape, device="cuda")
    states = []
    for model in (plain, liger):
        use_packed_attention(model)
        if model is liger:
            kernels.use_liger_kernels(model)
            assert "Liger" in repr(model)
        found = model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        found.float().square().mean().backward()
        states.append(found)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(*states, **tolerance)
    for (name, one), other in zip(plain.named_parameters(), liger.parameters()):
        scale = one.grad.abs().max().item()
        torch.testing.assert_close(
            other.grad, one.grad, rtol=0, atol=scale * (1e-4 if dtype == torch.float32 else 0.05), msg=name
        )
