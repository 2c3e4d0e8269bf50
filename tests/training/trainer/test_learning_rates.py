# SPDX-License-Identifier: Apache-2.0
"""Parts of the model with a learning rate of their own: what moves how far, the groups, and the log."""

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from tests.tiny import tiny_processor
from tests.training.test_freezing import changed, conversations, joined, train
from training.collator import HoneybeeDataCollator
from training.stages import freeze_for_stage
from training.trainer.learning_rates import split_groups
from training.trainer.trainer import HoneybeeTrainer

RATES = {"vision": 0.5, "projector": 3.0}  # times the learning rate


def moved(folder, rates=None, **settings) -> tuple[dict[str, torch.Tensor], list[dict]]:
    model = joined()
    freeze_for_stage(model, "instruct", "all")
    before, after, history = train(model, folder, trainer_settings={"learning_rates": rates}, **settings)
    return {name: after[name] - before[name] for name in changed(before, after)}, history


def part(name: str) -> str | None:
    return {"vision_tower": "vision", "projector": "projector"}.get(name.split(".")[1])


def test_a_step_is_as_long_as_its_parts_rate(tmp_path):
    """With SGD a step is the rate times the gradient."""
    settings = {"optim": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0, "max_steps": 1, "learning_rate": 1e-2}
    settings |= {"lr_scheduler_type": "constant"}
    one, _ = moved(tmp_path / "one", **settings)
    own, _ = moved(tmp_path / "own", {name: times * 1e-2 for name, times in RATES.items()}, **settings)
    assert {part(name) for name in own} == {None, "vision", "projector"}
    for name, step in one.items():
        if step.norm() > 1e-5:  # less is the rounding of the weights
            assert own[name].norm() / step.norm() == pytest.approx(RATES.get(part(name), 1.0), rel=0.02), name


def test_the_log_has_the_rate_of_each_group(tmp_path):
    settings = {"learning_rate": 1e-3, "max_steps": 4, "warmup_steps": 2, "lr_scheduler_type": "cosine_with_min_lr"}
    settings |= {"lr_scheduler_kwargs": {"min_lr": 1e-4}}
    rates = {name: times * 1e-3 for name, times in RATES.items()}
    _, alone = moved(tmp_path / "alone", **settings)
    _, history = moved(tmp_path / "own", rates, **settings)
    assert [row["learning_rate"] for row in history] == [row["learning_rate"] for row in alone]
    assert len({row["learning_rate"] for row in history}) > 2
    for row in history:
        for name, times in RATES.items():
            assert row[f"learning_rate_{name}"] == pytest.approx(times * row["learning_rate"], rel=1e-6)
    assert not any(name.startswith("learning_rate_") for row in alone for name in row)


def trainers(tmp_path, kinds, **settings):
    model, processor = joined(), tiny_processor()
    freeze_for_stage(model, "instruct", 1)
    args = SFTConfig(
        output_dir=str(tmp_path), learning_rate=1e-3, weight_decay=0.1, bf16=False, use_cpu=True, report_to="none",
        remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
    )  # fmt: skip
    common = {"model": model, "args": args, "train_dataset": conversations(), "processing_class": processor}
    return [kind(**common, data_collator=HoneybeeDataCollator(processor), **settings) for kind in kinds]


def test_without_rates_the_groups_are_the_librarys(tmp_path):
    library, ours = (
        trainer.create_optimizer().param_groups for trainer in trainers(tmp_path, (SFTTrainer, HoneybeeTrainer))
    )
    assert len(library) == len(ours) == 2
    for one, other in zip(library, ours):
        assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]]
        assert {k: v for k, v in one.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


def test_groups_keep_decay_and_hold_each_parameter_once(tmp_path):
    rates = {"vision": 1e-4, "projector": 2e-3}
    (trainer,) = trainers(tmp_path, [HoneybeeTrainer], learning_rates=rates)
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer and len(optimizer.param_groups) == 6
    decayed = trainer.get_decay_parameter_names(trainer.model)
    names = {id(p): name for name, p in trainer.model.named_parameters() if p.requires_grad}
    found = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(found) == sorted(names)
    for group in optimizer.param_groups:
        for name in (names[id(p)] for p in group["params"]):
            assert group["weight_decay"] == (0.1 if name in decayed else 0.0), name
            assert group["lr"] == rates.get(part(name), 1e-3), name
    assert optimizer.param_groups[0]["lr"] == 1e-3, "the first is the one that the library logs"


def test_an_empty_group_is_dropped():
    model = torch.nn.ModuleDict(
        {"model": torch.nn.ModuleDict({"projector": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})}
    )
    weights = [model.model[name].weight for name in ("projector", "head")]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": [model.model["projector"].bias]}], lr=1.0)
    base = torch.nn.ModuleDict({"base": model})  # as peft holds a model
    assert split_groups(optimizer, base, {"projector": 0.1}) == [None, "projector", "projector"]
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1, 0.1]
