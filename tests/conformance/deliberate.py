# SPDX-License-Identifier: Apache-2.0
"""Tests of transformers that a Honeybee does not pass, and why: by name, and by what the failure says."""

import re

PLACEHOLDERS = (
    "it calls the model with image placeholders (at random, or with the pixels taken away) and no picture, which stays "
    "an error: the answer would be about an image that was never seen"
)
MISSING = "it loads a checkpoint that lacks tensors, which stays an error: random weights answer fluently and wrongly"
UNUSED = (
    "it wants a gradient for the tower's last norm, which comes after the features and gets none; llava's is marked as "
    "an expected failure for the same"
)
INNER = "transformers 4 only: the CLIP tower is held without its wrapper, so that 4 and 5 give its weights one name"
CACHE_NAME = (
    "5.24 and later: it wants a warning for the older name of the cache, which stays a name of it; llava's fails too"
)
TOWER = (
    "5.24 and later: it wants the tower's whole output beside the visual tokens; `get_image_features` gives it, and a step "
    "of training does not keep it"
)
SAYS = {
    PLACEHOLDERS: r"input_ids hold \d+ image placeholders",
    MISSING: r"lacks \d+ tensors of",
    UNUSED: r"post_layernorm\.\w+ in \w+ has no gradient",
    CACHE_NAME: r"False is not true",
    TOWER: r"False is not true",
    INNER: r"has no attribute '_supports_sdpa'",
}
DELIBERATE = {
    r"test_eager_matches_sdpa_inference_\d+_.*": PLACEHOLDERS,
    r"test_model_rope_scaling_from_config_\d_.*": PLACEHOLDERS,
    r"test_base_model_prefix_loads_base_weights": MISSING,
    r"test_correct_missing_keys": MISSING,
    r"test_model_weights_reload_no_missing_tied_weights": MISSING,
    r"test_training_gradient_checkpointing(_use_reentrant(_true|_false)?)?": UNUSED,
    r"test_bc_cache_name_forward": CACHE_NAME,
    r"test_multimodal_outputs_are_returned": TOWER,
    r"test_sdpa_can_dispatch_composite_models": INNER,
}


def reason(test: str, failure: str) -> str | None:
    """Why a test fails so on purpose; None for all others."""
    return next(
        (why for name, why in DELIBERATE.items() if re.fullmatch(name, test) and re.search(SAYS[why], failure)), None
    )
