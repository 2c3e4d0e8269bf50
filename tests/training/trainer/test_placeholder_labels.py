# SPDX-License-Identifier: Apache-2.0
"""No path to a loss learns a placeholder, whoever made the labels."""

import functools
import inspect
import types

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor
from tests.tiny import picture, sample, tiny_inputs, tiny_model
from training.trainer.trainer import HoneybeeTrainer

ROWS = [(5, "image", 6, "image", 7), (8, 9, 10), (11, "image")]


def masked_by_hand(input_ids, attention_mask, image_token_id):
    return torch.where((input_ids == image_token_id) | (attention_mask == 0), -100, input_ids)


def cross_entropy(model, inputs, labels):
    """The mean over what is learned, from the logits."""
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in inputs}
    with torch.no_grad():
        logits = model.eval()(**given).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def shifted(labels):
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize("path", ["train", "eval", "some logits", "shift_labels", "TRL", "TRL shift_labels"])
@pytest.mark.parametrize("adapted", [False, True])
def test_every_path_to_the_loss(path, adapted):
    base = model = tiny_model()
    inputs = tiny_inputs(model, ROWS)
    inputs["labels"] = torch.where(inputs["attention_mask"] == 0, -100, inputs["input_ids"])  # placeholders included
    labels = masked_by_hand(inputs["input_ids"], inputs["attention_mask"], model.config.image_token_id)
    expected = cross_entropy(model, inputs, labels)
    given = inputs["labels"].clone()
    if path.startswith("TRL"):
        add_fused_lm_head(model)
        inputs["fused_lm_head"] = True
    if adapted:
        model = get_peft_model(
            model, LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["lm_head"])
        )
        assert model.get_base_model() is base
    if path.endswith("shift_labels"):
        inputs["shift_labels"] = shifted(inputs.pop("labels"))
    if path == "some logits":
        inputs["logits_to_keep"] = 0
    model.train(path != "eval")
    loss = model(**inputs).loss
    torch.testing.assert_close(loss.detach(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model(**inputs).loss.detach(), expected, atol=1e-6, rtol=1e-6)
    if "labels" in inputs:
        assert torch.equal(inputs["labels"], given)  # the caller's stay as they are
    # A row that ends just before an image must not teach the head its placeholder.
    if not adapted and path != "eval":
        loss.backward()
        by_hand = tiny_model().train()
        clean = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        by_hand(**clean, labels=labels).loss.backward()
        torch.testing.assert_close(model.lm_head.weight.grad, by_hand.lm_head.weight.grad, atol=1e-6, rtol=1e-5)


def test_a_replaced_forward_keeps_its_signature_and_its_model():
    model = tiny_model()
    before = inspect.signature(model.forward)
    original = model.forward

    @functools.wraps(type(model).forward)
    def other(self, *args, **kwargs):
        return self, kwargs["labels"], original

    model.forward = types.MethodType(other, model)
    assert inspect.signature(model.forward) == before
    labels = torch.tensor([[5, model.config.image_token_id, 6]])
    who, got, _ = model(labels=labels)
    assert who is model and got.tolist() == [[5, -100, 6]]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_plain_sft_trainer_has_the_loss_of_ours(steps, saved, tmp_path):
    """TRL's own collator leaves placeholders in the labels, and the trainer counts them."""
    processor = HoneybeeProcessor.from_pretrained(saved)
    rows = [
        {"messages": sample(number)["messages"], "images": [picture(number)]} for number in range(2 * steps)
    ]  # fmt: skip
    losses, batches = {}, []
    for trainer_class in (SFTTrainer, HoneybeeTrainer):
        model = HoneybeeForConditionalGeneration.from_pretrained(saved)
        args = SFTConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=steps,
            learning_rate=0.0, bf16=False, max_length=None, logging_steps=1, report_to="none", save_strategy="no",
            use_cpu=True, dataloader_pin_memory=False, average_tokens_across_devices=False,
        )  # fmt: skip
        trainer = trainer_class(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=processor
        )
        batches = list(trainer.get_train_dataloader())
        assert (batches[0]["labels"] == processor.image_token_id).any()
        if trainer_class is HoneybeeTrainer:  # which brings its own collator, that masks them
            collate = trainer.data_collator

            def masked(examples, collate=collate):
                batch = collate(examples)
                batch["labels"][batch["labels"] == processor.image_token_id] = -100
                batch["labels"][:, 0] = -100  # nothing predicts it, but transformers 4 counts it
                return batch

            trainer.data_collator = masked
        trainer.train()
        losses[trainer_class] = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
        evaluated = trainer.evaluate(Dataset.from_list(rows[:2]))["eval_loss"]
        batch = trainer.data_collator([dict(row) for row in Dataset.from_list(rows[:2])])
        labels = masked_by_hand(batch["input_ids"], batch["attention_mask"], processor.image_token_id)
        assert evaluated == pytest.approx(cross_entropy(model, batch, labels).item(), abs=1e-4)
    assert losses[SFTTrainer] == pytest.approx(losses[HoneybeeTrainer], abs=1e-4)
    means = []
    for batch in batches:
        labels = masked_by_hand(batch["input_ids"], batch["attention_mask"], processor.image_token_id)
        means.append(cross_entropy(model, batch, labels))
    assert losses[SFTTrainer] == pytest.approx(sum(means).item() / steps, abs=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_transformers_trainer_counts_no_placeholders(adapted, tmp_path):
    model = tiny_model()
    inputs = tiny_inputs(model, [(5, "image", 7, 8)])
    inputs["labels"] = inputs["input_ids"].clone()
    labels = masked_by_hand(inputs["input_ids"], inputs["attention_mask"], model.config.image_token_id)
    expected = cross_entropy(model, inputs, labels).item()
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, learning_rate=0.0, logging_steps=1, report_to="none", save_strategy="no",
        use_cpu=True, dataloader_pin_memory=False, remove_unused_columns=False, per_device_train_batch_size=1,
    )  # fmt: skip
    if adapted:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=r".*language_model.*q_proj"))
    trainer = Trainer(model=model, args=args, train_dataset=[0], data_collator=lambda rows: dict(inputs))
    assert trainer.evaluate([0])["eval_loss"] == pytest.approx(expected, abs=1e-4)
    trainer.train()
    logged = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert logged == pytest.approx(expected, abs=1e-4)
