# SPDX-License-Identifier: Apache-2.0
"""The five projectors: patch features in, visual tokens out (paper, section 3).

Shapes: B images, N patches on a square grid, M = `num_query_tokens`, E = `num_eos_tokens`, D_v width of the vision
tower, D hidden width of the projector, D_lm width of the language model, L feature levels.
Every projector maps (B, N, D_v), or (B, L, N, D_v) for several levels, to (B, M + E, D_lm), M of the call or the default.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_honeybee import HoneybeeConfig
from .deformable_attention_honeybee import HoneybeeDeformableAttention


def _mlp(in_features: int, out_features: int, depth: int) -> nn.Sequential:
    layers = [nn.Linear(in_features, out_features)]
    for _ in range(depth - 1):
        layers += [nn.SiLU(), nn.Linear(out_features, out_features)]
    return nn.Sequential(*layers)


def _cell_centers(side: int, device=None) -> torch.Tensor:
    """(1, side * side, 2), the (x, y) of the cells of a regular grid in [0, 1], row by row."""
    center = (torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side
    y, x = torch.meshgrid(center, center, indexing="ij")
    return torch.stack([x, y], dim=-1).view(1, -1, 2)


def _resize_table(table: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(1, M', D) on a square grid -> (1, M, D), bilinear, in float32."""
    side, target_side = math.isqrt(table.shape[1]), math.isqrt(num_tokens)
    image = table.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(target_side, target_side), mode="bilinear", align_corners=False)
    return image.flatten(2).transpose(1, 2)


class HoneybeeProjector(nn.Module):
    """What all projectors share: position embedding, extra tokens, how their own parameters start, and images of
    different M in one call.

    A projector is two functions: `encode`, (B, N, D_v) -> features whatever M is, and `decode`, features -> (B, M + E, D_lm).
    """

    pos_emb_width = "vision"  # D_v; the D-Abstractor adds its embedding after the input projection
    eos_width = "text"

    def __init__(self, config: HoneybeeConfig):
        super().__init__()
        settings = config.projector_config
        self.num_patches = config.num_patches
        self.num_query_tokens, self.num_eos_tokens = settings.num_query_tokens, settings.num_eos_tokens
        self.initializer_range = settings.initializer_range
        width = {
            "vision": config.vision_config.hidden_size,
            "hidden": settings.hidden_size,
            "text": config.text_config.hidden_size,
        }
        self.pos_emb = (
            nn.Parameter(torch.empty(1, self.num_patches, width[self.pos_emb_width])) if settings.pos_emb else None
        )
        self.eos_tokens = (
            nn.Parameter(torch.empty(1, settings.num_eos_tokens, width[self.eos_width]))
            if settings.num_eos_tokens
            else None
        )

    def forward(self, features: torch.Tensor, num_query_tokens: int | list[int] | None = None) -> torch.Tensor:
        """
        Args:
            features: (B, N, D_v), or (B, L, N, D_v) for several levels.
            num_query_tokens: M of all images, or a list with the M of each. Default: the config's.

        Returns:
            (B, M + E, D_lm); or, for a list, the tokens of one image after the other, (sum of all M + E, D_lm).
        """
        features = self.encode(features)
        if not isinstance(num_query_tokens, list):
            return self.decode(features, num_query_tokens or self.num_query_tokens)
        numbers = torch.tensor(num_query_tokens)
        order = numbers.argsort(stable=True)
        distinct, counts = numbers.unique(return_counts=True)
        alike = features.index_select(0, order.to(features.device)).split(counts.tolist())
        tokens = [self.decode(part, number).flatten(0, 1) for part, number in zip(alike, distinct.tolist())]
        lengths = numbers + self.num_eos_tokens
        places = order.repeat_interleave(lengths[order]).argsort(stable=True)  # of the tokens, image by image
        return torch.cat(tokens).index_select(0, places.to(features.device))

    def reset_own_parameters(self):
        """Start the parameters that belong to no submodule. Through `nn.init`, because transformers guards loaded tensors
        against its functions; a parameter that is set in another way must look at `_is_hf_initialized` itself."""
        if self.pos_emb is not None:
            nn.init.trunc_normal_(self.pos_emb, std=0.02)
        if self.eos_tokens is not None:
            nn.init.trunc_normal_(self.eos_tokens, std=self.initializer_range)

    def add_positions(self, features: torch.Tensor) -> torch.Tensor:
        return features if self.pos_emb is None else features + self.pos_emb

    def append_eos(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.eos_tokens is None:
            return tokens
        return torch.cat([tokens, self.eos_tokens.expand(tokens.shape[0], -1, -1)], dim=1)


class HoneybeeMLPProjector(HoneybeeProjector):
    """Linear layers applied to each patch; M = N. `linear` is this with one layer, `mlp` with two."""

    def __init__(self, config: HoneybeeConfig):
        super().__init__(config)
        settings, vision_width = config.projector_config, config.vision_config.hidden_size
        self.prenorm = nn.LayerNorm(vision_width, eps=1e-6) if settings.prenorm else nn.Identity()
        self.mlp = _mlp(vision_width, config.text_config.hidden_size, settings.depth)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        return self.add_positions(self.prenorm(features))

    def decode(self, features: torch.Tensor, num_query_tokens: int) -> torch.Tensor:
        return self.append_eos(self.mlp(features))


class SqueezeExcite(nn.Module):
    """Gates the channels of a (B, H, W, C) map by its mean."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, squeezed)
        self.fc2 = nn.Linear(squeezed, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.fc2(F.silu(self.fc1(x.mean(dim=(1, 2), keepdim=True))))
        return x * gate.sigmoid()


class CAbstractorBlock(GradientCheckpointingLayer):
    """RegNet bottleneck with ratio 1 and depthwise 3 x 3 convolution, channels last: (B, H, W, C_in) -> (B, H, W, C).

    A 1 x 1 convolution on channels-last data is a Linear layer, and LayerNorm over channels needs no transposition.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv1 = nn.Linear(in_channels, channels, bias=False)
        self.norm1 = nn.LayerNorm(channels, eps=1e-5)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)
        # The squeezed width follows the input of the block, as in RegNet.
        self.squeeze_excite = SqueezeExcite(channels, round(0.25 * in_channels))
        self.conv3 = nn.Linear(channels, channels, bias=False)
        self.norm3 = nn.LayerNorm(channels, eps=1e-5)
        self.shortcut = (
            nn.Identity()
            if in_channels == channels
            else nn.Sequential(nn.Linear(in_channels, channels, bias=False), nn.LayerNorm(channels, eps=1e-5))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        y = self.conv2(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # permuted views: memory stays channels last
        y = self.squeeze_excite(F.silu(self.norm2(y)))
        return F.silu(self.norm3(self.conv3(y)) + self.shortcut(x))


class HoneybeeCAbstractor(HoneybeeProjector):
    """Convolution blocks, adaptive average pooling to sqrt(M) x sqrt(M), convolution blocks, MLP readout."""

    def __init__(self, config: HoneybeeConfig):
        super().__init__(config)
        settings, vision_width = config.projector_config, config.vision_config.hidden_size
        hidden = settings.hidden_size
        self.prenorm = nn.LayerNorm(vision_width, eps=1e-6) if settings.prenorm else nn.Identity()
        widths = [vision_width] + [hidden] * (2 * settings.depth)
        blocks = [CAbstractorBlock(a, b) for a, b in zip(widths[:-1], widths[1:])]
        self.stage1 = nn.ModuleList(blocks[: settings.depth])
        self.stage2 = nn.ModuleList(blocks[settings.depth :])
        self.readout = _mlp(widths[-1], config.text_config.hidden_size, settings.mlp_depth)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(self.num_patches)
        x = self.add_positions(self.prenorm(features))
        x = x.unflatten(1, (side, side))  # (B, H, W, D_v)
        for block in self.stage1:
            x = block(x)
        return x

    def decode(self, features: torch.Tensor, num_query_tokens: int) -> torch.Tensor:
        x = features.permute(0, 3, 1, 2)
        x = F.adaptive_avg_pool2d(x, math.isqrt(num_query_tokens)).permute(0, 2, 3, 1)
        for block in self.stage2:
            x = block(x)
        return self.append_eos(self.readout(x.flatten(1, 2)))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, dropout: float) -> torch.Tensor:
    """(B, Q, D), (B, K, D), (B, K, D) -> (B, Q, D)."""
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2).flatten(2)


class DAbstractorSelfAttention(nn.Module):
    """Attention among the queries; the position embedding is added to query and key only."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, target: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        placed = target + position
        return self.out_proj(
            _attend(self.q_proj(placed), self.k_proj(placed), self.v_proj(target), self.num_heads, dropout=0.0)
        )


class DAbstractorLayer(GradientCheckpointingLayer):
    """Deformable DETR decoder layer, post-norm."""

    def __init__(self, config: HoneybeeConfig):
        super().__init__()
        settings = config.projector_config
        hidden, heads = settings.hidden_size, settings.num_attention_heads
        self.self_attn = DAbstractorSelfAttention(hidden, heads)
        self.self_attn_layer_norm = nn.LayerNorm(hidden)
        self.cross_attn = HoneybeeDeformableAttention(
            hidden, heads, len(config.vision_feature_layers), settings.num_sampling_points
        )
        self.cross_attn_layer_norm = nn.LayerNorm(hidden)
        self.fc1 = nn.Linear(hidden, settings.intermediate_size)
        self.fc2 = nn.Linear(settings.intermediate_size, hidden)
        self.final_layer_norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, target, position, features, reference_points, grid):
        x = self.self_attn_layer_norm(target + self.dropout(self.self_attn(target, position)))
        sampled = self.cross_attn(x + position, features, reference_points, grid)
        x = self.cross_attn_layer_norm(x + self.dropout(sampled))
        return self.final_layer_norm(x + self.dropout(self.fc2(F.relu(self.fc1(x)))))


class HoneybeeDAbstractor(HoneybeeProjector):
    """M queries that sample the feature map around learned reference points.

    For an M that has no queries of its own, the learned ones and their distances from a regular grid are interpolated.
    """

    pos_emb_width = "hidden"
    eos_width = "hidden"

    def __init__(self, config: HoneybeeConfig):
        super().__init__(config)
        settings, vision_width = config.projector_config, config.vision_config.hidden_size
        text_width, hidden = config.text_config.hidden_size, settings.hidden_size
        self.num_levels = len(config.vision_feature_layers)
        self.pooled_v_target = settings.pooled_v_target
        self.input_proj = nn.ModuleList(
            nn.Identity() if vision_width == hidden else nn.Linear(vision_width, hidden) for _ in range(self.num_levels)
        )
        self.level_emb = nn.Parameter(torch.empty(1, self.num_levels, 1, hidden)) if self.num_levels > 1 else None
        self.num_learned = settings.num_learned_queries
        self.query_embeddings = nn.Embedding(self.num_learned, 2 * hidden if self.pooled_v_target == "none" else hidden)
        self.reference_points = nn.Parameter(torch.empty(1, self.num_learned, 2))
        self.layers = nn.ModuleList(DAbstractorLayer(config) for _ in range(settings.num_hidden_layers))
        self.output_proj = nn.Identity() if hidden == text_width else nn.Linear(hidden, text_width)

    def reset_own_parameters(self):
        super().reset_own_parameters()
        if self.level_emb is not None:
            nn.init.normal_(self.level_emb)
        if not getattr(self.reference_points, "_is_hf_initialized", False):  # set on tensors that were loaded
            with torch.no_grad():
                self.reference_points.copy_(_cell_centers(math.isqrt(self.num_learned)))

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        if self.num_levels == 1:
            features = features.unsqueeze(1)
        features = torch.stack([project(features[:, i]) for i, project in enumerate(self.input_proj)], dim=1)
        if self.pos_emb is not None:
            features = features + self.pos_emb.unsqueeze(1)
        if self.level_emb is not None:
            features = features + self.level_emb
        return features  # (B, L, N, D)

    def _queries(self, num_query_tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Learned queries (1, M, D or 2 D) and reference points (1, M, 2)."""
        # By a call, not by reading the weight, which offloading and sharding bring in for a call alone.
        learned = self.query_embeddings(torch.arange(self.num_learned, device=device)).unsqueeze(0)
        if num_query_tokens == self.num_learned:
            return learned, self.reference_points
        moved = self.reference_points.float() - _cell_centers(math.isqrt(self.num_learned), device)
        points = _cell_centers(math.isqrt(num_query_tokens), device) + _resize_table(moved, num_query_tokens)
        return _resize_table(learned, num_query_tokens).to(learned.dtype), points

    def decode(self, features: torch.Tensor, num_query_tokens: int) -> torch.Tensor:
        batch, side = len(features), math.isqrt(self.num_patches)
        learned, reference_points = self._queries(num_query_tokens, features.device)
        if self.pooled_v_target == "none":
            position, target = learned.expand(batch, -1, -1).chunk(2, dim=-1)
        else:
            image = features[:, 0].unflatten(1, (side, side)).permute(0, 3, 1, 2)
            pooled = F.adaptive_avg_pool2d(image, math.isqrt(num_query_tokens)).flatten(2).transpose(1, 2)  # (B, M, D)
            learned = learned.expand_as(pooled)
            position, target = (pooled, learned) if self.pooled_v_target == "query" else (learned, pooled)

        features = features.flatten(1, 2)
        for layer in self.layers:
            target = layer(target, position, features, reference_points, (side, side))
        return self.output_proj(self.append_eos(target))


class ResamplerLayer(GradientCheckpointingLayer):
    """Cross-attention of the queries to themselves and the image, then a SwiGLU feed-forward.

    The residual is the normalised query, not the raw one.
    """

    def __init__(self, config: HoneybeeConfig):
        super().__init__()
        settings = config.projector_config
        hidden, intermediate = settings.hidden_size, settings.intermediate_size
        self.num_heads, self.dropout = settings.num_attention_heads, settings.dropout
        self.norm_query = nn.LayerNorm(hidden)
        self.norm_features = nn.LayerNorm(hidden)
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)
        self.norm_mlp = nn.LayerNorm(hidden)
        self.gate_proj = nn.Linear(hidden, intermediate)
        self.up_proj = nn.Linear(hidden, intermediate)
        self.norm_inner = nn.LayerNorm(intermediate, eps=settings.layer_norm_eps)
        self.down_proj = nn.Linear(intermediate, hidden)

    def forward(self, query: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        query = self.norm_query(query)
        memory = torch.cat([query, self.norm_features(features)], dim=1)
        dropout = self.dropout if self.training else 0.0
        attended = _attend(self.q_proj(query), self.k_proj(memory), self.v_proj(memory), self.num_heads, dropout)
        x = query + self.out_proj(attended)
        y = self.norm_mlp(x)
        return x + self.down_proj(self.norm_inner(F.silu(self.gate_proj(y)) * self.up_proj(y)))


class HoneybeeResampler(HoneybeeProjector):
    """The baseline: M learned queries that attend to the whole image (mPLUG-Owl's abstractor). Of more queries, the first
    M (arXiv 2405.19315)."""

    def __init__(self, config: HoneybeeConfig):
        super().__init__(config)
        settings = config.projector_config
        self.input_proj = nn.Linear(config.vision_config.hidden_size, settings.hidden_size)
        self.query_tokens = nn.Parameter(torch.empty(1, settings.num_learned_queries, settings.hidden_size))
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(settings.num_hidden_layers))
        self.output_proj = nn.Linear(settings.hidden_size, config.text_config.hidden_size)

    def reset_own_parameters(self):
        super().reset_own_parameters()
        # The official code starts them at exactly 0, where all queries are one.
        nn.init.normal_(self.query_tokens, std=self.initializer_range)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        return self.input_proj(self.add_positions(features))

    def decode(self, features: torch.Tensor, num_query_tokens: int) -> torch.Tensor:
        query = self.query_tokens[:, :num_query_tokens].expand(features.shape[0], -1, -1)
        for layer in self.layers:
            query = layer(query, features)
        return self.append_eos(self.output_proj(query))


PROJECTORS = {
    "linear": HoneybeeMLPProjector,
    "mlp": HoneybeeMLPProjector,
    "resampler": HoneybeeResampler,
    "c-abs": HoneybeeCAbstractor,
    "d-abs": HoneybeeDAbstractor,
}


def build_projector(config: HoneybeeConfig) -> HoneybeeProjector:
    """The projector that `config.projector_config.projector_type` names; widths and patch count come from `config`."""
    return PROJECTORS[config.projector_config.projector_type](config)
