# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.nn.functional as F

from modeling_honeybee.deformable_attention_honeybee import HoneybeeDeformableAttention, sampling_matrix

BATCH, QUERIES, HEADS, LEVELS, POINTS, HEIGHT, WIDTH, HEAD_WIDTH = 2, 3, 2, 2, 4, 5, 4, 6


def samples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Some points well outside the map, where the padding counts.
    locations = torch.rand(BATCH, QUERIES, HEADS, LEVELS, POINTS, 2, generator=generator) * 2 - 0.5
    weights = torch.rand(BATCH, QUERIES, HEADS, LEVELS, POINTS, generator=generator)
    value = torch.randn(BATCH, HEADS, LEVELS * HEIGHT * WIDTH, HEAD_WIDTH, generator=generator)
    return locations, weights, value


def test_against_an_explicit_loop():
    locations, weights, value = samples()
    result = sampling_matrix(locations, weights, HEIGHT, WIDTH) @ value
    maps = value.view(BATCH, HEADS, LEVELS, HEIGHT, WIDTH, HEAD_WIDTH)

    def pixel(b, h, level, row, column):
        inside = 0 <= row < HEIGHT and 0 <= column < WIDTH
        return maps[b, h, level, row, column] if inside else torch.zeros(HEAD_WIDTH)

    for b in range(BATCH):
        for h in range(HEADS):
            for q in range(QUERIES):
                expected = torch.zeros(HEAD_WIDTH)
                for level in range(LEVELS):
                    for p in range(POINTS):
                        x = locations[b, q, h, level, p, 0].item() * WIDTH - 0.5
                        y = locations[b, q, h, level, p, 1].item() * HEIGHT - 0.5
                        left, top = math.floor(x), math.floor(y)
                        dx, dy = x - left, y - top
                        sampled = (
                            (1 - dx) * (1 - dy) * pixel(b, h, level, top, left)
                            + dx * (1 - dy) * pixel(b, h, level, top, left + 1)
                            + (1 - dx) * dy * pixel(b, h, level, top + 1, left)
                            + dx * dy * pixel(b, h, level, top + 1, left + 1)
                        )
                        expected += weights[b, q, h, level, p] * sampled
                torch.testing.assert_close(result[b, h, q], expected, atol=1e-5, rtol=1e-5)


def test_gradients_against_grid_sample():
    locations, weights, value = samples(1)
    leaves = [t.requires_grad_() for t in (locations, weights, value)]
    ours = sampling_matrix(*leaves[:2], HEIGHT, WIDTH) @ value
    theirs = 0
    for level in range(LEVELS):
        size = HEIGHT * WIDTH
        maps = value[:, :, level * size : (level + 1) * size].transpose(2, 3).reshape(-1, HEAD_WIDTH, HEIGHT, WIDTH)
        grid = locations[:, :, :, level].transpose(1, 2).flatten(0, 1) * 2 - 1  # (B*h, Q, P, 2)
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)
        theirs = theirs + (sampled * weight).sum(-1).transpose(1, 2).view_as(ours)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    target = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, leaves, target), torch.autograd.grad(theirs, leaves, target)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    torch.manual_seed(0)
    attention = HoneybeeDeformableAttention(32, 4, 1, 4)
    query, features, reference = torch.randn(2, 9, 32), torch.randn(2, 64, 32), torch.rand(1, 9, 2)
    full = attention(query, features, reference, (8, 8))
    half = attention.to(dtype)(query.to(dtype), features.to(dtype), reference.to(dtype), (8, 8))
    assert half.dtype == dtype
    assert (half.float() - full).norm() / full.norm() < 2e-2
    half.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in attention.parameters())
