# SPDX-License-Identifier: Apache-2.0
"""Run by torchrun in test_text_only_rank.py: trains on samples with an image at even numbers and without at odd ones."""

import sys

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from trl import SFTConfig

from modeling_honeybee.processes import leave_processes
from tests.tiny import picture, tiny_model, tiny_processor
from training.collator import HoneybeeDataCollator
from training.stages import freeze_for_stage
from training.trainer.packed_attention import use_packed_attention
from training.trainer.trainer import HoneybeeTrainer


class Collator(HoneybeeDataCollator):
    """Keeps which samples had an image."""

    def __call__(self, examples):
        self.seen.append([len(example["images"]) for example in examples])
        return super().__call__(examples)


def make(batch):
    samples = {"messages": [], "images": []}
    for number in batch["number"]:
        images = [picture(number)] if number % 2 == 0 else []
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "What is it? " * (1 + number % 3)}]
        answer = {"role": "assistant", "content": "a brown dog " * (1 + number % 4)}
        samples["messages"].append([{"role": "user", "content": content}, answer])
        samples["images"].append(images)
    return samples


def main(stage: str, projector_type: str, checkpointing: str, batch_size: str, world_size: str, output: str):
    processor = tiny_processor(4)
    model = tiny_model(projector_type, config={"image_token_id": processor.image_token_id}, dropout=0.0)
    freeze_for_stage(model, stage)
    assert use_packed_attention(model.model.language_model)
    dataset = Dataset.from_dict({"number": list(range(8))})
    dataset.set_transform(make)
    args = SFTConfig(
        output_dir=output + ".run", max_steps=4, per_device_train_batch_size=int(batch_size), learning_rate=0.01, bf16=False,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, remove_unused_columns=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=False, optim="sgd", lr_scheduler_type="constant",
        gradient_checkpointing=checkpointing == "True", max_grad_norm=1e9,
    )  # fmt: skip
    assert args.world_size == int(world_size), f"{args.world_size} processes instead of {world_size}"
    collator = Collator(processor, pack=True)
    collator.seen = []
    trainer = HoneybeeTrainer(
        model=model, args=args, train_dataset=dataset, processing_class=processor, data_collator=collator,
        sampler=SequentialSampler(dataset),
    )  # fmt: skip
    trainer.train()
    if args.world_size == 2:
        assert collator.seen[:4] == [[1 - args.process_index]] * 4, collator.seen
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        torch.save({"model": model.state_dict(), "losses": losses}, output)
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_processes(2)
