# SPDX-License-Identifier: Apache-2.0
"""In training with labels the head runs where a label is learned: the loss of all logits, in less memory."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.measure import in_a_process
from tests.tiny import tiny_inputs, tiny_model

ROWS = ((5, "image", 7, 8, 9, 6), (11, 12, "image", 13, "image", 14), (20, 21, 22))


def batch(model):
    inputs = tiny_inputs(model, ROWS)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]  # also learns to predict what stands after an image
    labels[inputs["input_ids"] == model.config.image_token_id] = -100
    return inputs, labels


@pytest.mark.parametrize("settings", [{}, {"num_items_in_batch": 11}, {"num_items_in_batch": torch.tensor(20)}])
def test_loss_and_gradient_are_those_of_all_logits(settings):
    model = tiny_model().train()
    inputs, labels = batch(model)

    def loss_and_gradients(**kept):
        model.zero_grad()
        output = model(**inputs, labels=labels, **settings, **kept)
        output.loss.backward()
        return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    learned, gradients = loss_and_gradients()
    full, full_gradients = loss_and_gradients(logits_to_keep=0)
    assert learned.logits is None and full.logits.shape[:2] == labels.shape
    assert abs(learned.loss - full.loss) <= 1e-6
    assert gradients.keys() == full_gradients.keys()
    for name, gradient in full_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)

    # A second formula.
    targets = labels[:, 1:].flatten()
    total = cross_entropy(full.logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    expected = total / settings.get("num_items_in_batch", (targets != -100).sum())
    assert abs(learned.loss - expected) <= 1e-6


def test_logits_are_there_where_somebody_reads_them():
    model = tiny_model()
    inputs, labels = batch(model)
    full = model(**inputs).logits
    evaluated = model(**inputs, labels=labels)
    assert torch.equal(evaluated.logits, full)
    model.train()
    assert model(**inputs).logits.shape == full.shape
    last = model(**inputs, labels=labels[:, -2:], logits_to_keep=2)
    assert last.logits.shape[1] == 2
    assert abs(model(**inputs, labels=labels).loss - evaluated.loss) <= 1e-6


def test_the_head_runs_where_a_label_is_learned():
    model = tiny_model().train()
    inputs, labels = batch(model)
    rows = []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:-1].numel()))
    model(**inputs, labels=labels)
    assert rows == [int((labels[:, 1:] != -100).sum())]


def test_a_batch_without_labels_to_learn_gives_zero_gradients():
    """A rank whose part of a global batch has nothing to learn, which the trainer normalises by the others' labels."""
    model = tiny_model().train()
    inputs, labels = batch(model)
    loss = model(**inputs, labels=torch.full_like(labels, -100), num_items_in_batch=5).loss
    loss.backward()
    assert loss == 0 and not model.lm_head.weight.grad.any()


def test_memory_at_32k_vocabulary():
    """Peak memory of a step as the operating system sees it, in a process for each way: the model's own, and the one
    that TRL's trainer takes in `training/sft.py`."""
    full, learned, trl = (
        in_a_process("benchmarks.logits", "--one", way, "--samples", 6, "--no_times")
        for way in ("full", "learned", "TRL, learned")
    )
    assert full["peak_mb"] >= 4 * learned["peak_mb"] > 0
    assert full["peak_mb"] >= 2 * trl["peak_mb"] > 0  # 4.4 at 16 samples: its buffers do not shrink with the batch
    assert abs(learned["loss"] - full["loss"]) <= 2e-6 and abs(trl["loss"] - full["loss"]) <= 2e-6  # of about 10
