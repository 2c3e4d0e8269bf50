# SPDX-License-Identifier: Apache-2.0
"""The lab's own projectors, its controls, and where projectors look."""

import re

import pytest
import torch

from lab import projectors
from lab.looks import map_of_tokens
from lab.projectors import (
    CANDIDATES,
    make_projector,
    matched_width,
    names_of,
    number_of_parameters,
    projector_config,
)
from lab.stand_ins import language_model_config, tower_config
from modeling_honeybee.projectors_honeybee import HoneybeeDAbstractor
from tests.tiny import REPOSITORY

PARTS = tower_config("clip"), language_model_config()
FREE = [name for name, candidate in CANDIDATES.items() if candidate.has_width]


def build(name: str, num_tokens: int = 16, hidden_size: int | None = None):
    torch.manual_seed(0)
    return make_projector(name, projector_config(name, *PARTS, num_tokens, hidden_size)).eval()


def features(number: int = 5) -> torch.Tensor:
    return torch.randn(number, 144, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_makes_its_tokens(name):
    num_tokens = 144 if CANDIDATES[name].per_patch else 16
    projector = build(name, num_tokens)
    assert projector(features()).shape == (5, num_tokens, 64)
    count = sum(parameter.numel() for parameter in projector.parameters())
    assert count == number_of_parameters(name, projector_config(name, *PARTS, num_tokens, None))


def test_average_pooling_is_the_mean_of_its_window():
    projector, patches = build("pool-mlp"), features()
    tokens = projector(patches)
    grid = (patches + projector.pos_emb).view(5, 12, 12, 64)
    window = grid[:, 3:6, 9:12].mean((1, 2))  # token 7: second row, last column of 4 x 4
    torch.testing.assert_close(tokens[:, 7], projector.mlp(window))


@pytest.mark.parametrize("name", [name for name in FREE if CANDIDATES[name].control is None])
def test_matched_widths_have_the_parameters_asked_for(name):
    width = matched_width(name, *PARTS, 16, 85_000)
    count = number_of_parameters(name, projector_config(name, *PARTS, 16, width))
    neighbours = [
        number_of_parameters(name, projector_config(name, *PARTS, 16, other))
        for other in (width - 16, width + 16)
        if other
    ]
    assert all(abs(count - 85_000) <= abs(other - 85_000) for other in neighbours)


def test_blind_says_the_same_of_every_image():
    tokens = build("blind")(features())
    torch.testing.assert_close(tokens, tokens[:1].expand_as(tokens))


def test_shuffled_tokens_are_tokens_of_other_images_too():
    projector = build("shuffled")
    tokens = super(type(projector), projector).forward(features())
    shuffled = projector(features())
    same = (shuffled.unsqueeze(1) == tokens.unsqueeze(0)).all(-1)  # (image, from image, token)
    assert same.any(1).all() and not same.diagonal().all()
    assert (same.sum(0) == 1).all()  # every token is somebody's, once


def test_placeless_tokens_do_not_tell_where_they_come_from():
    """The same patches in another order, with something that each place has in common on top, are the same tokens."""
    projector, patches = build("placeless", 144), features()
    moved = patches[:, torch.randperm(144, generator=torch.Generator().manual_seed(2))] + torch.randn(1, 144, 64)
    for tokens, wanted in zip(projector(moved), projector.mlp(patches - patches.mean(0))):
        tokens, wanted = (each[each.sum(-1).argsort()] for each in (tokens, wanted))
        torch.testing.assert_close(tokens, wanted, atol=1e-4, rtol=1e-4)


def test_names_that_are_unknown():
    assert names_of("d-abs,c-abs") == ["d-abs", "c-abs"]
    with pytest.raises(ValueError, match="--projectors: mine unknown; known are linear, .*d-abs"):
        names_of("mine,c-abs")
    with pytest.raises(ValueError, match="unknown"):
        names_of("blind")


def test_maps_of_average_pooling_and_of_the_d_abstractor_are_where_they_should_be():
    pooled = map_of_tokens(build("pool-mlp"), features(1), [7])[0]
    assert (pooled[3:6, 9:12] > 0.99).all() and pooled.sum() == pytest.approx(9, abs=1e-3)
    projector = build("d-abs")
    assert isinstance(projector, HoneybeeDAbstractor)
    for layer in projector.layers:
        torch.nn.init.zeros_(layer.cross_attn.sampling_offsets.weight)
    sampled = map_of_tokens(projector, features(1), [7])[0]
    assert sampled[4, 10] == 1 and sampled.sum() == pytest.approx(1)  # the reference point, a patch's center


def test_maps_of_the_resampler_are_its_attention():
    """Patches that are alike are looked at alike; one that is none of them stands out."""
    projector = build("resampler")
    torch.nn.init.zeros_(projector.pos_emb)
    patches = features(1)[:, :1].repeat(1, 144, 1)
    torch.testing.assert_close(map_of_tokens(projector, patches, [0, 5]), torch.ones(2, 12, 12))
    patches[0, 100] *= -1
    maps = map_of_tokens(projector, patches, [0, 5]).flatten(1)
    others = maps[:, [patch for patch in range(144) if patch != 100]]
    assert (others.std(1) < 1e-6).all() and ((maps[:, 100] - others[:, 0]).abs() > 1e-4).all()


def test_maps_of_the_c_abstractor_are_local():
    maps = map_of_tokens(build("c-abs"), features(1), [0, 15])
    assert maps[0, :4, :4].mean() > 3 * maps[0, 8:, 8:].mean()
    assert maps[1, 8:, 8:].mean() > 3 * maps[1, :4, :4].mean()


def test_the_example_of_the_docs(monkeypatch):
    """A new candidate is a class and a line."""
    text = (REPOSITORY / "docs" / "lab" / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Mine" in block]
    monkeypatch.setattr(projectors, "CANDIDATES", dict(CANDIDATES))
    exec(example, vars(projectors))
    assert build("mine")(features()).shape == (5, 16, 64)
    assert "mine" in projectors.names_of("mine,c-abs")
