# SPDX-License-Identifier: Apache-2.0
"""How fast a run trains and how much of it is padding, in the trainer's log."""

import time

import torch


class ThroughputMixin:
    """To be put in front of a trainer: adds to each line of its log, for all processes together since the line before,
    `samples_per_second`, `tokens_per_second` (without padding), `padding_share` and `visual_tokens_per_step`.
    """

    def training_step(self, model, inputs, *args, **kwargs):
        counts = count_batch(inputs, self.processing_class.image_token_id)
        # On the batch's device, and read when the log is written: reading would wait for the device.
        self._counts = counts if getattr(self, "_counts", None) is None else self._counts + counts
        if getattr(self, "_counted_since", None) is None:
            self._counted_since = time.perf_counter(), self.state.global_step
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        # Every process writes a line at the same time, as the trainer itself relies on.
        if "loss" in logs and getattr(self, "_counts", None) is not None:
            start, first_step = self._counted_since
            samples, tokens, padded, visual = self.accelerator.reduce(self._counts.to(self.args.device), "sum").tolist()
            seconds = time.perf_counter() - start
            logs |= {
                "samples_per_second": round(samples / seconds, 3),
                "tokens_per_second": round(tokens / seconds, 1),
                "padding_share": round(1 - tokens / padded, 4),
                "visual_tokens_per_step": round(visual / max(1, self.state.global_step - first_step), 1),
            }
            self._counts = self._counted_since = None
        super().log(logs, *args, **kwargs)


def count_batch(inputs: dict[str, torch.Tensor], image_token_id: int) -> torch.Tensor:
    """Of a batch, (4,) int64: samples, tokens without and with padding, and visual tokens.

    Samples are rows, or in a packed row what `position_ids` start anew.
    """
    input_ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    padded = torch.tensor(input_ids.numel(), device=input_ids.device)
    samples = torch.tensor(len(input_ids), device=input_ids.device) if positions is None else (positions == 0).sum()
    tokens = padded if mask is None else mask.sum()
    return torch.stack([samples, tokens, padded, (input_ids == image_token_id).sum()])
