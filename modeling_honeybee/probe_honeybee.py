# SPDX-License-Identifier: Apache-2.0
"""Checks that a language model answers in a Honeybee, and a vision tower sees in it, as it does alone. Each is asked alone
and as a part, and a difference is an error.

Travels with every checkpoint: torch and transformers are the only imports.

Shapes: T tokens of the text, of which the last K are the language model's own answer; V its vocabulary, N patches, D_v
width of the tower.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

PROMPT_LENGTH, ANSWER_LENGTH = 8, 3  # the second token of an answer is the first one with a cache
# Attention that runs on every device. A model to be trained with another kind is joined before it is on its GPU.
EVERYWHERE = ("eager", "sdpa")


@dataclass
class Answers:
    """What a language model says: `text` (1, T), `cached` logits (K, V) of its answer with a cache, and `logits` (T, V) of
    the text from one forward without a cache."""

    text: torch.LongTensor
    cached: torch.Tensor
    logits: torch.Tensor


@contextmanager
def _undisturbed(model: PreTrainedModel):
    """Generation settings do not act inside, and attention runs on any device."""
    settings = getattr(model, "generation_config", None)
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}.values()
    attention = [(config, config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")]
    if settings is not None:
        model.generation_config = GenerationConfig(pad_token_id=0)
    for config, implementation in attention:
        if implementation not in (None, *EVERYWHERE):
            config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            yield
    finally:
        if settings is not None:
            model.generation_config = settings
        for config, implementation in attention:  # the outermost first: it sets its parts'
            config._attn_implementation = implementation


def _generate(
    model: PreTrainedModel, prompt: torch.LongTensor, image_token_id: int, length: int, use_cache: bool
) -> tuple[torch.LongTensor, torch.Tensor]:
    """The prompt with `length` greedy tokens (1, T), and the logits (length, V) of these."""
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=length,
        do_sample=False,
        suppress_tokens=[image_token_id],  # it stands for a picture in a Honeybee
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences, torch.cat(output.logits)


def _logits(model: PreTrainedModel, text: torch.LongTensor) -> torch.Tensor:
    return model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits[0]


def _logits_of_no_tokens(model: PreTrainedModel, text: torch.LongTensor) -> torch.Tensor:
    states = model.get_input_embeddings()(text) / 2
    return model(inputs_embeds=states, attention_mask=torch.ones_like(text), use_cache=False).logits[0]


def _prompt(model: PreTrainedModel, image_token_id: int) -> torch.LongTensor:
    """Some tokens of the vocabulary, always the same, (1, PROMPT_LENGTH)."""
    config, vocab_size = model.config, model.get_input_embeddings().weight.shape[0]
    special = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    special = {id for ids in special for id in (ids if isinstance(ids, (list, tuple)) else [ids])} | {image_token_id}
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0)).tolist()
    ids = [id for id in ids if id not in special] or ids
    return torch.tensor([(ids * PROMPT_LENGTH)[:PROMPT_LENGTH]], device=model.device)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def ask_language_model(model: PreTrainedModel, image_token_id: int, name: str) -> Answers:
    """The answers of a causal language model that is whole and alone.

    Args:
        image_token_id: of the placeholder that the vocabulary has or is going to have.
        name: of the model, for the error.

    Raises:
        ValueError: it does not answer.
    """
    with _undisturbed(model):
        try:
            text, cached = _generate(
                model, _prompt(model, image_token_id), image_token_id, ANSWER_LENGTH, use_cache=True
            )
            return Answers(text, cached, _logits(model, text))
        except Exception as error:  # whatever a foreign model raises
            raise ValueError(
                f"{name} does not answer on this machine, alone as it is ({_said(error)}), so it cannot be shown that it "
                "would as a part of a Honeybee; use another language model, or another dtype"
            ) from error


def check_language_model(model: PreTrainedModel, own: Answers, name: str) -> None:
    """Compares the answers of a Honeybee with those of its language model alone.

    Args:
        model: a Honeybee; its vocabulary may have grown since.

    Raises:
        ValueError: what differs, with the figures.
    """
    prompt = own.text[:, :PROMPT_LENGTH], model.config.image_token_id
    asked = {
        "in one forward": lambda: (own.logits, _logits(model, own.text)),
        "generating with a cache": lambda: _both(own.text, own.cached, *_generate(model, *prompt, ANSWER_LENGTH, True)),
        # What the forward says is what a language model without a cache would generate.
        "generating without a cache": lambda: _both(
            own.text, own.logits[PROMPT_LENGTH - 1 :], *_generate(model, *prompt, 2, False)
        ),
    }
    # Some look their input up among the tokens' embeddings (Gemma 4), and a picture is none of these.
    asked["given what is no token"] = lambda: 2 * (_logits_of_no_tokens(model, own.text),)
    for how, ask in asked.items():
        with _undisturbed(model):
            try:
                expected, found = ask()
            except Exception as error:  # whatever a foreign model raises
                raise ValueError(
                    f"{name} does not answer as a part of a Honeybee, {how}, as it does alone ({_said(error)}); use "
                    "another language model, or another version of transformers"
                ) from error
        if difference := _difference(expected, found, model.dtype):
            raise ValueError(
                f"{name} does not answer as a part of a Honeybee, {how}, as it does alone: {difference} a logit; use "
                "another language model, or another version of transformers"
            )


def _both(text: torch.LongTensor, own: torch.Tensor, found_text: torch.LongTensor, found: torch.Tensor) -> tuple:
    """Logits to compare: up to the first token that is another, from which on the two continue different texts."""
    new, found_new = text[0, PROMPT_LENGTH:], found_text[0, PROMPT_LENGTH:]
    same = (new[: len(found_new)] == found_new).int().cumprod(0).sum()
    length = min(int(same) + 1, len(found_new))
    return own[:length], found[:length]


def _difference(own: torch.Tensor, found: torch.Tensor, dtype: torch.dtype) -> str | None:
    """The difference in words, where `found` (..., V or more) is not `own` (..., V) up to rounding in `dtype`; else None.
    Both come from the same weights and kernels, and mostly they are equal to the last bit."""
    limit_of_dtype = max(1e-4, torch.finfo(dtype).eps)
    own, found = own.float(), found[..., : own.shape[-1]].float()
    # Broken weights are broken in both.
    same = (own == found) | (own.isnan() & found.isnan())
    gap = (own - found).abs().nan_to_num(torch.inf).masked_fill(same, 0).flatten()
    limit = limit_of_dtype * float(own[own.isfinite()].abs().max()) if own.isfinite().any() else 0.0
    at = gap.argmax()
    if gap[at] <= limit:
        return None
    return f"{found.flatten()[at]:.4g} instead of {own.flatten()[at]:.4g} (limit of the difference {limit:.2g}) for"


def _picture(tower: nn.Module, config: PretrainedConfig) -> torch.Tensor:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    picture = torch.randn(
        1, getattr(config, "num_channels", 3), height, width, generator=torch.Generator().manual_seed(0)
    )
    return picture.to(next(parameter for parameter in tower.parameters() if parameter.is_floating_point()))


def ask_tower(tower: PreTrainedModel, layers: list[int], name: str) -> torch.Tensor:
    """The hidden states (len(layers), 1, tokens, D_v) of a vision tower that is whole and alone, for one picture.

    Raises:
        ValueError: it does not give them.
    """
    with _undisturbed(tower):
        try:
            hidden_states = tower(_picture(tower, tower.config), output_hidden_states=True).hidden_states
            return torch.stack([hidden_states[layer] for layer in layers])
        except Exception as error:  # whatever a foreign model raises
            raise ValueError(
                f"{name} does not give the hidden states {layers} on this machine, alone as it is ({_said(error)}); use "
                "another vision tower"
            ) from error


def check_tower(model: PreTrainedModel, own: torch.Tensor, name: str) -> None:
    """Compares the patch features of a Honeybee with the hidden states of its tower alone.

    Raises:
        ValueError: with the figures.
    """
    if model.config.vision_feature_select_strategy == "default":
        own = own[:, :, 1:]
    own = own[0] if len(own) == 1 else own.transpose(0, 1)
    with _undisturbed(model):
        features = model.model.get_patch_features(_picture(model.model.vision_tower, model.config.vision_config))
    if difference := _difference(own, features, features.dtype):
        raise ValueError(
            f"{name} does not see as a part of a Honeybee what it sees alone: {difference} a feature; use another vision "
            "tower, or another version of transformers"
        )


def check_parts(model: PreTrainedModel, name: str) -> None:
    """Compares a Honeybee with its own language model and tower, each taken out of it and asked as a model of its own. No
    weight is copied.

    Args:
        model: in eval mode.
        name: of it, for the errors.

    Raises:
        ValueError: what differs, with the figures.
    """
    config = model.config
    vision_config, text_config = copy.deepcopy(config.vision_config), copy.deepcopy(config.text_config)
    vision_config.num_hidden_layers = config.num_vision_blocks
    with torch.device("meta"):
        tower = AutoModel.from_config(vision_config, attn_implementation="eager").eval()
        language_model = AutoModelForCausalLM.from_config(text_config, attn_implementation="eager").eval()
    if hasattr(tower, "vision_model"):  # see HoneybeeModel
        tower.vision_model = model.model.vision_tower
    else:
        tower = model.model.vision_tower
    # Gemma 3 on transformers 4 is its own base model
    prefix = "model" if language_model.base_model is language_model else language_model.base_model_prefix
    setattr(language_model, prefix, model.model.language_model)
    language_model.set_output_embeddings(model.lm_head)
    check_tower(model, ask_tower(tower, config.vision_hidden_states, f"the tower of {name}"), f"the tower of {name}")
    text = f"the language model of {name}"
    check_language_model(model, ask_language_model(language_model, config.image_token_id, text), text)
