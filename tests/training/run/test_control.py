# SPDX-License-Identifier: Apache-2.0
"""What one sees of a run and how it is stopped: log, plot, summary, signals, resuming, LoRA's outputs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from trl import SFTTrainer

from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor, check_processor
from tests.tiny import REPOSITORY, SFT, SHORT_RUN, run_script, sample, save_joined, tiny_inputs, write_dataset
from tests.training.test_sft_mixture import RUN_SFT, TWO, TWO_ON_CPU, write_mixture
from training import sft
from training.run.checkpoints import is_whole
from training.trainer.trainer import count_batch

SHORT = ["--max_steps", 8, "--logging_steps", 2, *SHORT_RUN]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_joined(root)
    write_dataset(root / "data", [sample(i, image=i % 4 < 3) for i in range(16)])
    write_mixture(root / "mixture")
    dataset = ["--dataset", root / "data" / "data.jsonl", "--model_name_or_path", root / "model", *SHORT]
    run_script(SFT, *dataset, "--output_dir", root / "whole")
    return root, dataset


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_is_counted_padded_and_packed():
    ids = torch.tensor([[1, 9, 9, 5, 6], [1, 5, 0, 0, 0]])
    padded = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    assert count_batch(padded, image_token_id=9).tolist() == [2, 7, 10, 2]
    packed = {"input_ids": ids[ids != 0][None], "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1]])}
    assert count_batch(packed, image_token_id=9).tolist() == [2, 7, 7, 2]


def test_the_log_has_the_throughput_and_the_end_a_plot_and_a_page(world):
    root, _ = world
    history = json.loads((root / "whole" / "trainer_state.json").read_text())["log_history"]
    rows = [row for row in history if "loss" in row]
    assert len(rows) == 4
    for row in rows:
        assert row["samples_per_second"] > 0 and row["tokens_per_second"] > row["samples_per_second"]
        assert 0 <= row["padding_share"] < 0.5
    # 16 samples in 8 steps, 12 images of 4 visual tokens
    assert sum(2 * row["visual_tokens_per_step"] for row in rows) == 12 * 4
    page = (root / "whole" / "run_summary.md").read_text()
    assert page.startswith("# Stage instruct: finished after 8 steps")
    for words in ("16 samples", "8,064 parameters, trained", "tokens per second", "learning_rate | 0.01", "torch 2."):
        assert words in page, words
    with Image.open(root / "whole" / "loss.png") as plot:
        assert plot.size[0] > 500


def with_mixture(root, steps=30):
    recipe = root / "mixture" / "recipe.yaml"
    return ["--model_name_or_path", root / "model", "--mixture", recipe, *SHORT, "--max_steps", steps]


def test_a_signal_saves_and_the_run_goes_on_from_there(world, tmp_path):
    arguments = with_mixture(world[0])
    run_script(SFT, *arguments, "--output_dir", tmp_path / "whole")
    result = run_script(RUN_SFT, "stop", 5, *arguments, "--output_dir", tmp_path / "out")
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert (
        f"saved {checkpoint}" in result.stdout and "Go on from there: the same command with --resume" in result.stdout
    )
    assert "Traceback" not in result.stdout
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert "stopped after" in (tmp_path / "out" / "run_summary.md").read_text()
    run_script(SFT, *arguments, "--output_dir", tmp_path / "out", "--resume")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))
    page = (tmp_path / "out" / "run_summary.md").read_text()
    assert "finished after 30 steps" in page and "| coyo |" in page and "Skipped by the first process" in page
    assert not (tmp_path / "out" / "README.md").exists(), "TRL's card, of a text model"


def refused(arguments, monkeypatch) -> str:
    """The error with which `sft.py` ends before it trains."""
    monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, arguments)])
    monkeypatch.setattr(SFTTrainer, "train", lambda *_, **__: pytest.fail("training started"))
    with pytest.raises(SystemExit) as exit:
        sft.main()
    return str(exit.value)


def test_what_cannot_be_resumed_is_refused(world, tmp_path, monkeypatch):
    arguments = [*with_mixture(world[0], steps=4), "--output_dir", tmp_path / "out", "--save_strategy", "steps"]
    arguments += ["--save_steps", 2]
    run_script(SFT, *arguments)
    trained = weights(tmp_path / "out")
    finished = refused([*arguments, "--resume"], monkeypatch)
    assert "max_steps=4" in finished and "raise --max_steps" in finished
    other = ["--max_steps", 6, "--learning_rate", 5e-3, "--resume"]
    assert "learning_rate was 0.01 and is 0.005" in refused([*arguments, *other], monkeypatch)
    assert same(trained, weights(tmp_path / "out"))
    # Killed between the last checkpoint and the end: while the model was written.
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    (tmp_path / "out" / "trainer_state.json").unlink()
    run_script(SFT, *arguments, "--resume")
    assert same(trained, weights(tmp_path / "out")) and not (tmp_path / "out" / "optimizer.pt").exists()
    assert (tmp_path / "out" / "trainer_state.json").exists()


def test_grouped_batches_of_two_processes_go_on_in_a_later_epoch(world, tmp_path):
    arguments = [*world[1], "--batching", "grouped", "--max_steps", 9, "--save_strategy", "steps", "--save_steps", 2]
    run_script(*TWO, SFT, *arguments, "--output_dir", tmp_path / "whole", env=TWO_ON_CPU)
    run_script(RUN_SFT, "kill", 2, 7, *arguments, "--output_dir", tmp_path / "killed", env={"OMP_NUM_THREADS": "1"})
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_a_signal_to_the_whole_group_with_workers_saves(world, tmp_path):
    arguments = [*with_mixture(world[0], steps=3000), "--output_dir", tmp_path / "out", "--dataloader_num_workers", 2]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(SFT), *map(str, arguments)],
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while "'loss'" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        with suppress(ProcessLookupError):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):  # the later ones while it saves or ends
                os.killpg(process.pid, number)
                time.sleep(0.3)
        assert process.wait(120) == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert is_whole(str(checkpoint)) and f"saved {checkpoint}" in log.read_text()


def test_a_start_that_failed_may_be_repeated(world, tmp_path):
    arguments = [*world[1], "--output_dir", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "honeybee_run.json").write_text("{}")  # all that is left of it
    run_script(SFT, *arguments)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_signal_to_one_process_stops_both_at_the_same_step(world, tmp_path):
    arguments = [*with_mixture(world[0]), "--output_dir", tmp_path / "out"]
    result = run_script(*TWO, RUN_SFT, "stop", 5, *arguments, env=TWO_ON_CPU)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2 and is_whole(str(checkpoint))
    assert f"saved {checkpoint}" in result.stdout and "Traceback" not in result.stdout


def test_lora_is_killed_resumed_and_merged(world, tmp_path, monkeypatch):
    root, arguments = world
    arguments = [*arguments, "--use_peft", "--lora_r", 4, "--merge", "--save_strategy", "steps", "--save_steps", 2]
    run_script(SFT, *arguments, "--output_dir", tmp_path / "whole")
    run_script(RUN_SFT, "kill", 1, 5, *arguments, "--output_dir", tmp_path / "killed")
    whole, killed = (weights(tmp_path / name, "adapter_model.safetensors") for name in ("whole", "killed"))
    assert same(whole, killed) and any("lora_B" in name and tensor.any() for name, tensor in whole.items())
    merged = weights(tmp_path / "whole" / "merged")
    shutil.rmtree(tmp_path / "whole" / "merged")
    run_script(SFT, *arguments, "--resume", "--output_dir", tmp_path / "whole")
    assert same(merged, weights(tmp_path / "whole" / "merged"))
    other = ["--lora_r", 8, "--max_steps", 30, "--resume", "--output_dir", tmp_path / "whole"]
    assert "lora_r was 4 and is 8" in refused([*arguments, *other], monkeypatch)

    base = HoneybeeForConditionalGeneration.from_pretrained(root / "model")
    inputs = tiny_inputs(base)
    before = base(**inputs).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "whole").eval()(**inputs).logits
    assert (adapted - before).abs().max() > 1e-3
    merged = tmp_path / "whole" / "merged"
    model = HoneybeeForConditionalGeneration.from_pretrained(merged).eval()
    torch.testing.assert_close(model(**inputs).logits, adapted, atol=1e-5, rtol=1e-4)
    check_processor(model.config, HoneybeeProcessor.from_pretrained(merged))
    # and it is a model to go on from, which the adapter is not
    text = run_script(
        SFT, *world[1], "--model_name_or_path", merged, "--output_dir", tmp_path / "on", "--dry_run"
    ).stdout
    assert "nothing was written" in text and not (tmp_path / "on").exists()


def test_qlora_quantizes_the_language_model_alone(world, tmp_path):
    pytest.importorskip("bitsandbytes")
    root, arguments = world
    config = ["--config", REPOSITORY / "training" / "configs" / "lora.yaml", "--load_in_4bit", "--lora_r", 4]
    small = ["--warmup_steps", 1, "--global_batch_size", 2, "--save_total_limit", 1]
    run_script(SFT, *config, *arguments, *small, "--output_dir", tmp_path / "out")
    adapter = weights(tmp_path / "out", "adapter_model.safetensors")
    before, merged = weights(root / "model"), weights(tmp_path / "out" / "merged")
    assert merged.keys() == before.keys()
    moved = {name for name in merged if not torch.equal(merged[name], before[name].to(merged[name].dtype))}
    assert moved == {name for name in merged if ".projector." in name or "q_proj" in name and "language" in name
                     or "v_proj" in name and "language" in name}  # fmt: skip
    assert {name.split(".projector.")[1] for name in adapter if ".projector." in name} == {
        name.split(".projector.")[1] for name in before if ".projector." in name
    }


def test_what_is_trained_is_float32_under_mixed_precision(world, tmp_path):
    root, arguments = world
    arguments = [*arguments, "--stage", "align", "--dtype", "bfloat16", "--bf16", "True", "--learning_rate", 1e-5]
    run_script(SFT, *arguments, "--output_dir", tmp_path / "out")
    before, after = weights(root / "model"), weights(tmp_path / "out")
    for name, tensor in after.items():
        if ".projector." in name:
            assert tensor.dtype == torch.float32
            # steps this small are lost in bfloat16
            assert not torch.equal(tensor, before[name]) or not tensor.any(), name
        else:
            assert tensor.dtype == torch.bfloat16
    model = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
