# SPDX-License-Identifier: Apache-2.0
"""The projectors that the lab compares, and its controls. A new one is a class here and a line in `CANDIDATES`.

Shapes: B images, N patches on a square, M visual tokens, D_v and D_lm widths of tower and language model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration
from modeling_honeybee.projectors_honeybee import PROJECTORS, HoneybeeProjector


class PoolMLP(HoneybeeProjector):
    """Average pooling to sqrt(M) x sqrt(M), then an MLP with one hidden layer: what a C-Abstractor without convolutions
    comes to, and so the baseline that it must beat. With M = N it is an MLP on each patch."""

    def __init__(self, config: HoneybeeConfig):
        super().__init__(config)
        hidden = config.projector_config.hidden_size
        self.mlp = nn.Sequential(
            nn.Linear(config.vision_config.hidden_size, hidden),
            nn.SiLU(),
            nn.Linear(hidden, config.text_config.hidden_size),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(self.num_patches)
        x = self.add_positions(features).transpose(1, 2).unflatten(2, (side, side))  # (B, D_v, H, W)
        x = F.adaptive_avg_pool2d(x, math.isqrt(self.num_query_tokens))
        return self.mlp(x.flatten(2).transpose(1, 2))


class Blind(PoolMLP):
    """Control: the same tokens for every image. What it gets right can be guessed."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.zeros_like(features))


class Shuffled(PROJECTORS["c-abs"]):
    """Planted fault: each token comes from an image of the batch that is drawn by chance."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = super().forward(features)  # (B, M, D_lm)
        order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(0).unsqueeze(-1)
        return tokens.gather(0, order.expand_as(tokens))


class Placeless(PoolMLP):
    """Planted fault: no position reaches the language model. There is no position embedding; what the tower's features
    of one place have in common is taken out of them (it is their mean over the batch); and the patches come in an order
    that is drawn by chance."""

    def __init__(self, config: HoneybeeConfig):
        super().__init__(config)
        self.pos_emb = None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features - features.mean(0, keepdim=True)
        order = torch.rand(features.shape[:2], device=features.device).argsort(1).unsqueeze(-1)
        return super().forward(features.gather(1, order.expand_as(features)))


class ScaledCAbstractor(PROJECTORS["c-abs"]):
    """A C-Abstractor whose pooled map is scaled and shifted by channel, for each M in a way of its own. (It is done before
    pooling, whose means come out the same.)"""

    def __init__(self, config: HoneybeeConfig):
        super().__init__(config)
        settings = config.projector_config
        self.places = {number: place for place, number in enumerate(settings.elastic_num_query_tokens)}
        self.scale = nn.Parameter(torch.ones(len(self.places), settings.hidden_size))
        self.shift = nn.Parameter(torch.zeros(len(self.places), settings.hidden_size))

    def decode(self, features: torch.Tensor, num_query_tokens: int) -> torch.Tensor:
        place = self.places[num_query_tokens]
        return super().decode(features * self.scale[place] + self.shift[place], num_query_tokens)


@dataclass(frozen=True)
class Candidate:
    """
    Args:
        build: makes the projector, (B, N, D_v) -> (B, M, D_lm), from a config.
        settings: of `HoneybeeProjectorConfig`. `hidden_size` is what the default width sets.
        per_patch: M = N, always.
        has_width: `hidden_size` changes its number of parameters.
        control: no projector but a check of the lab; it takes the learning rate of this candidate.
        scaled: makes one with weights of its own for each M that it is trained for.
    """

    build: Callable[[HoneybeeConfig], nn.Module]
    settings: dict = field(default_factory=dict)
    per_patch: bool = False
    has_width: bool = True
    control: str | None = None
    scaled: Callable[[HoneybeeConfig], nn.Module] | None = None


CANDIDATES = {
    "linear": Candidate(PROJECTORS["linear"], {"projector_type": "linear"}, per_patch=True, has_width=False),
    "mlp": Candidate(PROJECTORS["mlp"], {"projector_type": "mlp"}, per_patch=True, has_width=False),
    "pool-mlp": Candidate(PoolMLP),
    "resampler": Candidate(
        PROJECTORS["resampler"], {"projector_type": "resampler", "num_hidden_layers": 3, "num_attention_heads": 4}
    ),
    "c-abs": Candidate(PROJECTORS["c-abs"], scaled=ScaledCAbstractor),
    "d-abs": Candidate(PROJECTORS["d-abs"], {"projector_type": "d-abs", "num_hidden_layers": 3}),
    "blind": Candidate(Blind, control="pool-mlp"),
    "shuffled": Candidate(Shuffled, control="c-abs"),
    "placeless": Candidate(Placeless, per_patch=True, control="mlp"),
}


def names_of(given: str | None, left_out: tuple[str, ...] = ()) -> list[str]:
    """Names of projectors from a list with commas; None: all but some.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    known = [name for name, candidate in CANDIDATES.items() if candidate.control is None]
    names = list(dict.fromkeys(given.split(","))) if given else [name for name in known if name not in left_out]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--projectors: {', '.join(unknown)} unknown; known are {', '.join(known)}")
    return names


def projector_config(
    name: str, vision_config, text_config, num_tokens: int, hidden_size: int | None, trained_at: tuple[int, ...] = ()
) -> HoneybeeConfig:
    """The config that a candidate is built from. All get a learned position embedding and no dropout, so that they do not
    differ by those; `hidden_size` None: the tower's width; `trained_at`: the M of an elastic one.

    Raises:
        ValueError: the candidate cannot make `num_tokens` visual tokens, or its settings are wrong.
    """
    settings = {
        "projector_type": "c-abs",
        "num_query_tokens": num_tokens,
        "hidden_size": hidden_size or vision_config.hidden_size,
        "pos_emb": True,
        "dropout": 0.0,
        "elastic_num_query_tokens": sorted(trained_at) or None,
        **CANDIDATES[name].settings,
    }
    # A placeholder has no row in the language model's embedding: rows are put in before it is asked.
    return HoneybeeConfig(vision_config, text_config, settings, image_token_id=text_config.vocab_size)


def make_projector(name: str, config: HoneybeeConfig, scaled: bool = False) -> nn.Module:
    """A candidate, or its `scaled` kind, with new weights. They start as those of a new Honeybee do; but its standard
    deviation is meant for layers of 1024 inputs, so that here each linear layer has the one that does the same for its own
    number of inputs."""
    candidate = CANDIDATES[name]
    projector = (candidate.scaled if scaled else candidate.build)(config)
    with torch.device("meta"):
        model = HoneybeeForConditionalGeneration(config)
    projector.apply(model._init_weights)
    with torch.no_grad():
        for module in projector.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(math.sqrt(1024 / module.in_features))
    return projector


def number_of_parameters(name: str, config: HoneybeeConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CANDIDATES[name].build(config).parameters())


def matched_width(name: str, vision_config, text_config, num_tokens: int, parameters: int, step: int = 16) -> int:
    """The `hidden_size`, a multiple of `step`, with which a candidate's number of parameters comes nearest."""

    def distance(width: int) -> int:
        config = projector_config(name, vision_config, text_config, num_tokens, width)
        return abs(number_of_parameters(name, config) - parameters)

    best = step
    while distance(2 * best) < distance(best):
        best *= 2
    return min(range(step, 2 * best + 1, step), key=distance)
