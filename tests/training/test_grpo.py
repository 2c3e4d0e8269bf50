# SPDX-License-Identifier: Apache-2.0
"""TRL's GRPOTrainer takes our model and processor as they are: its log-probabilities, its loss and its step, by hand."""

import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig, get_peft_model
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor
from tests.tiny import REPOSITORY, picture
from training.run.lora import freeze_for_lora, lora_modules
from training.stages import freeze_for_stage

PICTURES = [[0], [1, 2], [], [3]]  # of each row
GENERATIONS = 2
LEARNING_RATE = 0.5
FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}),
        "images": List(Image()),
        "number": Value("int64"),
    }
)


def row(number: int) -> dict:
    content = [{"type": "image"} for _ in PICTURES[number]] + [{"type": "text", "text": f"What is {number}?"}]
    images = [picture(seed, (40 + seed, 24)) for seed in PICTURES[number]]
    return {"prompt": [{"role": "user", "content": content}], "images": images, "number": number}


def prompt_inputs(processor, number: int) -> dict:
    """What generation starts from, by the processor alone."""
    text = processor.apply_chat_template(row(number)["prompt"], add_generation_prompt=True)
    return processor(text=text, images=row(number)["images"] or None, add_special_tokens=False, return_tensors="pt")


def log_probs(model, prompt: dict, completion: list[int]) -> torch.Tensor:
    """Of the completion's tokens, from the logits of one row without padding."""
    ids = torch.cat([prompt["input_ids"], torch.tensor([completion])], dim=1)
    images = {"pixel_values": prompt["pixel_values"]} if "pixel_values" in prompt else {}
    logits = model(input_ids=ids, **images).logits[0, -len(completion) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion)), completion]


def advantages(rewards: list[float]) -> torch.Tensor:
    rewards = torch.tensor(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def step_of_trl(model, lora, processor, batch_size: int, folder):
    """The trainer after a step, the state that it started from, (completion, reward) pairs of each row, and arguments and
    log-probabilities of the forwards that it learned from."""
    scored, forwards = defaultdict(list), []

    def reward(completions, completion_ids, number, **columns):
        given = [float(len(completion[0]["content"])) for completion in completions]
        for which, ids, points in zip(number, completion_ids, given):
            scored[which].append((ids, points))
        return given

    def keep(model, args, inputs, output):
        if inputs.get("fused_lm_head") and torch.is_grad_enabled():
            forwards.append((inputs, output.log_probs.detach()))

    args = GRPOConfig(
        str(folder), max_steps=1, per_device_train_batch_size=batch_size, num_generations=GENERATIONS,
        gradient_accumulation_steps=len(PICTURES) * GENERATIONS // batch_size, max_completion_length=6, beta=0.1,
        optim="sgd", learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=0, bf16=False,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    dataset = Dataset.from_list([row(number) for number in range(len(PICTURES))], features=FEATURES)
    trainer = GRPOTrainer(model, reward, args=args, train_dataset=dataset, processing_class=processor, peft_config=lora)
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.model.register_forward_hook(keep, with_kwargs=True)
    set_seed(0)
    trainer.train()
    assert [len(scored[number]) for number in range(len(PICTURES))] == [GENERATIONS] * len(PICTURES)
    return trainer, start, scored, forwards


def backward_by_hand(model, prompts: list[dict], scored: dict) -> tuple[float, dict]:
    """The loss, whose gradients `model` has then, and the log-probabilities of each (row, completion)."""
    by_hand, loss, surrogate = {}, 0, 0
    for number, group in scored.items():
        for (ids, _), advantage in zip(group, advantages([points for _, points in group])):
            by_hand[number, tuple(ids)] = log_probs(model, prompts[number], ids)
            loss -= advantage.item() * len(ids)
            surrogate = surrogate - advantage * by_hand[number, tuple(ids)].sum()
    learned = sum(len(ids) for group in scored.values() for ids, _ in group)
    (surrogate / learned).backward()
    return loss / learned, by_hand


def check_forward(processor, prompts: list[dict], by_hand: dict, inputs: dict, learned: torch.Tensor) -> None:
    """Each row has the log-probabilities by hand, and the pixels are those of the rows' pictures, in order."""
    expected_pixels = []
    for ids, mask, labels, got in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], learned):
        answered = labels != -100
        prompt = ids[mask.bool() & ~answered]
        number = int(re.search(r"What is (\d)", processor.decode(prompt)).group(1))
        assert torch.equal(prompt, prompts[number]["input_ids"][0])
        expected = by_hand[number, tuple(ids[answered].tolist())].detach()
        torch.testing.assert_close(got[answered[1:]], expected, atol=1e-5, rtol=1e-5)
        expected_pixels += list(prompts[number].get("pixel_values", ()))
    assert len(inputs["pixel_values"]) == len(expected_pixels)
    assert all(torch.equal(*pair) for pair in zip(inputs["pixel_values"], expected_pixels))


# Rows one at a time, where one without a picture is a batch without pixels, and four at a time.
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_a_step_is_the_step_by_hand(adapted, batch_size, saved, tmp_path):
    def load():
        model = HoneybeeForConditionalGeneration.from_pretrained(saved)
        freeze_for_lora(model) if adapted else freeze_for_stage(model, "instruct")
        return model

    lora = LoraConfig(r=4, **lora_modules("instruct")) if adapted else None
    processor = HoneybeeProcessor.from_pretrained(saved)
    trainer, start, scored, forwards = step_of_trl(load(), lora, processor, batch_size, tmp_path / "grpo")

    model = get_peft_model(load(), lora) if adapted else load()
    model.load_state_dict(start)
    prompts = [prompt_inputs(processor, number) for number in range(len(PICTURES))]
    loss, by_hand = backward_by_hand(model, prompts, scored)
    for inputs, learned in forwards:
        check_forward(processor, prompts, by_hand, inputs, learned)
    assert sum(len(inputs["input_ids"]) for inputs, _ in forwards) == GENERATIONS * len(PICTURES)

    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss, abs=1e-4)
    assert log["kl"] == pytest.approx(0, abs=1e-5)  # the model that it starts from is the reference
    moved = set()
    after = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        step = torch.zeros_like(parameter) if parameter.grad is None else LEARNING_RATE * parameter.grad
        torch.testing.assert_close(after[name].detach(), start[name] - step, atol=2e-5, rtol=1e-3)
        if not torch.equal(after[name], start[name]):
            moved.add(name)
    assert any("projector" in name for name in moved) and any("language_model" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)


def test_the_documented_example_runs(saved, tmp_path, monkeypatch):
    """As it stands in docs/training.md, with fewer questions and the tiny model in the place of the quickstart's."""
    page = (REPOSITORY / "docs" / "training.md").read_text()
    block = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "GRPOTrainer" in block)
    for written, fewer in ((", 800)", ", 16)"), (", 400)", ", 4)")):
        assert written in block
        block = block.replace(written, fewer)
    (tmp_path / "outputs" / "quickstart").mkdir(parents=True)
    saved.rename(tmp_path / "outputs" / "quickstart" / "model_align")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "docs/training.md", "exec"), names)
    assert names["trainer"].state.global_step == 2
    assert names["correct"]([[{"content": " a1"}], [{"content": "a2"}]], ["a1", "a1"]) == [1.0, 0.0]
    assert Path("outputs", "quickstart", "grpo", "modeling_honeybee.py").is_file()
