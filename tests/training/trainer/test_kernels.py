# SPDX-License-Identifier: Apache-2.0
"""Liger's kernels and compiled blocks are faster code for the same numbers."""

import copy
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import SFT, SHORT_RUN, llama_config, run_script, sample, write_dataset
from training.run.settings import parse_arguments
from training.trainer import kernels, packed_attention
from training.trainer.packed_attention import use_packed_attention

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
    if torch.cuda.is_available():
        torch.cuda.init()  # not while a checkpoint is computed
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
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8


def test_the_trainer_compiles_nothing_else():
    settings = parse_arguments(["--output_dir", "out", "--use_cpu", "--torch_compile"])
    assert settings.compile == {"backend": "inductor", "mode": None} and not settings.liger
    assert not settings.training.torch_compile and settings.training.torch_compile_backend is None
    settings = parse_arguments(["--output_dir", "out", "--use_cpu", "--use_liger_kernel"])
    assert settings.liger and settings.compile is None and not settings.training.use_liger_kernel


def numbers_of(model, ids, positions) -> list[torch.Tensor]:
    """Hidden states of packed conversations, and all gradients, on the CPU in double precision."""
    lengths = (positions[0] == 0).nonzero().flatten()
    borders = torch.cat([lengths, torch.tensor([positions.shape[1]])]).int()
    inputs = {"input_ids": ids, "position_ids": positions, "cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    inputs |= dict.fromkeys(("max_length_q", "max_length_k"), int(borders.diff().max()))
    model.zero_grad()
    found = model(**inputs, use_cache=False).last_hidden_state
    found.double().square().mean().backward()
    return [one.detach().cpu().double() for one in (found, *(parameter.grad for parameter in model.parameters()))]


@ON_A_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("what", ["liger", "one kernel"])
def test_a_gpu_computes_the_same(what, key_heads, dtype, monkeypatch):
    from transformers import LlamaModel
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # Liger replaces them
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    torch.manual_seed(0)
    config = llama_config(hidden_size=64, num_key_value_heads=key_heads, initializer_range=0.05)
    exact = LlamaModel(config).double()
    plain = copy.deepcopy(exact).to("cuda", dtype)
    faster = copy.deepcopy(plain)
    positions = torch.cat([torch.arange(length) for length in (40, 7, 90)])[None]
    ids = torch.randint(3, 300, positions.shape)
    for model in (exact, plain, faster):
        use_packed_attention(model)
    if what == "one kernel":
        if dtype == torch.float32 or not packed_attention.HAS_VARLEN:
            pytest.skip("the kernel is of half precision, and of torch 2.11")
        monkeypatch.setattr(packed_attention, "HAS_VARLEN", False)
    numbers = [numbers_of(exact, ids, positions), numbers_of(plain, ids, positions)]
    monkeypatch.undo() if what == "one kernel" else kernels.use_liger_kernels(faster)
    numbers.append(numbers_of(faster, ids, positions))
    for name, one, two, three in zip(["states", *(name for name, _ in exact.named_parameters())], *numbers):
        errors = [(other - one).abs().max() / one.abs().max() for other in (two, three)]
        assert errors[1] <= 3 * errors[0] + 1e-5, (name, errors)
