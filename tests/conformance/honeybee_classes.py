# SPDX-License-Identifier: Apache-2.0
"""A tiny Honeybee with each projector under transformers' own test mixins.

Collected by `run.py`, where `tests` is the package of a transformers checkout and not ours.
"""

import unittest

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_pipeline_mixin import PipelineTesterMixin
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.auto import modeling_auto

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration, HoneybeeModel

try:  # checkouts of transformers 4 have no common tests for models that see
    from tests.vlm_tester import VLMModelTest as _VLMModelTest
except ImportError:
    _VLMModelTest = None

# By the names in these the mixins tell which class has a loss and which has none.
modeling_auto.MODEL_MAPPING_NAMES["honeybee"] = "HoneybeeModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["honeybee"] = "HoneybeeForConditionalGeneration"

IMAGE_TOKEN_ID, PAD_TOKEN_ID = 3, 1
VISION = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 3,
    "hidden_size": 32,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 37,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "pad_token_id": PAD_TOKEN_ID,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
ABSTRACTOR = {"hidden_size": 32, "depth": 1, "num_hidden_layers": 2, "num_attention_heads": 4, "num_query_tokens": 4}


class HoneybeeTester:
    """What the mixins ask of a model tester."""

    config_class = HoneybeeConfig
    base_model_class, conditional_generation_class = HoneybeeModel, HoneybeeForConditionalGeneration
    all_model_classes = (HoneybeeModel, HoneybeeForConditionalGeneration)
    pipeline_model_mapping = {
        "image-text-to-text": HoneybeeForConditionalGeneration,
        "any-to-any": HoneybeeForConditionalGeneration,
    }
    projector: dict = {}

    def __init__(self, parent):
        self.parent = parent
        self.is_training = True
        self.batch_size = 3
        self.image_token_id, self.pad_token_id = IMAGE_TOKEN_ID, PAD_TOKEN_ID
        self.num_hidden_layers, self.num_attention_heads = TEXT["num_hidden_layers"], TEXT["num_attention_heads"]
        self.hidden_size, self.vocab_size = TEXT["hidden_size"], TEXT["vocab_size"]
        self.num_image_tokens = self.get_config().num_image_tokens
        self.seq_length = self.encoder_seq_length = 7 + self.num_image_tokens

    def get_config(self) -> HoneybeeConfig:
        return HoneybeeConfig(
            vision_config=CLIPVisionConfig(**VISION),
            text_config=LlamaConfig(**TEXT),
            projector_config=dict(self.projector),
            image_token_id=IMAGE_TOKEN_ID,
            vision_feature_layer=-1,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        size = VISION["image_size"]
        input_ids = ids_tensor([self.batch_size, self.seq_length], TEXT["vocab_size"] - 4) + 4  # no special ones
        input_ids[:, : self.num_image_tokens] = IMAGE_TOKEN_ID
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": floats_tensor([self.batch_size, VISION["num_channels"], size, size]),
        }


class _Mixins(ModelTesterMixin, GenerationTesterMixin, PipelineTesterMixin):
    """What `VLMModelTest` is on 5."""

    _is_composite = True

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(self, config_class=HoneybeeConfig, has_text_modality=False)
        self.all_model_classes = self.model_tester.all_model_classes
        self.pipeline_model_mapping = self.model_tester.pipeline_model_mapping

    def test_config(self):
        self.config_tester.run_common_tests()


def _test_class(name: str, **projector) -> type[unittest.TestCase]:
    tester = type(f"{name}Tester", (HoneybeeTester,), {"projector": projector})
    settings = {"model_tester_class": tester, "test_pruning": False, "test_head_masking": False}  # as llava's, on 4
    return type(f"{name}Test", (_VLMModelTest or _Mixins, unittest.TestCase), settings)


LinearTest = _test_class("Linear", projector_type="linear")
MlpTest = _test_class("Mlp", projector_type="mlp")
ResamplerTest = _test_class("Resampler", projector_type="resampler", **ABSTRACTOR)
CAbstractorTest = _test_class("CAbstractor", projector_type="c-abs", **ABSTRACTOR)
DAbstractorTest = _test_class("DAbstractor", projector_type="d-abs", **ABSTRACTOR)
