# SPDX-License-Identifier: Apache-2.0
"""Packed rows train as the same samples one by one, in every way that attention can be computed."""

import pytest
import torch
from transformers import AttentionInterface, AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl import SFTConfig, SFTTrainer

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration
from tests.tiny import (
    clip_config,
    losses_and_gradients,
    picture,
    projector_settings,
    save_clip,
    save_qwen2,
    tiny_model,
    tiny_processor,
)
from training.collator import HoneybeeDataCollator
from training.stages import freeze_for_stage
from training.trainer import packed_attention
from training.trainer.packed_attention import use_packed_attention


def sample(seed, images, words):
    """`images` images, a question and an answer of another length for each seed."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": "What is in the picture " * words}]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "a brown dog " * (1 + seed)},
            {"role": "user", "content": "a ?"},
            {"role": "assistant", "content": "What"},
        ],
        "images": [picture(10 * seed + image) for image in range(images)],
    }


# With an image, without, with two, and without again, so that neighbours of either kind meet.
SAMPLES = [sample(0, 1, 2), sample(1, 0, 5), sample(2, 2, 1), sample(3, 0, 3), sample(4, 1, 1)]


def probe_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
    """What a kernel with variable lengths computes from what the collator tells it."""
    assert attention_mask is None and kwargs["max_length_q"] == cu_seq_lens_q.diff().max()
    parts = [states.split(cu_seq_lens_q.diff().tolist(), dim=2) for states in (query, key, value)]
    outputs = [sdpa_attention_forward(module, *states, None, scaling=kwargs["scaling"])[0] for states in zip(*parts)]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register("cu_seq_lens", probe_attention)


def grouped_query_model(tmp_path, processor):
    model = HoneybeeForConditionalGeneration.from_vision_text_pretrained(
        save_clip(tmp_path / "clip"), save_qwen2(tmp_path / "qwen2"), projector_type="d-abs", num_query_tokens=4,
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, dropout=0.0, image_token_id=processor.image_token_id,
    )  # fmt: skip
    assert model.config.text_config.num_key_value_heads < model.config.text_config.num_attention_heads
    return model


@pytest.mark.parametrize("stage", ["align", "instruct"])
@pytest.mark.parametrize("kind", ["llama, c-abs", "qwen2, d-abs"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "sdpa_packed", "cu_seq_lens"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_equal_their_samples(stage, kind, attention, checkpointing, tmp_path):
    processor = tiny_processor(4)
    if kind.startswith("llama"):
        model = tiny_model("c-abs", seed=1, config={"image_token_id": processor.image_token_id})
    else:
        model = grouped_query_model(tmp_path, processor)
    freeze_for_stage(model, stage)
    model.train()
    expected, gradients = losses_and_gradients(model, [HoneybeeDataCollator(processor)([s]) for s in SAMPLES])

    language_model = model.model.language_model
    language_model.set_attn_implementation("eager" if attention == "eager" else "sdpa")
    if attention == "sdpa_packed":
        assert use_packed_attention(language_model)
    elif attention == "cu_seq_lens":
        language_model.set_attn_implementation("cu_seq_lens")
    if checkpointing:
        model.gradient_checkpointing_enable()
    packed = HoneybeeDataCollator(processor, pack=True)(SAMPLES)
    assert packed["input_ids"].shape[0] == 1 and "attention_mask" not in packed
    assert len(packed["pixel_values"]) == 4
    loss, packed_gradients = losses_and_gradients(model, [packed])

    assert abs(loss - expected) <= 1e-5
    assert packed_gradients.keys() == gradients.keys() and len(gradients) > 3
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert largest > 0.01  # there is something to be wrong
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)

    # Without the borders it would not be so.
    del packed["position_ids"]
    if attention == "cu_seq_lens":
        packed["cu_seq_lens_q"] = torch.tensor([0, packed["input_ids"].shape[1]])
        packed["max_length_q"] = packed["input_ids"].shape[1]
    assert abs(losses_and_gradients(model, [packed])[0] - expected) > 1e-3


def test_images_of_a_packed_batch_are_encoded_in_one_call():
    processor = tiny_processor(4)
    model = tiny_model(config={"image_token_id": processor.image_token_id}).train()
    calls = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    model(**HoneybeeDataCollator(processor, pack=True)(SAMPLES))
    assert calls == [4]


def test_a_packed_row_keeps_its_borders_in_evaluation_too():
    """There a cache is made unless told not to, and transformers packs only where there is none."""
    processor = tiny_processor(4)
    model = tiny_model(config={"image_token_id": processor.image_token_id})
    packed = HoneybeeDataCollator(processor, pack=True)(SAMPLES)
    packed.pop("labels")
    with torch.no_grad():
        logits = model(**packed).logits[0].split(packed["cu_seq_lens_q"].diff().tolist())
        for one, sample_logits in zip(SAMPLES, logits):
            single = HoneybeeDataCollator(processor)([one])
            single.pop("labels")
            torch.testing.assert_close(sample_logits, model(**single).logits[0], rtol=1e-4, atol=1e-5)


def test_the_packed_row():
    processor = tiny_processor(4)
    rows = [HoneybeeDataCollator(processor)([one]) for one in SAMPLES]
    lengths = [row["input_ids"].shape[1] for row in rows]
    packed = HoneybeeDataCollator(processor, pack=True)(SAMPLES)
    assert packed["position_ids"][0].tolist() == [position for length in lengths for position in range(length)]
    assert packed["cu_seq_lens_q"].tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert packed["cu_seq_lens_q"].dtype == torch.int32  # what flash attention takes
    for name in ("input_ids", "labels"):
        assert torch.equal(packed[name], torch.cat([row[name] for row in rows], dim=1))


def test_models_with_windows_or_other_attention_are_left_alone():
    model = tiny_model().model.language_model
    model.set_attn_implementation("eager")
    assert not use_packed_attention(model) and model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    model.config.sliding_window = 16
    assert not use_packed_attention(model) and model.config._attn_implementation == "sdpa"


def test_packed_attention_changes_nothing_else(tmp_path):
    """Padded batches, generation with a cache, and what a saved model says."""
    processor = tiny_processor(4)
    model = tiny_model(config={"image_token_id": processor.image_token_id})
    batch = HoneybeeDataCollator(processor)(SAMPLES)
    batch.pop("labels")
    mask = batch["attention_mask"].bool()
    prompt = HoneybeeDataCollator(processor)(SAMPLES[:1])
    prompt.pop("labels")

    def results():
        with torch.no_grad():
            logits = model(**batch).logits
        return logits[mask], model.generate(**prompt, max_new_tokens=6, do_sample=False)

    logits, tokens = results()
    assert use_packed_attention(model.model.language_model)
    packed_logits, packed_tokens = results()
    assert torch.equal(logits, packed_logits) and torch.equal(tokens, packed_tokens)
    model.save_pretrained(tmp_path)
    assert packed_attention.NAME not in (tmp_path / "config.json").read_text()
    assert (
        HoneybeeForConditionalGeneration.from_pretrained(tmp_path).model.language_model.config._attn_implementation
        == "sdpa"
    )


def test_the_trainer_learns_the_same_from_packed_and_padded_batches(tmp_path):
    """Through TRL's own loss, with accumulated batches: same losses, same weights."""
    processor = tiny_processor(4)
    logs, weights = [], []
    for pack in (False, True):
        model = tiny_model(config={"image_token_id": processor.image_token_id})
        freeze_for_stage(model, "instruct")
        if pack:
            assert use_packed_attention(model.model.language_model)
        args = SFTConfig(
            output_dir=str(tmp_path / str(pack)), max_steps=3, per_device_train_batch_size=3, max_length=None,
            gradient_accumulation_steps=2, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", bf16=False, logging_steps=1,
            report_to="none", save_strategy="no", use_cpu=True, remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=False, seed=3,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=as_dataset(SAMPLES * 4), processing_class=processor,
            data_collator=HoneybeeDataCollator(processor, pack=pack),
        )  # fmt: skip
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "loss" in row])
        weights.append(model.state_dict())
    assert [row["loss"] for row in logs[0]] == pytest.approx([row["loss"] for row in logs[1]], abs=1e-4)
    assert [row["num_tokens"] for row in logs[0]] == [row["num_tokens"] for row in logs[1]]
    start = tiny_model(config={"image_token_id": processor.image_token_id}).state_dict()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert any(not torch.equal(start[name], weight) for name, weight in weights[0].items())


def as_dataset(samples):
    from datasets import Dataset

    rows = Dataset.from_dict({"index": list(range(len(samples)))})
    rows.set_transform(
        lambda batch: {name: [samples[index][name] for index in batch["index"]] for name in ("messages", "images")}
    )
    return rows


@pytest.mark.parametrize("model_type", packed_attention.PACKABLE)
def test_families_that_may_be_packed(model_type):
    """The LLM inside our model, as training calls it: two conversations in a row as each by itself."""
    text = AutoConfig.for_model(
        model_type, vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    for name in ("attention_dropout", "hidden_dropout", "residual_dropout", "embedding_dropout", "resid_pdrop"):
        if hasattr(text, name):
            setattr(text, name, 0.0)
    torch.manual_seed(0)
    config = HoneybeeConfig(clip_config(), text, projector_settings("c-abs"), image_token_id=63)
    model = HoneybeeForConditionalGeneration(config).train()
    use_packed_attention(model.model.language_model)
    rows = [torch.randint(1, 60, (1, length)) for length in (9, 5, 13)]
    alone = [model(input_ids=row, labels=row, logits_to_keep=0, use_cache=False).logits for row in rows]
    ends = torch.tensor([0, 9, 14, 27], dtype=torch.int32)
    packed = model(
        input_ids=torch.cat(rows, dim=1), labels=torch.cat(rows, dim=1), logits_to_keep=0, use_cache=False,
        position_ids=torch.cat([torch.arange(row.shape[1]) for row in rows])[None],
        cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=13, max_length_k=13,
    ).logits  # fmt: skip
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-4)
