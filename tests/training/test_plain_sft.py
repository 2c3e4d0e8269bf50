# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer and `trl sft` with nothing of ours but the saved folder: their loss is that of our collator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from datasets import Dataset
from packaging.version import Version
from trl import SFTConfig, SFTTrainer

from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor
from tests.tiny import byte_tokenizer, picture, tiny_model, tiny_processor
from training.collator import HoneybeeDataCollator

PICTURES = [1, 2, 0, 1]  # of each row


def save_model(tokenizer=None) -> None:
    processor = tiny_processor(4, tokenizer)
    tiny_model(config={"image_token_id": processor.image_token_id}).save_pretrained("model")
    processor.save_pretrained("model")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder, with pictures."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for number in range(2 * len(PICTURES)):
        picture(number, (40 + number, 24)).save(f"images/{number}.png")


def row(number: int) -> dict:
    """Its pictures as paths, from the working folder on."""
    content = [{"type": "image"}] * PICTURES[number] + [{"type": "text", "text": f"What is {number}?"}]
    return {
        "prompt": [{"role": "user", "content": content}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": "a brown dog " * (number + 1)}]}],
        "images": [f"images/{2 * number + which}.png" for which in range(PICTURES[number])],
    }


def as_messages(row: dict) -> dict:
    return {"messages": row["prompt"] + row["completion"], "images": row["images"]}


def loss_of_ours() -> float:
    model = HoneybeeForConditionalGeneration.from_pretrained("model")
    collator = HoneybeeDataCollator(HoneybeeProcessor.from_pretrained("model"))
    return model.train()(**collator([as_messages(row(number)) for number in range(len(PICTURES))])).loss.item()


SETTINGS = {
    "max_steps": 1, "per_device_train_batch_size": len(PICTURES), "logging_steps": 1, "save_steps": 1, "bf16": False,
    "use_cpu": True, "report_to": "none", "dataloader_pin_memory": False,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["prompt and completion", "messages"])
def test_an_sft_trainer_without_our_collator_has_our_loss(kind):
    messages = kind == "messages"
    if messages and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("TRL takes assistant_only_loss with pictures on transformers 5.18 and later")
    # `assistant_only_loss` goes by characters, which do not show a "▁" that stands alone in front of an answer.
    save_model(byte_tokenizer() if messages else None)
    rows = [as_messages(row(number)) if messages else row(number) for number in range(len(PICTURES))]
    trainer = SFTTrainer(
        "model",
        args=SFTConfig("out", **SETTINGS, trust_remote_code=True, assistant_only_loss=messages),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss_of_ours(), abs=1e-4)


def test_trl_sft_with_the_code_of_the_folder_has_our_loss():
    save_model()
    Path("data").mkdir()
    lines = [json.dumps(row(number)) + "\n" for number in range(len(PICTURES))]
    Path("data", "train.jsonl").write_text("".join(lines))
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    command = [Path(sys.executable).parent / "trl", "sft", "--trust_remote_code", "--model_name_or_path", "model",
               "--dataset_name", "data", "--output_dir", "out", *flags]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": "cache", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    state = json.loads(Path("out", "checkpoint-1", "trainer_state.json").read_text())
    assert state["log_history"][0]["loss"] == pytest.approx(loss_of_ours(), abs=1e-4)
    assert Path("out", "modeling_honeybee.py").is_file()  # what it saves carries its code as well
    HoneybeeForConditionalGeneration.from_pretrained("out")
    HoneybeeProcessor.from_pretrained("out")
