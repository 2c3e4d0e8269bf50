# SPDX-License-Identifier: Apache-2.0
"""Scaled dot product attention over rows that hold several conversations, each attended to on its own.

transformers' own way with such a row and `sdpa` is a dense mask, (tokens, tokens), over attention that is computed for
all pairs. A batch packed into one row has some thousand tokens and conversations of some hundred, so nearly all of that
work is thrown away. Here each conversation is a causal attention by itself, as in an unpacked batch without padding: on a GPU
in half precision by torch's own kernel for rows of several lengths, elsewhere one after the other. Where flash attention is
installed (`--attn_implementation flash_attention_2`) it does the same, and nothing of this is needed.
"""

import inspect

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn

    HAS_VARLEN = "window_size" in inspect.signature(varlen_attn).parameters
except ImportError:  # before torch 2.11, which has both
    HAS_VARLEN = False

NAME = "sdpa_packed"
# Language models whose packed rows give what the same conversations give apart (tests/training/trainer/test_packing.py). Others
# find their positions or their state (convolutions, recurrences) elsewhere, and would mix conversations without a word.
PACKABLE = (
    "gemma3_text", "gpt_neox", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2",
)  # fmt: skip


def in_one_kernel(query: torch.Tensor, dropout: float, cu_seq_lens_q) -> bool:
    """Whether torch's kernel for rows of several lengths can compute an attention: a flash attention of half precision."""
    return (
        HAS_VARLEN
        and cu_seq_lens_q is not None
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and not dropout
    )


@torch.compiler.disable  # a graph for each number of conversations is of no use
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.LongTensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, conversation by conversation in a packed row.

    Args:
        query, key, value: (B, heads, T, D); fewer heads in the last two where they are shared.
        position_ids: (1, T) in a packed row, starting anew where a conversation does.
        cu_seq_lens_q: (conversations + 1,) int32, where they begin and where the last one ends, as the collator gives it; and
            `max_length_q`, the tokens of the longest.

    Returns:
        (B, T, heads, D), and no weights.
    """
    kwargs |= {"dropout": dropout, "scaling": scaling}
    packed = attention_mask is None and position_ids is not None and query.shape[2] == key.shape[2]
    if packed and in_one_kernel(query, dropout, cu_seq_lens_q):
        groups = query.shape[1] // key.shape[1]
        states = query, repeat_kv(key, groups), repeat_kv(value, groups)
        rows = (part[0].transpose(0, 1) for part in states)  # (T, heads, D)
        borders = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
        return varlen_attn(*rows, *borders, scale=scaling, window_size=(-1, 0))[None], None
    # Reading where conversations begin waits for the device.
    starts = ((position_ids[0].diff() != 1).nonzero().flatten() + 1).tolist() if packed else []
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
