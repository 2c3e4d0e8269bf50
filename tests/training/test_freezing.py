# SPDX-License-Identifier: Apache-2.0
"""After some steps exactly the tensors that a setup names have changed, bitwise."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from tests.tiny import picture, tiny_model, tiny_processor
from training.collator import HoneybeeDataCollator
from training.run.lora import lora_modules
from training.stages import freeze_for_stage
from training.trainer.packed_attention import use_packed_attention
from training.trainer.trainer import HoneybeeTrainer


def conversations() -> Dataset:
    rows = Dataset.from_dict({"number": list(range(16))})

    def make(batch):
        samples = {"messages": [], "images": []}
        for number in batch["number"]:
            images = number % 3 != 2  # a third is text alone
            content = [{"type": "image"}] * images + [{"type": "text", "text": f"What is {number}?"}]
            answer = {"role": "assistant", "content": f"a brown dog {number}"}
            samples["messages"].append([{"role": "user", "content": content}, answer])
            samples["images"].append([picture(number)] * images)
        return samples

    rows.set_transform(make)
    return rows


def train(model, folder, peft_config=None, pack=True, **settings) -> tuple[dict, dict, list[float]]:
    """State before and after three steps, under the names of the trained model, and the losses."""
    processor = tiny_processor(model.config.num_image_tokens)
    if pack:
        use_packed_attention(model.model.language_model)
    args = SFTConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=0.02, bf16=False, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True, remove_unused_columns=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=False, weight_decay=0.1, **settings,
    )  # fmt: skip
    trainer = HoneybeeTrainer(
        model=model, args=args, train_dataset=conversations(), processing_class=processor, peft_config=peft_config,
        data_collator=HoneybeeDataCollator(processor, pack=pack),
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    assert before.keys() == after.keys()
    return before, after, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def changed(before, after) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def joined(projector_type="c-abs", **settings):
    return tiny_model(projector_type, config={"image_token_id": tiny_processor().image_token_id}, **settings)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("projector_type", ["c-abs", "d-abs", "resampler", "mlp"])
@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_a_stage_changes_its_parts_and_nothing_else(stage, projector_type, checkpointing, tmp_path):
    model = joined(projector_type)
    freeze_for_stage(model, stage)
    before, after, losses = train(model, tmp_path, gradient_checkpointing=checkpointing)
    parts = {"align": ("model.projector.",), "instruct": ("model.projector.", "model.language_model.", "lm_head.")}[
        stage
    ]
    expected = {name for name, _ in model.named_parameters() if name.startswith(parts)}
    assert changed(before, after) == expected and len(losses) == 3
    assert any(name.startswith("model.vision_tower.") for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_changes_adapters_and_the_projector(dtype, checkpointing, tmp_path):
    """In bfloat16 the base is frozen in another dtype than the float32 adapters, as under QLoRA; 4-bit weights need
    bitsandbytes, which this does not try."""
    model = joined().to(dtype)
    freeze_for_stage(model, "align")
    peft_config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **lora_modules("instruct"))
    before, after, _ = train(model, tmp_path, peft_config, gradient_checkpointing=checkpointing)
    moved = changed(before, after)
    adapters = {name for name in before if ".lora_" in name}
    projector = {name for name in before if "projector.modules_to_save.default." in name}
    assert moved == adapters | projector
    assert {before[name].dtype for name in adapters} == {torch.float32}
    layers = model.config.text_config.num_hidden_layers
    assert len(adapters) == layers * 2 * 2  # q and v, A and B
    assert all(".language_model.layers." in name and (".q_proj." in name or ".v_proj." in name) for name in adapters)


def test_checkpointing_recomputes_every_part(tmp_path):
    """Blocks run again in backward: the LLM's, the projector's, and the tower's where it is trained."""
    for projector_type in ("c-abs", "d-abs"):
        model = joined(projector_type).train()
        model.gradient_checkpointing_enable()
        calls = {}

        def count(name, calls=calls):
            return lambda module, args, kwargs: calls.update({name: calls.get(name, 0) + 1})

        blocks = {
            "tower": next(m for m in model.model.vision_tower.modules() if isinstance(m, torch.nn.ModuleList))[0],
            "language model": model.model.language_model.layers[0],
            "projector": next(
                m for m in model.model.projector.modules() if getattr(m, "gradient_checkpointing", None) is not None
            ),
        }
        # What is inside a checkpointed block runs twice, the block's own wrapper once or twice by version.
        for name, block in blocks.items():
            inner = [m for m in block.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))][0]
            inner.register_forward_pre_hook(count(name), with_kwargs=True)
        processor = tiny_processor()
        batch = HoneybeeDataCollator(processor, pack=True)([conversations()[index] for index in range(3)])
        model(**batch, use_cache=False).loss.backward()
        assert calls == {"tower": 2, "language model": 2, "projector": 2}, projector_type
