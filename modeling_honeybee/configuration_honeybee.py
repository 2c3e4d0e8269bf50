# SPDX-License-Identifier: Apache-2.0
"""Configuration of a Honeybee model: a vision tower, a projector and a language model.

Travels with every checkpoint: torch and transformers are the only imports.
"""

import copy
import inspect
import math

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

# A saved folder names every auto class; `save_pretrained` alone would record only the one that was registered.
AUTO_MAP = {
    "AutoConfig": "configuration_honeybee.HoneybeeConfig",
    "AutoModel": "modeling_honeybee.HoneybeeModel",
    "AutoModelForImageTextToText": "modeling_honeybee.HoneybeeForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_honeybee.HoneybeeForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_honeybee.HoneybeeForConditionalGeneration",
    "AutoProcessor": "processing_honeybee.HoneybeeProcessor",
}

# What the official configs choose where a field depends on the projector (their `model_config`).
# `num_query_tokens` None: one visual token per patch, filled in by `HoneybeeConfig`, which knows the tower.
PROJECTOR_DEFAULTS = {
    "linear": {"num_query_tokens": None, "depth": 1, "pos_emb": False},
    "mlp": {"num_query_tokens": None, "depth": 2, "pos_emb": False},
    "resampler": {"num_attention_heads": 16, "intermediate_ratio": 4, "dropout": 0.1, "pos_emb": False},
    "c-abs": {},
    "d-abs": {"num_attention_heads": 8, "intermediate_ratio": 1, "dropout": 0.1},
}
PIXELWISE_PROJECTORS = ("linear", "mlp")
GRID_PROJECTORS = ("c-abs", "d-abs")
POOLED_V_TARGETS = ("query", "tgt", "none")


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def covers(trained: list[int], num_query_tokens: int) -> bool:
    """Whether this M is one of `trained`, ascending, or a square between them."""
    between = _is_square(num_query_tokens) and trained[0] < num_query_tokens < trained[-1]
    return between or num_query_tokens in trained


class HoneybeeProjectorConfig(PretrainedConfig):
    """The projector's own settings (paper section 3; a field that a projector has no use for is ignored by it).

    Args:
        projector_type: `linear`, `mlp`, `resampler`, `c-abs` or `d-abs`.
        num_query_tokens: M, the visual tokens made from one image. 144 by default; for `linear` and `mlp` it is the
            number of patches and is filled in by [`HoneybeeConfig`]. A perfect square for `c-abs` and `d-abs`. Of an
            elastic model it is the default.
        elastic_num_query_tokens: the numbers M that the model is trained for, in ascending order, where each image can
            have its own (`c-abs`, `d-abs`, `resampler`). None: it is trained for `num_query_tokens` alone.
        overview_num_query_tokens: M of the overview of a picture that is cut into crops, where the model is trained for another
            M there than for the crops. What is cut is a setting of the processor.
        hidden_size: width inside `c-abs`, `d-abs` and `resampler`.
        depth: convolution blocks in each of the two stages of `c-abs` (3; 0 leaves pooling and readout alone), or
            linear layers of `linear` (1) and `mlp` (2).
        mlp_depth: linear layers of the `c-abs` readout.
        num_eos_tokens: learned tokens added after (`d-abs`: before the output layer) the M visual tokens.
        pos_emb: add a learned position embedding to the patch features. On for `c-abs` and `d-abs`.
        prenorm: LayerNorm on the patch features (`linear`, `mlp`, `c-abs`).
        num_hidden_layers: layers of `d-abs` and `resampler`.
        num_attention_heads: heads of `d-abs` (8) and `resampler` (16).
        num_sampling_points: points that each head of `d-abs` samples in each level.
        intermediate_size: feed-forward width; `hidden_size` for `d-abs`, four times that for `resampler`.
        pooled_v_target: what the pooled patch features become in `d-abs`: the `query` position embedding, the initial
            target (`tgt`), or `none` of the two.
        dropout: 0.1 in `d-abs` (after each sub-layer) and `resampler` (on attention weights).
        layer_norm_eps: of the LayerNorm inside the `resampler` feed-forward.
        initializer_range: standard deviation for new weights.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    model_type = "honeybee_projector"
    base_config_key = "projector_config"
    # The class's: a model with a fixed M does not save them.
    elastic_num_query_tokens = None
    overview_num_query_tokens = None

    def __init__(
        self,
        projector_type: str = "c-abs",
        num_query_tokens: int | None = None,
        hidden_size: int = 1024,
        depth: int | None = None,
        mlp_depth: int = 2,
        num_eos_tokens: int = 0,
        pos_emb: bool | None = None,
        prenorm: bool = False,
        num_hidden_layers: int = 6,
        num_attention_heads: int | None = None,
        num_sampling_points: int = 4,
        intermediate_size: int | None = None,
        pooled_v_target: str = "query",
        dropout: float | None = None,
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        elastic_num_query_tokens: list[int] | None = None,
        overview_num_query_tokens: int | None = None,
        **kwargs,
    ):
        if projector_type not in PROJECTOR_DEFAULTS:
            raise ValueError(
                f"projector_type={projector_type!r} is unknown; use one of {', '.join(PROJECTOR_DEFAULTS)}"
            )
        defaults = PROJECTOR_DEFAULTS[projector_type]

        def choose(value, name, otherwise):
            return value if value is not None else defaults.get(name, otherwise)

        self.projector_type = projector_type
        self.num_query_tokens = choose(num_query_tokens, "num_query_tokens", 144)
        self.hidden_size = hidden_size
        self.depth = choose(depth, "depth", 3)
        self.mlp_depth = mlp_depth
        self.num_eos_tokens = num_eos_tokens
        self.pos_emb = choose(pos_emb, "pos_emb", True)
        self.prenorm = prenorm
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = choose(num_attention_heads, "num_attention_heads", 8)
        self.num_sampling_points = num_sampling_points
        self.intermediate_size = choose(
            intermediate_size, "intermediate_size", defaults.get("intermediate_ratio", 1) * hidden_size
        )
        self.pooled_v_target = pooled_v_target
        self.dropout = choose(dropout, "dropout", 0.0)
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        if elastic_num_query_tokens is not None:
            self.elastic_num_query_tokens = elastic_num_query_tokens
        if overview_num_query_tokens is not None:
            self.overview_num_query_tokens = overview_num_query_tokens
        self._validate()
        super().__init__(**kwargs)

    @classmethod
    def from_settings(cls, settings: dict) -> "HoneybeeProjectorConfig":
        """The config of settings that a person wrote: unlike the constructor, which must take what any transformers
        version saved, it refuses a name that it does not know.

        Raises:
            ValueError: an unknown name, with the known ones; or what the constructor refuses.
        """
        known = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(f"unknown projector settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**settings)

    def _validate(self):
        minimum = {
            "hidden_size": 1,
            "depth": 0 if self.projector_type == "c-abs" else 1,
            "mlp_depth": 1,
            "num_eos_tokens": 0,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_sampling_points": 1,
            "intermediate_size": 1,
        }
        if self.num_query_tokens is not None:
            minimum["num_query_tokens"] = 1
        for name, least in minimum.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        for name in ("pos_emb", "prenorm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if isinstance(self.dropout, str) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be at least 0 and less than 1")
        if self.num_query_tokens is not None:
            self._check_square(self.num_query_tokens)
        if self.elastic_num_query_tokens is not None:
            self._validate_elastic()
        if self.overview_num_query_tokens is not None:
            try:
                self.check_num_query_tokens(self.overview_num_query_tokens)
            except ValueError as error:
                raise ValueError(f"overview_{error}") from None
        if self.projector_type in ("d-abs", "resampler") and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}; "
                "change one of them"
            )
        if self.pooled_v_target not in POOLED_V_TARGETS:
            raise ValueError(
                f"pooled_v_target={self.pooled_v_target!r} is unknown; use one of {', '.join(POOLED_V_TARGETS)}"
            )

    def _validate_elastic(self):
        trained = self.elastic_num_query_tokens
        if self.projector_type in PIXELWISE_PROJECTORS:
            raise ValueError(
                f"elastic_num_query_tokens={trained} does not fit projector_type={self.projector_type!r}, which makes one "
                "visual token of each patch; leave it out or choose another projector"
            )
        listed = isinstance(trained, list) and all(type(number) is int and number > 0 for number in trained)
        if not (listed and trained and trained == sorted(set(trained))):
            raise ValueError(
                f"elastic_num_query_tokens={trained!r} must be a list of whole numbers of at least 1, in ascending order and "
                "without repetition, such as [16, 64, 144]"
            )
        for number in trained:
            self._check_square(number)
        if not covers(trained, self.num_query_tokens):
            raise ValueError(
                f"num_query_tokens={self.num_query_tokens}, the default, is not one of elastic_num_query_tokens={trained}; "
                f"use one of them, such as {trained[-1]}"
            )

    def _check_square(self, number: int):
        if self.projector_type in GRID_PROJECTORS and not _is_square(number):
            root = math.isqrt(number)
            raise ValueError(
                f"num_query_tokens={number} is not a perfect square, and {self.projector_type} lays its "
                f"visual tokens on a square grid; use {root**2} or {(root + 1) ** 2}"
            )

    def is_trained(self, num_query_tokens: int) -> bool:
        """Whether the model is trained for this M, of crops or of overviews, or for a smaller and a larger one where it is a
        square."""
        trained = self.elastic_num_query_tokens or [self.num_query_tokens]
        return num_query_tokens == self.overview_num_query_tokens or covers(trained, num_query_tokens)

    def check_num_query_tokens(self, number: int) -> None:
        """Raises a ValueError, with the reason, where the projector cannot make `number` visual tokens of an image."""
        if type(number) is not int or number < 1:
            raise ValueError(f"num_query_tokens={number!r} must be a whole number of at least 1")
        if self.projector_type in PIXELWISE_PROJECTORS and number != self.num_query_tokens:
            raise ValueError(
                f"num_query_tokens={number}: a {self.projector_type} projector makes one visual token of each of the "
                f"{self.num_query_tokens} patches; leave it out"
            )
        self._check_square(number)
        if self.projector_type == "resampler" and number > self.num_learned_queries:
            raise ValueError(
                f"num_query_tokens={number}: the resampler has {self.num_learned_queries} learned queries, of which it "
                f"takes the first; use at most {self.num_learned_queries}"
            )

    @property
    def num_learned_queries(self) -> int:
        """Learned queries of `d-abs` and `resampler`: one for each visual token of the largest M that is trained."""
        return max([self.num_query_tokens, *(self.elastic_num_query_tokens or ()), self.overview_num_query_tokens or 0])

    @property
    def num_visual_tokens(self) -> int:
        """Tokens that the language model sees for one image of the default M.

        Raises:
            ValueError: the projector is `linear` or `mlp`, and no [`HoneybeeConfig`] has told it the number of patches.
        """
        if self.num_query_tokens is None:
            raise ValueError(
                f"num_query_tokens of a {self.projector_type} projector is the number of patches, which only a "
                "HoneybeeConfig knows; ask its num_image_tokens"
            )
        return self.num_query_tokens + self.num_eos_tokens


def _rope_for_both_lines(settings: dict) -> dict:
    """transformers 5 stores the RoPE settings in `rope_parameters` alone, where 4 does not look: its base silently
    becomes 10000. The older spelling is read by both."""
    rope = settings.get("rope_parameters")
    if not rope or any(isinstance(value, dict) for value in rope.values()):  # nested: one entry per layer type
        return settings
    settings, rope = dict(settings), dict(rope)
    del settings["rope_parameters"]
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            settings[name] = rope.pop(name)
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        settings["rope_scaling"] = rope
    return settings


def _sub_config(value, name: str, default_type: str, defaults: dict) -> PretrainedConfig:
    if value is None:
        value = {"model_type": default_type, **defaults}
    if isinstance(value, dict):
        model_type = value.get("model_type", default_type)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"{name}: model_type={model_type!r} is not known to this version of transformers; use a type that "
                "AutoConfig knows, such as "
                f"{default_type!r}"
            )
        settings = _rope_for_both_lines(value)
        value = AutoConfig.for_model(model_type, **{k: v for k, v in settings.items() if k != "model_type"})
    elif isinstance(value, PretrainedConfig):
        value = copy.deepcopy(value)  # it is completed below, and belongs to the caller
        if value.model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"{name}: model_type={value.model_type!r} is not transformers' own, and a saved Honeybee carries its own "
                "code and nobody else's; use another model"
            )
    else:
        raise TypeError(f"{name} must be a dict or a PretrainedConfig, got {type(value).__name__}")
    # A two-tower config (CLIP, SigLIP) stands for its vision half.
    return getattr(value, "vision_config", value) if name == "vision_config" else value


class HoneybeeConfig(PretrainedConfig):
    """Configuration of a Honeybee model.

    Args:
        vision_config: config (or its dict) of any vision tower that `AutoModel` builds. Default: CLIP ViT-L/14, 224 px.
        text_config: config (or its dict) of any causal language model that `AutoModel` builds. Default: Llama 7B.
        projector_config: [`HoneybeeProjectorConfig`] or its dict. Default: C-Abstractor with 144 visual tokens.
        image_token_id: id of the `<image>` placeholder, a real token of the tokenizer.
        vision_feature_layer: which `hidden_states` of the tower feeds the projector; 0 is the embedding output, negative
            numbers count from the end. Blocks above it are neither built nor run. A list feeds several levels (`d-abs`).
        vision_feature_select_strategy: `default` drops the tower's class token, `full` keeps every token.

    Raises:
        ValueError: where the parts do not fit together, with the values and a remedy.
    """

    model_type = "honeybee"
    sub_configs = {
        "vision_config": AutoConfig,
        "text_config": AutoConfig,
        "projector_config": HoneybeeProjectorConfig,
    }

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        projector_config=None,
        image_token_id: int = 32000,
        vision_feature_layer: int | list[int] = -2,
        vision_feature_select_strategy: str = "default",
        **kwargs,
    ):
        self.vision_config = _sub_config(
            vision_config,
            "vision_config",
            "clip_vision_model",
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 224,
                "patch_size": 14,
            },
        )
        self.text_config = _sub_config(text_config, "text_config", "llama", {"vocab_size": 32001})
        if isinstance(projector_config, HoneybeeProjectorConfig):
            self.projector_config = copy.deepcopy(projector_config)
        elif projector_config is None or isinstance(projector_config, dict):
            self.projector_config = HoneybeeProjectorConfig(**(projector_config or {}))
        else:
            raise TypeError(
                f"projector_config must be a dict or a HoneybeeProjectorConfig, got {type(projector_config).__name__}"
            )
        self.image_token_id = image_token_id
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self._validate()

        # One dtype for all parts, the top one: transformers 4 would build each part in its own.
        self.vision_config.dtype = self.text_config.dtype = None
        # Nobody else needs to know where the parts lay on somebody's disk.
        self.vision_config._name_or_path = self.text_config._name_or_path = ""
        # Weight tying is read from both levels, depending on the transformers line.
        tie_word_embeddings = kwargs.pop("tie_word_embeddings", None)
        if tie_word_embeddings is None:
            tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        self.text_config.tie_word_embeddings = tie_word_embeddings
        kwargs.pop("auto_map", None)  # names the repository it was loaded from; a saved folder carries its own code
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.auto_map = dict(AUTO_MAP)

    def _validate(self):
        if isinstance(self.image_token_id, bool) or not isinstance(self.image_token_id, int) or self.image_token_id < 0:
            raise ValueError(
                f"image_token_id={self.image_token_id!r} must be the id of a real token of the tokenizer (0 or more)"
            )
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(
                f"vision_feature_select_strategy={self.vision_feature_select_strategy!r} is unknown; use 'default' "
                "(drop the class token) or 'full' (a tower without one)"
            )
        if not self.vision_feature_layers:
            raise ValueError("vision_feature_layer=[] names no layer; give one, such as -2, or a list for d-abs")
        depth = getattr(self.vision_config, "num_hidden_layers", None)
        if depth is None:
            raise ValueError(
                f"vision_config.model_type={self.vision_config.model_type!r} has no num_hidden_layers; Honeybee needs a "
                "vision transformer, such as clip_vision_model"
            )
        for layer in self.vision_feature_layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
                raise ValueError(
                    f"vision_feature_layer={layer!r} does not exist: the vision tower has {depth} blocks, so use "
                    f"{-depth - 1} to {depth} (0 is the embedding output)"
                )
        projector, num_patches = self.projector_config, self.num_patches
        if len(self.vision_feature_layers) > 1:
            if projector.projector_type != "d-abs":
                raise ValueError(
                    f"vision_feature_layer={self.vision_feature_layer} feeds several levels, which only d-abs takes; "
                    f"give one layer for {projector.projector_type}"
                )
            if projector.pooled_v_target != "none":
                raise ValueError(
                    f"pooled_v_target={projector.pooled_v_target!r} pools one level, but vision_feature_layer="
                    f"{self.vision_feature_layer} gives {len(self.vision_feature_layers)}; set pooled_v_target='none'"
                )
        if projector.num_query_tokens is None:
            projector.num_query_tokens = num_patches
        if projector.projector_type in PIXELWISE_PROJECTORS and projector.num_query_tokens != num_patches:
            raise ValueError(
                f"num_query_tokens={projector.num_query_tokens} does not fit projector_type="
                f"{projector.projector_type!r}, which makes one visual token of each of the {num_patches} patches; "
                f"leave num_query_tokens out or use {num_patches}, or choose another projector"
            )
        # On transformers 4 these multiply every input embedding in their own forward, visual tokens included.
        if self.text_config.model_type in ("gemma", "gemma2", "t5gemma", "vaultgemma"):
            raise ValueError(
                f"text_config.model_type={self.text_config.model_type!r} scales its input embeddings differently on "
                "transformers 4 and 5, so a saved model would answer differently; use another language model"
            )
        # Scaling after the head lives in the causal model's own forward, which is not the one that runs here.
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
            if getattr(self.text_config, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"text_config.{name}={getattr(self.text_config, name)} scales the logits after the head, which "
                    "Honeybee does not do; use a language model without it"
                )

    @property
    def vision_feature_layers(self) -> list[int]:
        layers = self.vision_feature_layer
        return list(layers) if isinstance(layers, (list, tuple)) else [layers]

    @property
    def vision_hidden_states(self) -> list[int]:
        """The feature layers counted from 0, the embedding output."""
        depth = self.vision_config.num_hidden_layers
        return [layer if layer >= 0 else depth + 1 + layer for layer in self.vision_feature_layers]

    @property
    def num_vision_blocks(self) -> int:
        """Blocks of the vision tower that the chosen feature layer needs (one for the embedding output, its input)."""
        return max(1, *self.vision_hidden_states)

    @property
    def num_patches(self) -> int:
        """N, the patches of one (square) image.

        Raises:
            ValueError: the tower does not take square images.
        """
        edges = []
        for name in ("image_size", "patch_size"):
            value = getattr(self.vision_config, name, None)
            edge = value[0] if isinstance(value, (list, tuple)) and len(set(value)) == 1 else value
            if isinstance(edge, bool) or not isinstance(edge, int) or edge < 1:
                raise ValueError(
                    f"vision_config.{name}={value!r} is not the edge of a square in pixels; Honeybee needs a vision "
                    "transformer for square images"
                )
            edges.append(edge)
        size, patch = edges
        if size % patch:
            raise ValueError(
                f"vision_config.image_size={size} is not a multiple of patch_size={patch}; use {size // patch * patch}"
            )
        return (size // patch) ** 2

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one image of the default M in the text; the processor must be built with the same number."""
        return self.projector_config.num_visual_tokens


HoneybeeConfig.register_for_auto_class()

__all__ = ["HoneybeeConfig", "HoneybeeProjectorConfig"]
