# SPDX-License-Identifier: Apache-2.0
"""After some steps exactly the tensors that a setup names have changed, bitwise."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig
from trl import SFTConfig

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration
from tests.tiny import IMAGE_SIZE, PATCH_SIZE, llama_config, picture, projector_settings, tiny_model, tiny_processor
from training.collator import HoneybeeDataCollator
from training.run.lora import lora_modules
from training.stages import TRAINED, freeze_for_stage, keep_trained_in_float32, tower_parameters
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


def train(
    model, folder, peft_config=None, pack=True, trainer_settings=None, **settings
) -> tuple[dict, dict, list[dict]]:
    """State before and after three steps, under the names of the trained model, and the log of the steps."""
    processor = tiny_processor(model.config.num_image_tokens)
    if pack:
        use_packed_attention(model.model.language_model)
    settings = {"max_steps": 3, "learning_rate": 0.02, "weight_decay": 0.1, "bf16": False, **settings}
    args = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=4, logging_steps=1, report_to="none", save_strategy="no",
        use_cpu=True, remove_unused_columns=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    trainer = HoneybeeTrainer(
        model=model, args=args, train_dataset=conversations(), processing_class=processor, peft_config=peft_config,
        data_collator=HoneybeeDataCollator(processor, pack=pack), **(trainer_settings or {}),
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    assert before.keys() == after.keys()
    return before, after, [row for row in trainer.state.log_history if "loss" in row]


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
    before, after, log = train(model, tmp_path, gradient_checkpointing=checkpointing)
    parts = {"align": ("model.projector.",), "instruct": ("model.projector.", "model.language_model.", "lm_head.")}[
        stage
    ]
    expected = {name for name, _ in model.named_parameters() if name.startswith(parts)}
    assert changed(before, after) == expected and len(log) == 3
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


def with_tower(model_type: str, projector_type: str = "c-abs", layer=-2):
    """A model with a tower of three small blocks of any type."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    tower = AutoConfig.for_model(model_type, **small, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    strategy = "full" if model_type == "siglip_vision_model" else "default"
    pooling = {"pooled_v_target": "none"} if isinstance(layer, list) else {}
    config = HoneybeeConfig(
        tower, llama_config(), projector_settings(projector_type, **pooling), vision_feature_layer=layer,
        vision_feature_select_strategy=strategy, image_token_id=tiny_processor().image_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return HoneybeeForConditionalGeneration(config)


@pytest.mark.parametrize("layer", [-1, -2, 0])
@pytest.mark.parametrize(
    "model_type", ["clip_vision_model", "siglip_vision_model", "dinov2", "vit", "beit", "data2vec-vision"]
)
def test_all_of_a_tower_is_what_its_features_depend_on(model_type, layer):
    model = with_tower(model_type, layer=layer)
    tower = {name: p for name, p in model.named_parameters() if name.startswith("model.vision_tower.")}
    features = model.model.get_patch_features(torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    gradients = torch.autograd.grad(features.sum(), list(tower.values()), allow_unused=True)
    reached = {name for name, gradient in zip(tower, gradients) if gradient is not None}
    assert tower_parameters(model, "all") == reached != set()
    depth = {-1: 3, -2: 2, 0: 0}[layer]
    for number in range(1, depth + 1):
        blocks = {
            name
            for name in reached
            if any(f"layer{s}.{i}." in name for i in range(depth - number, depth) for s in ("", "s"))
        }
        assert tower_parameters(model, number) == blocks != set()
    for number in (0, depth + 1):
        with pytest.raises(ValueError, match=f"train_vision_tower={number}: the projector reads {depth} blocks"):
            tower_parameters(model, number)


@pytest.mark.parametrize("trained", [None, 1, "all"])
@pytest.mark.parametrize("stage", ["align", "instruct"])
@pytest.mark.parametrize(
    "tower", [("clip_vision_model",), ("siglip_vision_model",), ("clip_vision_model", "d-abs", [1, -2])]
)
def test_of_the_tower_what_is_asked_for_changes(tower, stage, trained, tmp_path):
    model = with_tower(*tower)
    freeze_for_stage(model, stage, trained)
    seen = []
    blocks = model.model.get_submodule(model.model.vision_blocks_name)

    def see(module, args, output):
        output = output[0] if isinstance(output, tuple) else output  # transformers 4
        seen.append((args[0].requires_grad, output.requires_grad))

    blocks[1].register_forward_hook(see)
    before, after, log = train(model, tmp_path, gradient_checkpointing=True)
    names = [name for name in before if name.startswith("model.vision_tower.")]
    behind = ("post_layernorm", ".head.")  # the last block that is read
    expected = {
        None: set(),
        1: {name for name in names if ".layers.1." in name},
        "all": {name for name in names if not any(part in name for part in behind)},
    }[trained]
    trained_parts = {name for name in before if name.startswith(TRAINED[stage])}
    assert changed(before, after) == expected | trained_parts and len(log) == 3
    # In front of what is trained nothing is recorded.
    assert set(seen) == {(trained == "all", trained is not None)}


def test_a_block_of_a_half_precision_tower_is_trained_in_float32(tmp_path):
    model = with_tower("siglip_vision_model").to(torch.bfloat16)
    freeze_for_stage(model, "instruct", 1)
    keep_trained_in_float32(model)
    before, after, log = train(model, tmp_path, bf16=True, learning_rate=1e-5)  # a step that bfloat16 would lose
    block = {name for name in before if "vision_tower.encoder.layers.1." in name}
    assert {name for name in changed(before, after) if "vision_tower" in name} == block and len(log) == 3
    assert {before[name].dtype for name in block} == {torch.float32}
    assert before["model.vision_tower.encoder.layers.0.mlp.fc1.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_a_half_precision_tower_is_trained_from_its_start_on(tower, tmp_path):
    """Behind its blocks is a frozen norm, which reads what they make."""
    model = with_tower(tower).to(torch.bfloat16)
    freeze_for_stage(model, "align", "all")
    keep_trained_in_float32(model)
    before, after, _ = train(model, tmp_path, bf16=True, learning_rate=1e-5)
    assert changed(before, after) == tower_parameters(model, "all") | {n for n in before if "projector" in n}
    assert before["model.language_model.embed_tokens.weight"].dtype == torch.bfloat16


def test_a_batch_of_text_gives_a_trained_tower_a_gradient_of_zero():
    """Also in one process, whose optimizer would pass over a gradient that is not there. DDP and ZeRO have one."""
    model = with_tower("clip_vision_model").train()
    freeze_for_stage(model, "instruct", "all")
    batch = HoneybeeDataCollator(tiny_processor(), pack=True)([conversations()[index] for index in (2, 5)])
    assert "pixel_values" not in batch
    model(**batch, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
        if name in tower_parameters(model, "all"):
            assert not parameter.grad.any(), name


@pytest.mark.parametrize(("dtype", "bf16"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_in_the_tower_changes_its_adapters_too(checkpointing, dtype, bf16, tmp_path):
    model = with_tower("siglip_vision_model").to(dtype)
    freeze_for_stage(model, "align")
    modules = lora_modules("instruct", ["q_proj", "out_proj", "fc1"], model.model.vision_blocks_name)
    peft_config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **modules)
    before, after, _ = train(model, tmp_path, peft_config, gradient_checkpointing=checkpointing, bf16=bf16)
    adapters = {name for name in before if ".lora_" in name}
    assert changed(before, after) == adapters | {n for n in before if "projector.modules_to_save.default." in n}
    in_tower = {
        name.split(".lora_")[0].rpartition("vision_tower.encoder.layers.")[2]
        for name in adapters
        if ".vision_tower." in name
    }
    assert in_tower == {
        f"{block}.{layer}" for block in range(2) for layer in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
    }
    assert len([name for name in adapters if ".language_model." in name]) == 2 * 2


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
