# SPDX-License-Identifier: Apache-2.0
"""Images and messages in, model inputs out."""

from .prepare_tokenizer import prepare_tokenizer, processor_from_vision_text_pretrained
from .processing_honeybee import HoneybeeProcessor

__all__ = ["HoneybeeProcessor", "prepare_tokenizer", "processor_from_vision_text_pretrained"]
