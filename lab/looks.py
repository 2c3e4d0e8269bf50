# SPDX-License-Identifier: Apache-2.0
"""Where projectors look: for one image, the patches that visual tokens are made from.

- C-Abstractor, and any projector that has no kind of its own here: the gradient of a token's norm by the features.
- D-Abstractor: the points that a query samples, in all layers and heads, by their weight.
- resampler: the attention of a query to the patches, mean over layers and heads.

Shapes: N patches on a square of side H, M visual tokens.
"""

import math
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from modeling_honeybee.deformable_attention_honeybee import HoneybeeDeformableAttention, sampling_matrix
from modeling_honeybee.projectors_honeybee import HoneybeeDAbstractor, HoneybeeResampler, ResamplerLayer


def map_of_tokens(projector: nn.Module, features: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """How much each patch counts for some tokens of one image.

    Args:
        features: (1, N, D_v).
        tokens: which of the M.

    Returns:
        (tokens, H, H), at least 0, the largest of each map 1.
    """
    projector.eval()
    if isinstance(projector, HoneybeeDAbstractor):
        maps = _sampled(projector, features)[tokens]
    elif isinstance(projector, HoneybeeResampler):
        maps = _attended(projector, features)[tokens]
    else:
        maps = torch.stack([_gradient(projector, features, token) for token in tokens])
    side = math.isqrt(features.shape[1])
    maps = maps / maps.amax(1, keepdim=True).clamp(min=1e-12)
    return maps.unflatten(1, (side, side))


def _gradient(projector: nn.Module, features: torch.Tensor, token: int) -> torch.Tensor:
    """(N,) norms of the gradients."""
    features = features.detach().requires_grad_()
    norm = projector(features)[0, token].norm()
    return torch.autograd.grad(norm, features)[0][0].norm(dim=-1)


@contextmanager
def _inputs_of(projector: nn.Module, kind: type[nn.Module]):
    """What the modules of a class are called with, in their order."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: seen.append((module, args)))
        for module in projector.modules()
        if isinstance(module, kind)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def _sampled(projector: HoneybeeDAbstractor, features: torch.Tensor) -> torch.Tensor:
    """(M, N): the matrices by which the values are summed, mean over layers and heads."""
    found = []
    with _inputs_of(projector, HoneybeeDeformableAttention) as seen:
        projector(features)
    for module, (query, _, reference_points, (height, width)) in seen:
        shape = (1, query.shape[1], module.num_heads, module.num_levels, module.num_points)
        offsets = module.sampling_offsets(query).view(*shape, 2) / query.new_tensor([width, height])
        weights = module.attention_weights(query).view(*shape[:3], -1).softmax(-1).view(shape)
        locations = reference_points[:, :, None, None, None, :] + offsets
        found.append(sampling_matrix(locations, weights, height, width)[0].mean(0))
    return torch.stack(found).mean(0)


@torch.no_grad()
def _attended(projector: HoneybeeResampler, features: torch.Tensor) -> torch.Tensor:
    """(M, N) attention to the patches."""
    found = []
    with _inputs_of(projector, ResamplerLayer) as seen:
        projector(features)
    for module, (query, patches) in seen:
        query = module.norm_query(query)
        memory = torch.cat([query, module.norm_features(patches)], dim=1)
        heads = partial(torch.unflatten, dim=-1, sizes=(module.num_heads, -1))
        q, k = (heads(t).transpose(1, 2) for t in (module.q_proj(query), module.k_proj(memory)))
        attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        found.append(attention[0, :, :, query.shape[1] :].mean(0))
    return torch.stack(found).mean(0)
