# SPDX-License-Identifier: Apache-2.0
"""Scaled dot product attention over rows that hold several conversations, each attended to on its own.

transformers' own way with such a row and `sdpa` is a dense mask, (tokens, tokens), over attention that is computed for
all pairs. A batch packed into one row has some thousand tokens and conversations of some hundred, so nearly all of that
work is thrown away. Here each conversation is a causal attention by itself, as in an unpacked batch without padding.
Where flash attention is installed it does the same in one kernel, and nothing of this is needed.
"""

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "sdpa_packed"
# Language models whose packed rows give what the same conversations give apart (tests/training/trainer/test_packing.py). Others
# find their positions or their state (convolutions, recurrences) elsewhere, and would mix conversations without a word.
PACKABLE = (
    "gemma3_text", "gpt_neox", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2",
)  # fmt: skip


@torch.compiler.disable  # a graph for each number of conversations is of no use
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, conversation by conversation in a packed row.

    Args:
        query, key, value: (B, heads, T, D).
        position_ids: (1, T) in a packed row, starting anew where a conversation does.

    Returns:
        (B, T, heads, D), and no weights.
    """
    starts = []
    if attention_mask is None and position_ids is not None and query.shape[2] == key.shape[2]:
        starts = ((position_ids[0].diff() != 1).nonzero().flatten() + 1).tolist()
    if not starts:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = [end - start for start, end in zip([0, *starts], [*starts, query.shape[2]])]
    conversations = zip(*(states.split(lengths, dim=2) for states in (query, key, value)))
    outputs = [sdpa_attention_forward(module, *states, None, **kwargs)[0] for states in conversations]
    return torch.cat(outputs, dim=1), None


def packed_mask(
    batch_size: int, *, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs
) -> torch.Tensor | None:
    """transformers' mask for `sdpa`, and none for a packed row: the only one row without padding that transformers
    does not leave to the kernel's own causal mask in the models that [`use_packed_attention`] takes."""
    if batch_size == 1 and attention_mask is None and not allow_is_causal_skip:
        return None
    return sdpa_mask(batch_size, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, packed_mask)


def use_packed_attention(language_model: PreTrainedModel) -> bool:
    """Lets a language model that uses `sdpa` attend by conversation; returns whether it does.

    Left alone are models that use another attention, some of whose layers see a window only, or that do not hand
    positions on to their attention: transformers' masks keep conversations apart there.
    """
    config = language_model.config
    windowed = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()) or getattr(
        config, "sliding_window", None
    )
    if config._attn_implementation != "sdpa" or windowed or not language_model._supports_attention_backend:
        return False
    language_model.set_attn_implementation(NAME)
    return True
