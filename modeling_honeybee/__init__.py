# SPDX-License-Identifier: Apache-2.0
"""Honeybee for transformers: configuration, projectors and model."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from processing import HoneybeeProcessor

from .configuration_honeybee import HoneybeeConfig, HoneybeeProjectorConfig
from .modeling_honeybee import HoneybeeForConditionalGeneration, HoneybeeModel, HoneybeePreTrainedModel

try:
    from transformers import AutoModelForVision2Seq
except ImportError:  # transformers 5 dropped the name; the class that took its place does the same
    AutoModelForVision2Seq = AutoModelForImageTextToText

try:
    from transformers import AutoModelForMultimodalLM
except ImportError:  # transformers 4 has no such class, nor early 5
    AutoModelForMultimodalLM = None

AutoConfig.register("honeybee", HoneybeeConfig, exist_ok=True)
AutoModel.register(HoneybeeConfig, HoneybeeModel, exist_ok=True)
AutoModelForImageTextToText.register(HoneybeeConfig, HoneybeeForConditionalGeneration, exist_ok=True)
AutoModelForVision2Seq.register(HoneybeeConfig, HoneybeeForConditionalGeneration, exist_ok=True)
if AutoModelForMultimodalLM is not None:
    AutoModelForMultimodalLM.register(HoneybeeConfig, HoneybeeForConditionalGeneration, exist_ok=True)
AutoProcessor.register(HoneybeeConfig, HoneybeeProcessor, exist_ok=True)

__all__ = [
    "AutoModelForVision2Seq",
    "HoneybeeConfig",
    "HoneybeeForConditionalGeneration",
    "HoneybeeModel",
    "HoneybeePreTrainedModel",
    "HoneybeeProjectorConfig",
]
