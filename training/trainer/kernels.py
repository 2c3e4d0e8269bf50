# SPDX-License-Identifier: Apache-2.0
"""Faster code for the blocks of the language model: Liger's kernels, and torch.compile.

The trainer's own way with both takes the whole model: Liger does not know its type, and one graph for tower, projector and
LLM would be compiled anew for each number of images. Here they are for the LLM alone, whose blocks are nearly all of a step.
"""

from importlib.metadata import PackageNotFoundError, version

import torch
from transformers import PreTrainedModel


def check_liger(model_type: str, device: torch.device | None) -> None:
    """Whether Liger's kernels can be had.

    Args:
        model_type: of the language model.
        device: that the run uses, or None where that is not known.

    Raises:
        ValueError: with the remedy.
    """
    if device is not None and device.type == "cpu":
        raise ValueError("use_liger_kernel: Liger's kernels run on a GPU, and this run has none; leave it out")
    try:
        version("liger-kernel")
    except PackageNotFoundError:
        raise ValueError(
            "use_liger_kernel: Liger is not installed; pip install liger-kernel, or leave it out"
        ) from None
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"use_liger_kernel: Liger has no kernels for an LLM of type {model_type!r}; leave it out (it knows "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))})"
        )


def check_compile(backend: str, mode: str | None) -> None:
    """Raises a ValueError where `torch.compile` does not know a backend or a mode."""
    try:
        torch.compile(torch.nn.Identity(), backend=backend, mode=mode)
    except Exception as error:
        said = str(error).strip().splitlines()[0]
        raise ValueError(
            f"torch_compile_backend={backend!r} with torch_compile_mode={mode!r} cannot be: {said}; leave both out for "
            "inductor's default"
        ) from error


def use_liger_kernels(language_model: PreTrainedModel) -> None:
    """Puts Liger's norms, MLPs and rotary embedding into a language model without head, whose weights stay as they are. The
    loss is not Liger's: TRL's never holds all logits either."""
    # No public name, and the one that transformers and TRL take.
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=language_model, fused_linear_cross_entropy=False, cross_entropy=False)


def compile_blocks(language_model: PreTrainedModel, backend: str = "inductor", mode: str | None = None) -> int:
    """Compiles what the blocks of a language model consist of (attention, MLP, norms), in place: the names of weights stay.
    All blocks share their graphs, for rows of any length.

    The parts and not the block: gradient checkpointing, which transformers puts into a block's forward, would let nothing be
    compiled around what cannot be, the attention by conversation.

    Args:
        backend, mode: as of `torch.compile`.

    Returns:
        The number of blocks.
    """
    kinds = set(language_model._no_split_modules or ())
    blocks = [module for module in language_model.modules() if type(module).__name__ in kinds]
    for block in blocks:
        for part in block.children():
            part.compile(backend=backend, mode=mode, dynamic=True)
    return len(blocks)
