# SPDX-License-Identifier: Apache-2.0
"""TRL's DPOTrainer takes our model and processor as they are."""

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor
from tests.tiny import picture
from training.collator import HoneybeeDataCollator
from training.stages import freeze_for_stage


def preference(number: int) -> dict:
    def answer(text):
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    question = [{"type": "image"}, {"type": "text", "text": f"What is {number}?"}]
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": answer("a brown dog"),
        "rejected": answer("What"),
        "images": [picture(number, (64, 64))],
    }


@pytest.mark.parametrize("squares", [1, 5])
def test_preferences_are_learned_from_pictures(saved, tmp_path, squares):
    model = HoneybeeForConditionalGeneration.from_pretrained(saved)
    processor = HoneybeeProcessor.from_pretrained(saved)
    processor.max_crops = max(1, squares - 1)
    freeze_for_stage(model, "instruct")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    args = DPOConfig(
        output_dir=str(tmp_path / "dpo"), max_steps=8, per_device_train_batch_size=4, learning_rate=3e-3, bf16=False,
        max_length=None, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    # Without `ref_model` TRL loads the folder that the model came from once more.
    dataset = Dataset.from_list([preference(number) for number in range(8)])
    trainer = DPOTrainer(model=model, args=args, train_dataset=dataset, processing_class=processor)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()

    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: both models are the same
    assert logs[-1]["loss"] < 0.6 and logs[-1]["rewards/margins"] > 0.1 and logs[-1]["rewards/accuracies"] == 1
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if not name.startswith("model.vision_tower.")}

    # The rows that TRL makes are the conversations of supervised training, with one picture each.
    assert batch["pixel_values"].shape[0] in (4 * squares, 8 * squares) and batch["input_ids"].shape[0] == 8
    collator = HoneybeeDataCollator(processor)
    rows = {tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"])}
    ours = set()
    for number in range(8):
        example = preference(number)
        for side in ("chosen", "rejected"):
            one = collator([{"messages": example["prompt"] + example[side], "images": example["images"]}])
            ours.add(tuple(one["input_ids"][0].tolist()))
    assert rows <= ours and len(rows) == 8
