# SPDX-License-Identifier: Apache-2.0
"""Images and messages in, model inputs out."""

from .prepare_tokenizer import check_processor, prepare_tokenizer, processor_from_vision_text_pretrained
from .processing_honeybee import HoneybeeProcessor, open_image

__all__ = [
    "HoneybeeProcessor",
    "check_processor",
    "open_image",
    "prepare_tokenizer",
    "processor_from_vision_text_pretrained",
]
