# SPDX-License-Identifier: Apache-2.0
"""Deformable attention over small feature maps, in plain PyTorch.

Shapes: B batch, L levels, H x W map, h heads, d head width, Q queries, P sampling points, D = h * d.

Bilinear sampling at (x, y) with zero padding weighs the value at pixel (i, j) by max(0, 1-|x-i|) * max(0, 1-|y-j|), so
the weighted sum over a head's points is one dense (Q, H*W) matrix times the values. On the small maps of a vision tower
this is exact, deterministic and faster than `grid_sample`; it needs no gather or scatter and runs in any dtype.
"""

import torch
from torch import nn


def _tent(position: torch.Tensor, size: int) -> torch.Tensor:
    """(...) positions in [0, 1] -> (..., size) bilinear weights of the pixels along one axis (align_corners False)."""
    pixel = torch.arange(size, device=position.device, dtype=position.dtype)
    return (1 - ((position * size - 0.5).unsqueeze(-1) - pixel).abs()).clamp(min=0)


def sampling_matrix(locations: torch.Tensor, weights: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The matrix whose product with the values is the weighted bilinear sample.

    Args:
        locations: (B, Q, h, L, P, 2), (x, y) in [0, 1], float32.
        weights: (B, Q, h, L, P).

    Returns:
        (B, h, Q, L*H*W), float32.
    """
    x, y = locations.permute(0, 2, 1, 3, 4, 5).unbind(-1)  # (B, h, Q, L, P)
    rows = _tent(y, height) * weights.permute(0, 2, 1, 3, 4).unsqueeze(-1)  # (B, h, Q, L, P, H)
    columns = _tent(x, width)  # (B, h, Q, L, P, W)
    return (rows.transpose(-1, -2) @ columns).flatten(3)


class HoneybeeDeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3); all levels are H x W."""

    def __init__(self, hidden_size: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(hidden_size, samples * 2)
        self.attention_weights = nn.Linear(hidden_size, samples)
        self.value_proj = nn.Linear(hidden_size, hidden_size)
        self.output_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, query: torch.Tensor, features: torch.Tensor, reference_points: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """
        Args:
            query: (B, Q, D), the position embedding added.
            features: (B, L*H*W, D), level by level, row by row.
            reference_points: (1 or B, Q, 2), (x, y) in [0, 1].
            grid: (H, W).

        Returns:
            (B, Q, D).
        """
        batch, num_queries, _ = query.shape
        height, width = grid
        per_head = (batch, num_queries, self.num_heads, self.num_levels, self.num_points)
        # Positions stay in float32: in bfloat16 a point on a 24 x 24 map would be off by a tenth of a pixel.
        offsets = self.sampling_offsets(query).float().view(*per_head, 2)
        extent = offsets.new_tensor([width, height])
        locations = reference_points.float()[:, :, None, None, None, :] + offsets / extent
        # A view of its own: vLLM merges linear layers that read one argument, and splits the result between its ranks.
        weights = self.attention_weights(query.flatten(0, 1)).float().view(*per_head[:3], -1).softmax(-1).view(per_head)

        value = self.value_proj(features).view(batch, -1, self.num_heads, query.shape[-1] // self.num_heads)
        matrix = sampling_matrix(locations, weights, height, width).to(value.dtype)
        sampled = matrix @ value.transpose(1, 2)  # (B, h, Q, d)
        return self.output_proj(sampled.transpose(1, 2).flatten(2))
