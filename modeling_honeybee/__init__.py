# SPDX-License-Identifier: Apache-2.0
"""Honeybee for transformers: configuration, projectors and model."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .configuration_honeybee import HoneybeeConfig, HoneybeeProjectorConfig
from .modeling_honeybee import HoneybeeForConditionalGeneration, HoneybeeModel, HoneybeePreTrainedModel

try:
    from transformers import AutoModelForVision2Seq
except ImportError:  # transformers 5 dropped the name; the class that took its place does the same
    AutoModelForVision2Seq = AutoModelForImageTextToText

AutoConfig.register("honeybee", HoneybeeConfig, exist_ok=True)
AutoModel.register(HoneybeeConfig, HoneybeeModel, exist_ok=True)
AutoModelForImageTextToText.register(HoneybeeConfig, HoneybeeForConditionalGeneration, exist_ok=True)
AutoModelForVision2Seq.register(HoneybeeConfig, HoneybeeForConditionalGeneration, exist_ok=True)

__all__ = [
    "AutoModelForVision2Seq",
    "HoneybeeConfig",
    "HoneybeeForConditionalGeneration",
    "HoneybeeModel",
    "HoneybeePreTrainedModel",
    "HoneybeeProjectorConfig",
]
