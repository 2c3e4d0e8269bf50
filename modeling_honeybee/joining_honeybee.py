# SPDX-License-Identifier: Apache-2.0
"""Joins a pretrained vision tower and a pretrained language model with a new projector: where stage 1 starts.

Travels with every checkpoint: torch and transformers are the only imports. The two functions without an underscore are
class methods of `HoneybeeForConditionalGeneration`. Its file imports this one, so the class comes in as an argument.
"""

import logging

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from .configuration_honeybee import HoneybeeConfig, HoneybeeProjectorConfig
from .generation_config_honeybee import SPECIAL_TOKENS, greedy_generation_config, in_words, read_generation_settings
from .probe_honeybee import ask_language_model, ask_tower, check_language_model, check_tower
from .projectors_honeybee import build_projector

logger = logging.getLogger(__name__)


def from_vision_text_pretrained(
    model_class: type[PreTrainedModel],
    vision: str,
    text: str,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    **settings,
) -> PreTrainedModel:
    """Joins a pretrained vision tower and a pretrained language model with a new projector.

    Args:
        vision: Hub name or folder of a vision model. Of a two-tower model (CLIP, SigLIP) the vision half is taken.
        text: Hub name or folder of a causal language model. Both models must be of types that transformers itself has:
            a saved Honeybee carries its own code and nobody else's. Of the generation settings the special tokens and
            `suppress_tokens` are taken over; the log names the others.
        dtype: of all three parts; default: the language model's.
        attn_implementation: of the vision tower and the language model; default: what transformers chooses.
        settings: `image_token_id`, the id of `<image>`. Default: the one that the tokenizer of `text` has, or would give
            to a new token. The embedding grows where needed; new rows start at the mean of the others.
            `image_size`, the side of the square images in pixels. Default: the tower's own. For another size its position
            embedding is interpolated (bicubic on the grid, class token kept) and nothing else changes.
            `vision_feature_layer` (-2) and `vision_feature_select_strategy`: see [`HoneybeeConfig`]. Default of the
            strategy: the one that fits the tower.
            All others are fields of [`HoneybeeProjectorConfig`].

    Raises:
        ValueError: an unknown setting, parts that do not fit, or a part that does not answer in the joined model as it
            does alone. To see this, the outputs for a short text and a picture are compared.
    """
    model = _without_weights(model_class, vision, text, **settings)
    config = model.config
    loading = {"dtype": dtype or config.dtype or torch.float32}
    if attn_implementation is not None:
        loading["attn_implementation"] = config._attn_implementation = attn_implementation
    # Its own generation config may be one that cannot be loaded, or not saved.
    causal_lm = AutoModelForCausalLM.from_pretrained(text, generation_config=GenerationConfig(), **loading)
    tower = AutoModel.from_pretrained(vision, config=_vision_config(vision), **loading)
    if tower.config.image_size != config.vision_config.image_size:
        _resize_positions(tower, config.vision_config.image_size)

    # Both are asked before they are taken apart, for there is no second copy to ask.
    features = ask_tower(tower, config.vision_hidden_states, vision)
    answers = ask_language_model(causal_lm, config.image_token_id, text)
    _grow_vocabulary(causal_lm, config.text_config.vocab_size)
    _put_parts_in(model, tower, causal_lm, vision, text)
    model.generation_config = _generation_config(config, text)
    model.tie_weights()
    model.eval()
    check_tower(model, features, vision)
    check_language_model(model, answers, text)
    return model


def config_from_vision_text_pretrained(
    model_class: type[PreTrainedModel], vision: str, text: str, **settings
) -> HoneybeeConfig:
    """The config of the model that [`from_vision_text_pretrained`] would make, without reading a weight.

    Arguments and errors are that function's.
    """
    return _without_weights(model_class, vision, text, **settings).config


def _without_weights(
    model_class: type[PreTrainedModel],
    vision: str,
    text: str,
    *,
    image_token_id: int | None = None,
    image_size: int | None = None,
    vision_feature_layer: int | list[int] = -2,
    vision_feature_select_strategy: str | None = None,
    **projector_settings,
) -> PreTrainedModel:
    """The joined model on the meta device, so that parts that do not fit are refused before their weights are read."""
    projector_config = HoneybeeProjectorConfig.from_settings(projector_settings)
    vision_config, text_config = _vision_config(vision), AutoConfig.from_pretrained(text)
    own_size = getattr(vision_config, "image_size", None)
    vision_config.image_size = image_size or own_size
    if image_token_id is None:
        tokenizer = AutoTokenizer.from_pretrained(text)
        image_token_id = tokenizer.get_vocab().get("<image>", len(tokenizer))
    config = HoneybeeConfig(
        vision_config=vision_config,
        text_config=text_config,
        projector_config=projector_config,
        image_token_id=image_token_id,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy or "default",
        dtype=getattr(text_config, "dtype", None),
    )
    config.text_config.vocab_size = max(config.text_config.vocab_size, image_token_id + 1)
    with torch.device("meta"):
        if AutoModelForCausalLM.from_config(text_config).get_output_embeddings().bias is not None:
            raise ValueError(f"the head of {text} has a bias, which Honeybee's has not; use another language model")
        model = model_class(config)
    tower = model.model.vision_tower
    if config.vision_config.image_size != own_size and _position_embedding(tower) is None:
        raise ValueError(
            f"image_size={image_size}: {type(tower).__name__} has no position embedding to interpolate; use its own "
            f"size, {own_size}"
        )
    if vision_feature_select_strategy is None:
        config.vision_feature_select_strategy = _select_strategy(tower, config)
    return model


def _vision_config(vision: str):
    config = AutoConfig.from_pretrained(vision)
    return getattr(config, "vision_config", config)


def _select_strategy(tower: nn.Module, config: HoneybeeConfig) -> str:
    """`default` for a tower with one class token, `full` for one without, found by encoding a blank image."""
    size, num_patches = config.vision_config.image_size, config.num_patches
    height, width = (size, size) if isinstance(size, int) else size
    parameter = next(tower.parameters())
    blank = torch.zeros(
        1, config.vision_config.num_channels, height, width, dtype=parameter.dtype, device=parameter.device
    )
    with torch.no_grad():
        num_tokens = tower(blank).last_hidden_state.shape[1]
    strategies = {num_patches + 1: "default", num_patches: "full"}
    if num_tokens not in strategies:
        raise ValueError(
            f"the vision tower gives {num_tokens} tokens for {num_patches} patches; Honeybee takes towers with one "
            "class token or none"
        )
    return strategies[num_tokens]


def _position_embedding(tower: nn.Module) -> nn.Embedding | None:
    """The tower's learned position embedding, None where it has none."""
    embeddings = getattr(getattr(tower, "vision_model", tower), "embeddings", None)
    found = getattr(embeddings, "position_embedding", None)
    return found if isinstance(found, nn.Embedding) else None


def _resize_positions(tower: PreTrainedModel, image_size: int) -> None:
    """Lets a tower with a learned position embedding take another image size; its other weights stay as they are."""
    embeddings = getattr(tower, "vision_model", tower).embeddings
    old, patch_size = _position_embedding(tower), tower.config.patch_size
    side, new_side = tower.config.image_size // patch_size, image_size // patch_size
    num_extra = old.num_embeddings - side**2  # the class token's
    grid = old.weight.detach()[num_extra:].float().T.reshape(1, -1, side, side)
    grid = nn.functional.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    weight = torch.cat([old.weight.detach()[:num_extra], grid[0].flatten(1).T.to(old.weight.dtype)])
    embeddings.position_embedding = nn.Embedding.from_pretrained(weight, freeze=False)
    embeddings.register_buffer("position_ids", torch.arange(len(weight)).expand(1, -1), persistent=False)
    embeddings.num_patches, embeddings.num_positions, embeddings.image_size = new_side**2, len(weight), image_size
    tower.config.image_size = image_size


def _grow_vocabulary(causal_lm: PreTrainedModel, vocab_size: int) -> None:
    """Gives embedding and head rows up to `vocab_size`; new ones start at the mean of the others."""
    old_size = causal_lm.get_input_embeddings().weight.shape[0]
    if vocab_size <= old_size:
        return
    causal_lm.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        for weight in {causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings().weight}:
            weight[old_size:] = weight[:old_size].float().mean(dim=0).to(weight.dtype)


def _put_parts_in(
    model: PreTrainedModel, tower: PreTrainedModel, causal_lm: PreTrainedModel, vision: str, text: str
) -> None:
    """Gives a model on the meta device the loaded parts and a new projector. No weight exists twice."""
    config, base = model.config, model.model
    # Gemma 3 on transformers 4 is its own base model
    language_model = causal_lm.base_model if causal_lm.base_model is not causal_lm else causal_lm.model
    for part_config, part in ((config.vision_config, tower), (config.text_config, causal_lm)):
        part_config._attn_implementation = part.config._attn_implementation  # `hold` lets the part read ours instead
    planned_tower, planned_language_model = base.vision_tower, base.language_model
    base.hold(tower, language_model)
    _check_same_tensors(planned_tower, base.vision_tower, f"the vision tower {vision}")
    _check_same_tensors(planned_language_model, language_model, f"the language model {text}")
    model.lm_head = causal_lm.get_output_embeddings()
    config.dtype = model.lm_head.weight.dtype
    projector = build_projector(config).to(config.dtype)
    projector.apply(model._init_weights)
    base.projector = projector


def _check_same_tensors(built: nn.Module, loaded: nn.Module, name: str) -> None:
    """Raises a ValueError where a loaded part has other tensors than the part that the config makes, into which a saved
    model is loaded."""
    expected, found = ({key: tensor.shape for key, tensor in each.state_dict().items()} for each in (built, loaded))
    if differing := [key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]:
        raise ValueError(
            f"{name}: a saved Honeybee could not be loaded, because {len(differing)} tensors such as {differing[0]} are "
            f"others in {type(loaded).__name__} than in the {type(built).__name__} that its config makes; use another one"
        )


def _with_own_end(eos_token_id: int | list[int] | None, text: str) -> int | list[int] | None:
    """The ids that end an answer, and with them the tokenizer's eos, which answers are trained to end with."""
    try:
        own = AutoTokenizer.from_pretrained(text).eos_token_id
    except (OSError, ValueError):  # none beside the model
        return eos_token_id
    known = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return eos_token_id if own is None or own in known else [*(id for id in known if id is not None), own]


def _generation_config(config: HoneybeeConfig, text: str) -> GenerationConfig:
    """The generation config of a joined model; the log names the settings of the language model that it goes without."""
    tokens = {name: getattr(config.text_config, name, None) for name in SPECIAL_TOKENS}
    settings = read_generation_settings(text)
    tokens |= settings
    tokens["eos_token_id"] = _with_own_end(tokens["eos_token_id"], text)
    generation_config = greedy_generation_config(tokens, config.image_token_id)
    kept = generation_config.to_diff_dict()
    if dropped := in_words({name: value for name, value in settings.items() if name not in kept}):
        logger.info("Generation settings of %s that the new model starts without: %s", text, dropped)
    return generation_config
