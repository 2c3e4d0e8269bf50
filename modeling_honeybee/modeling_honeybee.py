# SPDX-License-Identifier: Apache-2.0
"""Honeybee: vision tower -> projector -> language model.

Shapes: B rows of text, T tokens a row, I images in the batch (in the order of their placeholders), N patches an image,
M visual tokens an image (extra tokens included), D_v width of the tower, D_lm width of the language model, V vocabulary.
Images can have an M each; what is (I, M, D_lm) is then (sum of all M, D_lm), or a list of (M, D_lm). A large picture can be
cut into crops, each an image to tower and projector: I counts these, and `num_crops` says how many a picture has.

    pixel_values (I, 3, S, S) -> patch features (I, N, D_v) -> visual tokens (I, M, D_lm) -> the I * M placeholders of
    input_ids (B, T) -> hidden states (B, T, D_lm) -> logits (B, T, V)
"""

import copy
import functools
import itertools
import logging
import threading
import types
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import find_adapter_config_file

# Two of these are not used here: transformers 4 copies from a local folder only the code that this file itself imports.
from .configuration_honeybee import HoneybeeConfig
from .deformable_attention_honeybee import HoneybeeDeformableAttention  # noqa: F401
from .generation_config_honeybee import greedy_generation_config, in_words, savable_generation_config
from .joining_honeybee import config_from_vision_text_pretrained, from_vision_text_pretrained
from .probe_honeybee import check_parts  # noqa: F401
from .projectors_honeybee import PROJECTORS, HoneybeeProjector, build_projector

logger = logging.getLogger(__name__)

_OUTPUT_FIELDS = tuple(field.name for field in fields(BaseModelOutputWithPast))
_TOWER_FIELDS = tuple(field.name for field in fields(BaseModelOutputWithPooling) if field.name != "pooler_output")
# What a cache of keys and values is called, as an argument and in outputs: transformers 5.24 renamed `past_key_values`.
CACHE = next(name for name in _OUTPUT_FIELDS if name in ("cache", "past_key_values"))
_TRANSFORMERS_4 = transformers.__version__.startswith("4.")


@dataclass
class HoneybeeModelOutputWithPast(BaseModelOutputWithPast):
    """`image_hidden_states`: visual tokens (I, M, D_lm) of this call, None where it had no images; (sum of all M, D_lm),
    image after image, where each image had an M of its own."""

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class HoneybeeCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`loss` (), `logits` (B, T or `logits_to_keep`, V) or None, and what [`HoneybeeModelOutputWithPast`] holds."""

    image_hidden_states: torch.FloatTensor | None = None


def _tower_blocks(vision_tower: nn.Module, number: int) -> nn.ModuleList:
    for module in vision_tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ValueError(
        f"{type(vision_tower).__name__} has no list of {number} blocks to take features from; use a plain vision "
        "transformer"
    )


class _Collected(threading.local):
    """Hidden states by number, for the call of the running thread alone. torch.compile cannot follow a ContextVar."""

    states: dict[int, torch.Tensor] | None = None


_collected = _Collected()


def _keep_state(layer: int, module: nn.Module, args: tuple, output=None) -> None:
    """A hook. Behind a block it keeps the block's output, in front of the first block its input."""
    if _collected.states is not None:
        state = args if layer == 0 else output
        _collected.states[layer] = state[0] if isinstance(state, tuple) else state


@contextmanager
def _collect_states():
    """Collects the hidden states that the hooks of a tower see.

    `output_hidden_states` would keep all of them, and not every inner tower that we hold on transformers 4 knows it.
    """
    _collected.states = {}
    try:
        yield _collected.states
    finally:
        _collected.states = None


def _share_config(part: nn.Module, config) -> None:
    """Makes `config` the one object that all modules of a part read, so that a change of it reaches them."""
    own = part.config
    for module in part.modules():
        if getattr(module, "config", None) is own:
            module.config = config


def _without_placeholders(labels: torch.Tensor | None, image_token_id: int) -> torch.Tensor | None:
    """The labels with -100 at placeholders: an image is nothing to predict."""
    return None if labels is None else labels.masked_fill(labels == image_token_id, -100)


def _masking_labels(forward):
    """A forward that gets no placeholder to learn, whatever it does with labels."""

    @functools.wraps(forward)
    def masked(self, *args, **kwargs):
        for name in ("labels", "shift_labels"):
            if kwargs.get(name) is not None:
                kwargs[name] = _without_placeholders(kwargs[name], self.config.image_token_id)
        return forward(self, *args, **kwargs)

    return masked


def _is_packed(position_ids: torch.LongTensor | None) -> bool:
    """Whether the positions of a row start anew within it."""
    if position_ids is None or position_ids.shape[-1] == 1 or torch.compiler.is_compiling():
        return False
    return bool((position_ids.diff() != 1).any())


# Modules that quantized loading leaves as they are, unless its config names modules itself: they take little memory, and
# all that the model sees goes through them. Named with and without the prefix, for both model classes.
UNQUANTIZED = ("lm_head", "projector", "model.projector", "vision_tower", "model.vision_tower")


def _keep_unquantized(quantization_config):
    """A quantization config, given as one or as its dict, that leaves [`UNQUANTIZED`] out. Where it names modules itself,
    or its kind has no list for them, it stays as it is."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if getattr(quantization_config, name, ()) is None:
            quantization_config = copy.deepcopy(quantization_config)
            setattr(quantization_config, name, list(UNQUANTIZED))
    return quantization_config


class HoneybeePreTrainedModel(PreTrainedModel):
    config_class = HoneybeeConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = sorted({projector.__name__ for projector in PROJECTORS.values()})
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module):
        """New weights as the official model ends up with them: N(0, 0.02), zero biases, norms 1 and 0.

        `torch.nn.init` functions only: transformers guards them while it loads, so that loaded tensors are kept.
        """
        std = self.config.projector_config.initializer_range
        if isinstance(module, HoneybeeProjector):
            module.reset_own_parameters()
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs):
        # The reentrant kind, transformers 4's default, drops the gradients of a block whose input needs none, and the
        # first block behind a frozen tower is such a block.
        if gradient_checkpointing_kwargs is None:
            gradient_checkpointing_kwargs = {"use_reentrant": False}
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs, **kwargs)

    def enable_input_require_grads(self):
        # The language model's alone: transformers 5, which does this for any gradient checkpointing, takes the vision tower's
        # as well, and what is frozen of a tower in front of its first trained block would be recorded and run again.
        self.get_decoder().enable_input_require_grads()

    def disable_input_require_grads(self):
        self.get_decoder().disable_input_require_grads()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, except that a checkpoint with missing tensors is an error and not a warning: a vision
        tower left at random weights answers fluently and wrongly.

        Raises:
            ValueError: the checkpoint is of another kind of model, or lacks tensors that the model needs.
        """
        config = kwargs.get("config")
        if pretrained_model_name_or_path is not None and not isinstance(config, HoneybeeConfig):
            # Otherwise the default model, of 7B parameters, would be built for the weights of another kind.
            hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "subfolder") if name in kwargs}
            found = HoneybeeConfig.get_config_dict(pretrained_model_name_or_path, **hub)[0].get("model_type")
            # An adapter's folder has no config: transformers loads the model that it names, and then the adapter.
            adapter = found is None and find_adapter_config_file(str(pretrained_model_name_or_path), **hub)
            if found != HoneybeeConfig.model_type and not adapter:
                raise ValueError(
                    f"{pretrained_model_name_or_path} is not a Honeybee model but has model_type={found!r}; join a "
                    "vision tower and a language model with from_vision_text_pretrained first"
                )
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _keep_unquantized(kwargs["quantization_config"])
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} tensors of {cls.__name__}: {shown}. Save the "
                "checkpoint again with save_pretrained, or check that its config.json belongs to these weights."
            )
        if model.can_generate() and getattr(model.generation_config, "_from_model_config", False):
            model.generation_config = model.greedy_generation_config()  # there is no file, and 5 takes its defaults
        elif model.can_generate():
            savable, refused = savable_generation_config(model.generation_config.to_diff_dict())
            if refused:
                logger.warning(
                    "Generation settings of %s that could not be saved again are left out: %s",
                    pretrained_model_name_or_path,
                    in_words(refused),
                )
                model.generation_config = savable
        return (model, info) if output_loading_info else model


class HoneybeeModel(HoneybeePreTrainedModel):
    """Vision tower, projector and language model without its head."""

    def __init__(self, config: HoneybeeConfig):
        super().__init__(config)
        vision_tower = AutoModel.from_config(config.vision_config)
        language_model = AutoModel.from_config(config.text_config)
        self.vision_tower = vision_tower  # the first: saved optimizers know parameters by their order
        self.projector = build_projector(config)
        self.hold(vision_tower, language_model)
        self.post_init()
        self._no_split_modules = self._blocks_of(vision_tower, language_model)  # post_init of 5 collects all names

    def hold(self, vision_tower: PreTrainedModel, language_model: PreTrainedModel) -> None:
        """Takes a whole tower and a language model without head as its own.

        From now on they read the objects in `self.config`. Blocks above the feature layer are dropped: nothing reads them.
        """
        # transformers 4 wraps the CLIP tower in a module that 5 has dropped; holding the inner one gives the weights
        # the same names on both.
        self.vision_tower = getattr(vision_tower, "vision_model", vision_tower)
        self.language_model = language_model
        _share_config(self.vision_tower, self.config.vision_config)
        _share_config(self.language_model, self.config.text_config)
        blocks = _tower_blocks(self.vision_tower, self.config.vision_config.num_hidden_layers)
        del blocks[self.config.num_vision_blocks :]
        for layer in self.config.vision_hidden_states:  # the hooks stay: one hung during a call does not compile
            hook = functools.partial(_keep_state, layer)
            if layer:
                blocks[layer - 1].register_forward_hook(hook)
            else:
                blocks[0].register_forward_pre_hook(hook)

    @property
    def vision_blocks_name(self) -> str:
        """Name, in this model, of the list of the tower's blocks."""
        blocks = _tower_blocks(self.vision_tower, self.config.num_vision_blocks)
        return next(name for name, module in self.named_modules() if module is blocks)

    def _blocks_of(self, *parts: PreTrainedModel) -> list[str]:
        """Classes of blocks that `device_map="auto"` keeps whole and FSDP shards one by one. Only classes that the model
        has: FSDP refuses others."""
        names = {name for part in (self, *parts) for name in part._no_split_modules or ()}
        return sorted(names & {type(module).__name__ for module in self.modules()})

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_decoder(self):
        return self.language_model

    def set_decoder(self, decoder):
        self.language_model = decoder

    def get_patch_features(self, pixel_values: torch.FloatTensor) -> torch.FloatTensor:
        """Features of the chosen layer(s), class token dropped.

        Args:
            pixel_values: (I, 3, S, S), any floating dtype.

        Returns:
            (I, N, D_v) in the tower's dtype, or (I, L, N, D_v) where `vision_feature_layer` lists L layers.

        Raises:
            ValueError: wrong number of dimensions, or the tower's tokens do not match `config.num_patches`.
        """
        return self._encode(pixel_values)[0]

    def _encode(self, pixel_values: torch.FloatTensor, **kwargs):
        """Patch features as above, and the tower's own output; `kwargs` are the tower's."""
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (images, 3, height, width), with all "
                "images of the batch along the first dimension"
            )
        parameters = [p for p in self.vision_tower.parameters() if p.is_floating_point()]
        # A frozen tower records nothing, even where a hook makes its embeddings require a gradient (peft with
        # gradient checkpointing).
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        layers = self.config.vision_hidden_states
        with torch.set_grad_enabled(trained), _collect_states() as hidden_states:
            outputs = self.vision_tower(pixel_values.to(parameters[0].dtype), **kwargs)
        features = [hidden_states[layer] for layer in layers]
        if self.config.vision_feature_select_strategy == "default":
            features = [feature[:, 1:] for feature in features]
        if features[0].shape[1] != self.config.num_patches:
            raise ValueError(
                f"the vision tower gives {features[0].shape[1]} patch features with vision_feature_select_strategy="
                f"{self.config.vision_feature_select_strategy!r}, but image_size and patch_size make "
                f"{self.config.num_patches}; use 'default' for a tower with one class token and 'full' for one without"
            )
        return features[0] if len(features) == 1 else torch.stack(features, dim=1), outputs

    def get_visual_tokens(
        self,
        pixel_values: torch.FloatTensor,
        num_query_tokens: int | torch.LongTensor | None = None,
        num_crops: torch.LongTensor | None = None,
    ) -> torch.FloatTensor | list[torch.FloatTensor]:
        """Visual tokens of images, as [`get_image_features`] describes them.

        Args:
            pixel_values: (I, 3, S, S).
            num_query_tokens, num_crops: see [`get_image_features`].

        Returns:
            (I, M, D_lm), or a list of (M, D_lm), or with `num_crops` of (tokens, D_lm) for each image.
        """
        numbers = self._checked_numbers(num_query_tokens, len(pixel_values))
        crops = self._checked_crops(num_crops, len(pixel_values))
        return self._split_by_image(self._project(self.get_patch_features(pixel_values), numbers), numbers, crops)

    def _project(self, features: torch.FloatTensor, numbers: int | list[int] | None) -> torch.FloatTensor:
        return self.projector(features.to(next(self.projector.parameters()).dtype), numbers)

    def _split_by_image(
        self, visual_tokens: torch.FloatTensor, numbers: int | list[int] | None, crops: list[int] | None
    ) -> torch.FloatTensor | list[torch.FloatTensor]:
        if crops is None and not isinstance(numbers, list):
            return visual_tokens
        squares = len(numbers) if isinstance(numbers, list) else len(visual_tokens)
        flat = visual_tokens.reshape(-1, visual_tokens.shape[-1])
        return list(flat.split(self._tokens_of_each(numbers, squares, crops)))

    def _checked_crops(self, num_crops: torch.LongTensor | list[int] | None, num_squares: int) -> list[int] | None:
        """`num_crops` as a list, checked."""
        if num_crops is None:
            return None
        crops = num_crops.tolist() if isinstance(num_crops, torch.Tensor) else num_crops
        listed = isinstance(crops, (list, tuple)) and all(type(number) is int and number > 0 for number in crops)
        if not listed or sum(crops) != num_squares:
            raise ValueError(
                f"num_crops={crops} must be whole numbers of at least 1, one for each image, and {num_squares} together, the "
                "squares in pixel_values; give both as the processor returned them"
            )
        return list(crops)

    def _checked_numbers(self, num_query_tokens, num_squares: int) -> int | list[int] | None:
        """`num_query_tokens` as the projector takes it, checked."""
        if isinstance(num_query_tokens, torch.Tensor):
            num_query_tokens = num_query_tokens.tolist()
        if num_query_tokens is None:
            return None
        each = isinstance(num_query_tokens, (list, tuple))
        if each and len(num_query_tokens) != num_squares:
            raise ValueError(
                f"num_query_tokens lists {len(num_query_tokens)} numbers, but pixel_values has {num_squares} rows; give "
                "one number for all or one for each"
            )
        projector, num_patches = self.config.projector_config, self.config.num_patches
        numbers = list(num_query_tokens) if each else num_query_tokens
        for number in numbers if each else [numbers]:
            projector.check_num_query_tokens(number)
            if number > num_patches:
                logger.warning_once(
                    f"num_query_tokens={number} is more than the {num_patches} patches of an image, and adds no detail"
                )
            if not projector.is_trained(number):
                trained = projector.elastic_num_query_tokens or projector.num_query_tokens
                logger.warning_once(
                    f"num_query_tokens={number} is no number that the model is trained for ({trained}): expect worse answers"
                )
        return numbers

    def count_image_tokens(
        self,
        num_query_tokens: int | torch.LongTensor | None,
        num_squares: int,
        num_crops: torch.LongTensor | None = None,
    ) -> list[int]:
        """Placeholders of each image out of `num_squares` rows of pixels, for `num_query_tokens` and `num_crops` as
        [`get_image_features`] takes them."""
        crops = self._checked_crops(num_crops, num_squares)
        return self._tokens_of_each(self._checked_numbers(num_query_tokens, num_squares), num_squares, crops)

    def _tokens_of_each(
        self, numbers: int | list[int] | None, num_squares: int, crops: list[int] | None = None
    ) -> list[int]:
        """The same for checked numbers."""
        config = self.config.projector_config
        numbers = config.num_query_tokens if numbers is None else numbers
        numbers = numbers if isinstance(numbers, list) else [numbers] * num_squares
        tokens = [number + config.num_eos_tokens for number in numbers]
        if crops is None:
            return tokens
        squares = iter(tokens)
        return [sum(itertools.islice(squares, number)) for number in crops]

    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        return_dict: bool | None = None,
        num_query_tokens: int | torch.LongTensor | None = None,
        num_crops: torch.LongTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        **kwargs,
    ) -> torch.FloatTensor | list[torch.FloatTensor] | BaseModelOutputWithPooling | tuple:
        """Visual tokens of images, in the form that this line of transformers expects.

        Args:
            pixel_values: (I, 3, S, S).
            vision_feature_layer, vision_feature_select_strategy: those of the config, and no others.
            return_dict: whether to return an output or a tuple. Default: on transformers 4 neither, on 5 an output.
            num_query_tokens: M of all images, or (I,) int64, an M for each. Default: the config's. What the projector can
                make is made, trained or not; the processor is where an M that is not trained is refused.
            num_crops: (pictures,) int64, how many of the images are squares of one picture. Default: one each.
            image_grid_thw: (pictures, 3) int64, in place of `num_crops` the form that vLLM keeps by picture: its products.
            kwargs: of the vision tower, such as `output_hidden_states`.

        Returns:
            The visual tokens (I, M, D_lm); a list of (M, D_lm) where `num_query_tokens` is a tensor, and of (tokens, D_lm), a
            picture each, with `num_crops`; or the tower's output with these as `pooler_output`.

        Raises:
            ValueError: another feature layer or strategy than the config's, `num_query_tokens` of another length, or of a
                number that the projector cannot make, or `num_crops` that are not all of the images.
        """
        self._check_feature_settings(vision_feature_layer, vision_feature_select_strategy)
        if image_grid_thw is not None:
            num_crops = image_grid_thw.prod(-1)
        numbers = self._checked_numbers(num_query_tokens, len(pixel_values))
        crops = self._checked_crops(num_crops, len(pixel_values))
        features, outputs = self._encode(pixel_values, **kwargs)
        visual_tokens = self._split_by_image(self._project(features, numbers), numbers, crops)
        if return_dict is None:
            if _TRANSFORMERS_4:
                return visual_tokens
            return_dict = self.config.return_dict
        tower_outputs = {name: getattr(outputs, name, None) for name in _TOWER_FIELDS}
        output = BaseModelOutputWithPooling(pooler_output=visual_tokens, **tower_outputs)
        return output if return_dict else output.to_tuple()

    def _check_feature_settings(self, layer: int | list[int] | None, strategy: str | None) -> None:
        config = self.config
        layers = None if layer is None else list(layer) if isinstance(layer, (list, tuple)) else [layer]
        depth = config.vision_config.num_hidden_layers
        if layers is not None and [i if i >= 0 else depth + 1 + i for i in layers] != config.vision_hidden_states:
            raise ValueError(
                f"vision_feature_layer={layer} is not the config's {config.vision_feature_layer}, for which the "
                "projector was trained and above which the tower has no blocks; leave the argument out"
            )
        if strategy not in (None, config.vision_feature_select_strategy):
            raise ValueError(
                f"vision_feature_select_strategy={strategy!r} is not the config's "
                f"{config.vision_feature_select_strategy!r}; leave the argument out"
            )

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor,
        tokens: list[int] | None,
    ) -> torch.BoolTensor:
        """(B, T), True where a visual token goes. `tokens` are those of each image; with None they are not counted.

        Raises:
            ValueError: the number of placeholders is not the sum of `tokens`, or a row holds part of an image.
        """
        if input_ids is not None:
            mask = input_ids == self.config.image_token_id
        else:
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        if tokens is not None and not torch.compiler.is_compiling():
            rows = mask.sum(-1).tolist()
            whole = set(itertools.accumulate(rows)) <= {0, *itertools.accumulate(tokens)}
            if sum(rows) != sum(tokens) or not whole:
                config = self.config.projector_config
                sizes = sorted(set(tokens)) or [config.num_visual_tokens]
                extra = f", num_eos_tokens={config.num_eos_tokens}" if config.num_eos_tokens else ""
                raise ValueError(
                    f"input_ids hold {sum(rows)} image placeholders in rows of {rows}, but {len(tokens)} images of "
                    f"{' or '.join(map(str, sizes))} visual tokens need {sum(tokens)}, each image whole within a row. Give "
                    "one <image> an image, the model num_query_tokens and num_crops of the processor's output where it has them, "
                    f"and a processor with num_image_tokens={config.num_visual_tokens}{extra}"
                )
        return mask

    def _place_images(self, input_ids, inputs_embeds, pixel_values, num_query_tokens, num_crops, encoded):
        """The visual tokens, encoded here or before, and a mask (B, T) of their places."""
        if encoded is None:
            numbers = self._checked_numbers(num_query_tokens, len(pixel_values))
            # Read for a check that is not compiled.
            crops = None if torch.compiler.is_compiling() else self._checked_crops(num_crops, len(pixel_values))
            visual_tokens = self._project(self.get_patch_features(pixel_values), numbers)
            tokens = self._tokens_of_each(numbers, len(pixel_values), crops)
            return visual_tokens, self.get_placeholder_mask(input_ids, inputs_embeds, tokens)
        if pixel_values is not None:
            raise ValueError("pixel_values and mm_encoder_outputs give images twice; give one of them")
        visual_tokens = encoded.pooler_output
        if not isinstance(visual_tokens, torch.Tensor):  # a list, an image each
            visual_tokens = torch.cat(list(visual_tokens))
        mask = self.get_placeholder_mask(input_ids, inputs_embeds, tokens=None)
        if not torch.compiler.is_compiling():
            found, given = int(mask.sum()), visual_tokens.shape[:-1].numel()
            if found != given:
                raise ValueError(
                    f"input_ids hold {found} image placeholders, but mm_encoder_outputs {given} visual tokens; give one "
                    "for each"
                )
        return visual_tokens, mask

    def _touch_projector(self, inputs_embeds: torch.FloatTensor) -> torch.FloatTensor:
        """Keeps the projector, and a tower that is trained, in the graph of a batch without images. Otherwise such a batch has
        nothing to train in stage 1, and ranks that wait for the gradients (DDP) or gather the shards (FSDP, ZeRO-3) hang."""
        vision_config, levels = self.config.vision_config, len(self.config.vision_feature_layers)
        parameter = next(self.projector.parameters())
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed or any(p.requires_grad for p in self.vision_tower.parameters()):
            # Sharded, the tower is run by the other ranks as well. Trained, it gets a gradient of 0 and not none in one
            # process, too: the optimizer's momentum and weight decay move it either way.
            size = vision_config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            channels = getattr(vision_config, "num_channels", 3)
            blank = torch.zeros(1, channels, height, width, device=inputs_embeds.device)
            touched = self.get_visual_tokens(blank)
        else:
            shape = (1, self.config.num_patches, vision_config.hidden_size)
            if levels > 1:
                shape = (1, levels, *shape[1:])
            touched = self.projector(torch.zeros(shape, dtype=parameter.dtype, device=inputs_embeds.device))
        return inputs_embeds + 0 * touched.sum().to(inputs_embeds.dtype)

    def _embed(
        self, input_ids, inputs_embeds, pixel_values, num_query_tokens, num_crops, encoded
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the language model reads (B, T, D_lm), and the visual tokens in it, if there are any."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        vocab_size = self.config.text_config.vocab_size
        if pixel_values is not None and self.config.image_token_id >= vocab_size:
            raise ValueError(
                f"image_token_id={self.config.image_token_id} is no token of this vocabulary of {vocab_size}; set it in "
                "the config to the id of <image>, after resize_token_embeddings where that is a new token"
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and len(pixel_values) == 0:
            # A trainer that splits a batch by images (TRL's GRPO) gives rows without one a tensor of none. No tower takes it.
            pixel_values = None
        if pixel_values is not None or encoded is not None:
            visual_tokens, mask = self._place_images(
                input_ids, inputs_embeds, pixel_values, num_query_tokens, num_crops, encoded
            )
            mask, placed = mask.to(inputs_embeds.device), visual_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
            return inputs_embeds.masked_scatter(mask.unsqueeze(-1), placed), visual_tokens
        # A single token is a decoding step, whose images are in the cache.
        if input_ids is not None and input_ids.shape[1] > 1:
            self.get_placeholder_mask(input_ids, inputs_embeds, tokens=[])
        parts = (self.projector, self.vision_tower)
        if self.training and torch.is_grad_enabled() and any(p.requires_grad for m in parts for p in m.parameters()):
            inputs_embeds = self._touch_projector(inputs_embeds)
        return inputs_embeds, None

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        states_to_keep: torch.BoolTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        num_query_tokens: int | torch.LongTensor | None = None,
        num_crops: torch.LongTensor | None = None,
        **kwargs,
    ) -> HoneybeeModelOutputWithPast:
        """
        Args:
            input_ids: (B, T), each image as M placeholders. Or `inputs_embeds` (B, T, D_lm), not both.
            pixel_values: (I, 3, S, S), images of all rows in order of appearance; None or I = 0 where no row has one.
            attention_mask: (B, T), 0 at padding.
            position_ids: (B, T). Several conversations packed into a row start at 0 each, and none sees another; this
                needs `attention_mask=None` and no cache.
            states_to_keep: (B, T), where the last hidden states are wanted: they are (1, kept, D_lm) then.
            mm_encoder_outputs: instead of `pixel_values`, what [`get_image_features`] returned for them, as "image". Its
                visual tokens fill the placeholders in order, and may be those of a part of an image (chunked prefill).
            past_key_values, cache: two names of one argument, the older one and that of transformers 5.24.
            num_query_tokens: M of all images, or (I,) int64, an M for each; the rows have the placeholders for it.
                Default: the config's. Read where `pixel_values` are given.
            num_crops: (pictures,) int64, how many of the images in `pixel_values` are squares of one picture, whose
                placeholders stand in one row. Default: one each. Read where `pixel_values` are given.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`, a cache under both of its names, images given
                twice or where the vocabulary has no placeholder, placeholders and images that disagree, or what
                [`get_image_features`] refuses.
        """
        feature_settings = ("vision_feature_layer", "vision_feature_select_strategy")
        self._check_feature_settings(*(kwargs.pop(name, None) for name in feature_settings))
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument; give one of them")
        cache = past_key_values if cache is None else cache
        images = (mm_encoder_outputs or {}).get("image")
        inputs_embeds, visual_tokens = self._embed(
            input_ids, inputs_embeds, pixel_values, num_query_tokens, num_crops, images
        )

        if cache is None and attention_mask is None and _is_packed(position_ids):
            # transformers looks for packed rows only where there is no cache, and makes one unless told not to.
            kwargs["use_cache"] = False
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            **kwargs,
        )
        if isinstance(outputs, tuple):  # return_dict=False
            return outputs
        # Language models have outputs of their own; what is common to all is taken.
        common = {name: outputs.get(name) for name in _OUTPUT_FIELDS}
        if states_to_keep is not None:
            states = common["last_hidden_state"]
            common["last_hidden_state"] = states[states_to_keep.to(states.device)][None]
        return HoneybeeModelOutputWithPast(**common, image_hidden_states=visual_tokens)


class HoneybeeForConditionalGeneration(HoneybeePreTrainedModel, GenerationMixin):
    """[`HoneybeeModel`] with the language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_rep" if _TRANSFORMERS_4 else "colwise_gather_output"}
    # Trainers count what is learned before the model masks placeholders: a sum divided by their count would be too small.
    accepts_loss_kwargs = False

    def __init__(self, config: HoneybeeConfig):
        super().__init__(config)
        self.model = HoneybeeModel(config)
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.language_model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.generation_config = greedy_generation_config(self.generation_config.to_diff_dict(), config.image_token_id)
        self.post_init()
        self._no_split_modules = self.model._no_split_modules

    def __setattr__(self, name: str, value):
        # Trainers put a forward of their own in the place of ours, for a loss without all logits (TRL, Liger), and some
        # call it without going through `__call__` (peft).
        if name == "forward" and isinstance(value, types.MethodType):
            value = types.MethodType(_masking_labels(value.__func__), value.__self__)
        super().__setattr__(name, value)

    def greedy_generation_config(self) -> GenerationConfig:
        """The model's special tokens and `suppress_tokens`, without its other generation settings. With these alone it
        answers greedily; what else a checkpoint has, such as penalties or a minimum length, would give other tokens."""
        return greedy_generation_config(self.generation_config.to_diff_dict(), self.config.image_token_id)

    # Read by tools that look for the parts on the outermost module (peft, vLLM, quantization).
    @property
    def language_model(self):
        return self.model.language_model

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def get_decoder(self):
        return self.model.get_decoder()

    def set_decoder(self, decoder):
        self.model.set_decoder(decoder)

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs):
        """See [`HoneybeeModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        num_query_tokens: int | torch.LongTensor | None = None,
        num_crops: torch.LongTensor | None = None,
        **kwargs,
    ) -> HoneybeeCausalLMOutputWithPast | tuple:
        """Takes what [`HoneybeeModel`] takes, and

        Args:
            labels: (B, T), -100 where a token is not to be learned; placeholders never are, whatever is given.
            shift_labels: (B, T), what each position predicts, where `labels` cannot be shifted here (a row that is split
                between devices); `labels` are not read then.
            logits_to_keep: compute logits for this many last positions, or for the positions that it lists; 0 for all.
                Default: all, except in training with `labels`. There the head runs only where a label is learned, and
                `logits` is None. The loss is the same, without what can be the largest tensor of a step.
        """
        # Not in the signature: a Trainer evaluates no loss where one of the labels that it finds there is not given.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            num_query_tokens=num_query_tokens,
            num_crops=num_crops,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss_settings = {"vocab_size": self.config.text_config.vocab_size, **kwargs}
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        shift_labels = _without_placeholders(shift_labels, self.config.image_token_id)
        logits = loss = None
        if shift_labels is not None and self.training and logits_to_keep is None:
            shift_labels = shift_labels.to(hidden_states.device)  # (B, T)
            learned = shift_labels != -100
            predictions = self.lm_head(hidden_states[learned])  # (learned, V)
            loss = self.loss_function(predictions, None, shift_labels=shift_labels[learned], **loss_settings)
        else:
            if isinstance(logits_to_keep, int):
                logits_to_keep = slice(-logits_to_keep, None) if logits_to_keep else None
            logits = self.lm_head(hidden_states if logits_to_keep is None else hidden_states[:, logits_to_keep])
            if shift_labels is not None:
                loss = self.loss_function(logits, None, shift_labels=shift_labels, **loss_settings)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        output = HoneybeeCausalLMOutputWithPast(loss=loss, logits=logits, **rest)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids,
        pixel_values=None,
        mm_encoder_outputs=None,
        inputs_embeds=None,
        num_query_tokens=None,
        num_crops=None,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        # Images go in with the step that holds their placeholders; the steps of one token that follow find them in the
        # cache.
        step_ids, cache = model_inputs.get("input_ids"), model_inputs.get(CACHE)
        decoding = step_ids is not None and step_ids.shape[1] == 1 and cache is not None and cache.get_seq_length() > 0
        if not decoding and (step_ids is None or bool((step_ids == self.config.image_token_id).any())):
            # transformers 5 has encoded them by now; where it goes through a prompt in chunks it hands out their parts.
            images = {"pixel_values": pixel_values, "mm_encoder_outputs": mm_encoder_outputs or None}
            images |= {"num_query_tokens": num_query_tokens, "num_crops": num_crops}
            model_inputs.update({name: value for name, value in images.items() if value is not None})
        return model_inputs

    if _TRANSFORMERS_4:

        def _prefill_chunking(self, input_ids, generation_config, **model_kwargs):
            if model_kwargs.get("pixel_values") is not None:
                raise ValueError(
                    f"prefill_chunk_size={generation_config.prefill_chunk_size} would cut images, which transformers 4 does "
                    "not encode beforehand; leave it out"
                )
            return super()._prefill_chunking(input_ids, generation_config, **model_kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # Beams repeat rows, and a row owns as many images as it has placeholders for; repeating image by image, as the
        # generic code does, would hand a row's second image to its neighbour.
        images = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "num_query_tokens", "num_crops")}
        pixel_values, numbers, crops = images.values()
        given_ids = input_ids if input_ids is not None and input_ids.shape[1] else None  # else inputs_embeds
        placeholder_mask = functools.partial(
            self.model.get_placeholder_mask, given_ids, model_kwargs.get("inputs_embeds")
        )
        encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if expand_size > 1 and encoded is not None:
            # transformers repeats them, and does not check that each is whole within a row.
            placeholder_mask([len(tokens) for tokens in encoded.pooler_output])
        if expand_size > 1 and pixel_values is not None:
            of_images = self.model.count_image_tokens(numbers, len(pixel_values), crops)
            mask = placeholder_mask(of_images)
            row_ends = mask.sum(-1).cumsum(0).cpu()

            def repeated(tokens: list[int]) -> torch.Tensor:
                """The order of images, or of squares, when each row is repeated; `tokens` are those of each."""
                ends = torch.searchsorted(torch.tensor(tokens).cumsum(0), row_ends, right=True)
                rows = torch.arange(len(tokens)).tensor_split(ends[:-1])
                return torch.cat([row for row in rows for _ in range(expand_size)])

            of_squares = self.model.count_image_tokens(numbers, len(pixel_values))
            order = repeated(of_squares)
            images["pixel_values"] = pixel_values[order.to(pixel_values.device)]
            if numbers is not None:
                images["num_query_tokens"] = (
                    torch.tensor(of_squares)[order] - self.config.projector_config.num_eos_tokens
                )
            if crops is not None:
                images["num_crops"] = torch.as_tensor(crops).cpu()[repeated(of_images)]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        model_kwargs.update({name: value for name, value in images.items() if value is not None})
        return input_ids, model_kwargs

    # Joining pretrained parts. Both take the class that they are called on.
    from_vision_text_pretrained = classmethod(from_vision_text_pretrained)
    config_from_vision_text_pretrained = classmethod(config_from_vision_text_pretrained)


HoneybeeModel.register_for_auto_class("AutoModel")
HoneybeeForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["HoneybeeForConditionalGeneration", "HoneybeeModel", "HoneybeePreTrainedModel"]
