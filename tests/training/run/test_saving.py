# SPDX-License-Identifier: Apache-2.0
"""A run can save what it trains, whatever its parts bring along, and nothing that comes after the saving harms it."""

import json
import re
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from trl import SFTTrainer

import training.run.launch
from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor, check_processor
from tests.hub_upload.fake_hub import FakeHub, HttpError
from tests.tiny import (
    NEW_PROJECTOR,
    REPOSITORY,
    SFT,
    SHORT_RUN,
    run_script,
    sample,
    save_joined,
    tiny_inputs,
    write_dataset,
)
from tests.training.test_sft_mixture import RUN_SFT, TWO, TWO_ON_CPU
from training import sft
from training.run.checkpoints import TRIAL

SHORT = ["--max_steps", 3, "--logging_steps", 1, *SHORT_RUN]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_joined(root)
    write_dataset(root, [sample(i, image=i % 4 < 3) for i in range(8)])
    return root


def arguments(world, model="model", **settings):
    settings = {"model_name_or_path": world / model, "dataset": world / "data.jsonl", **settings}
    return [part for name, value in settings.items() for part in (f"--{name}", value)] + SHORT


def check_whole(folder):
    """It loads, belongs together, and answers."""
    model, info = HoneybeeForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    check_processor(model.config, HoneybeeProcessor.from_pretrained(folder))
    assert (folder / "modeling_honeybee.py").is_file() and (folder / "trainer_state.json").is_file()
    assert not (folder / TRIAL).exists()
    return model.eval()


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}], ids=["without do_sample", "do_sample"])
def test_both_stages_on_an_llm_that_brings_sampling_settings(world, tmp_path, settings):
    text = shutil.copytree(world / "text", tmp_path / "text")
    (text / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": [2, 5], "temperature": 0.9, "top_p": 0.6, **settings})
    )
    data, new = ["--dataset", world / "data.jsonl"], ["--vision_model", world / "vision", "--text_model", text]
    log = run_script(
        SFT,
        "--stage",
        "align",
        *data,
        *new,
        "--projector",
        json.dumps(NEW_PROJECTOR),
        *SHORT,
        "--output_dir",
        tmp_path / "align",
    ).stdout
    assert "temperature=0.9, top_p=0.6" in log
    run_script(SFT, *data, "--model_name_or_path", tmp_path / "align", *SHORT, "--output_dir", tmp_path / "instruct")
    model = check_whole(tmp_path / "instruct")
    saved = json.loads((tmp_path / "instruct" / "generation_config.json").read_text())
    assert set(saved) == {"bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "transformers_version"}
    assert set(saved["eos_token_id"]) == {2, 5} and saved["suppress_tokens"] == [model.config.image_token_id]
    inputs = tiny_inputs(model)
    torch.manual_seed(0)
    answer = model.generate(**inputs, max_new_tokens=8)
    for token in answer[0, inputs["input_ids"].shape[1] :]:
        logits = model(**inputs).logits[0, -1]
        logits[model.config.image_token_id] = -torch.inf
        assert token == logits.argmax()
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token[None, None]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])


def test_stage_2_of_a_folder_with_settings_that_cannot_be_saved(world, tmp_path):
    folder = shutil.copytree(world / "model", tmp_path / "old")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.9, "repetition_penalty": 1.1}))
    run_script(SFT, *arguments(world, folder), "--output_dir", tmp_path / "out")
    model = check_whole(tmp_path / "out")
    assert model.generation_config.repetition_penalty == 1.1
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]
    assert "temperature" not in (tmp_path / "out" / "generation_config.json").read_text()


def half_a_character_in_the_tokenizer(folder):
    """JSON can hold it, and no file in UTF-8."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trained_on": "\ud800"}))
    return "the processor cannot be saved"


def generation_config_of_another_release(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cache_implementation": "of tomorrow"}))
    return "generation_config.json"


@pytest.mark.parametrize("spoil", [half_a_character_in_the_tokenizer, generation_config_of_another_release])
def test_what_cannot_be_saved_is_said_before_weights_are_read(world, tmp_path, spoil, monkeypatch):
    folder = shutil.copytree(world / "model", tmp_path / "model")
    words = spoil(folder)
    for more in ([], ["--dry_run"]):
        line = arguments(world, folder, output_dir=tmp_path / "new" / "out")
        monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, [*line, *more])])
        monkeypatch.setattr(SFTTrainer, "train", lambda *_, **__: pytest.fail("training started"))
        monkeypatch.setattr(training.run.launch, "load_model", lambda *_: pytest.fail("weights were read"))
        with pytest.raises(SystemExit) as exit:
            sft.main()
        assert words in str(exit.value) and "correct" in str(exit.value)
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_an_output_folder_that_takes_no_model(world, tmp_path, processes):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / TRIAL).touch()  # where the start wants a folder
    launcher, env = ([], {}) if processes == 1 else (TWO, TWO_ON_CPU)
    line = [*launcher, SFT, *arguments(world, output_dir=tmp_path / "out")]
    result = run_script(*line, check=False, env=env)
    assert result.returncode == 1
    # Counted in the text: what two processes say may end up in one line.
    said = re.findall("error: .*?give another folder", result.stdout)
    assert len(said) == processes, result.stdout[-2000:]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [TRIAL]


def test_a_start_that_was_killed_in_its_trial_may_be_repeated(world, tmp_path):
    (tmp_path / "out" / TRIAL).mkdir(parents=True)
    (tmp_path / "out" / TRIAL / "model.safetensors").touch()
    run_script(SFT, *arguments(world, output_dir=tmp_path / "out"))
    check_whole(tmp_path / "out")


def test_no_plot(world, tmp_path):
    (tmp_path / "shadow" / "matplotlib").mkdir(parents=True)
    (tmp_path / "shadow" / "matplotlib" / "__init__.py").write_text("raise RuntimeError('built for another numpy')")
    env = {"PYTHONPATH": f"{tmp_path / 'shadow'}:{REPOSITORY}"}
    result = run_script(SFT, *arguments(world, output_dir=tmp_path / "out"), env=env)
    assert "loss.png could not be written (RuntimeError: built for another numpy)" in result.stdout
    check_whole(tmp_path / "out")
    assert "finished after 3 steps" in (tmp_path / "out" / "run_summary.md").read_text()


def test_no_plot_and_no_page(world, tmp_path):
    result = run_script(RUN_SFT, "trouble", "folders", *arguments(world, output_dir=tmp_path / "out"))
    assert "loss.png could not" in result.stdout and "run_summary.md could not" in result.stdout
    check_whole(tmp_path / "out")


def test_a_tracker_that_cannot_close(world, tmp_path):
    result = run_script(RUN_SFT, "trouble", "tracker", *arguments(world, output_dir=tmp_path / "out"))
    assert "All steps are done" in result.stdout and "the tracker's server is gone" in result.stdout
    check_whole(tmp_path / "out")


def test_no_card_and_no_merge_of_an_adapter(world, tmp_path):
    base = shutil.copytree(world / "model", tmp_path / "base")
    lora = ["--use_peft", "--lora_r", 4, "--merge"]
    line = [*arguments(world, base, output_dir=tmp_path / "out"), *lora]
    result = run_script(RUN_SFT, "trouble", "base", *line, check=False)
    assert result.returncode == 1
    assert "not merged" in result.stdout and "the same command and --resume" in result.stdout
    (base / "model.away").rename(base / "model.safetensors")
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("lora_B" in name and tensor.any() for name, tensor in adapter.items())
    model = HoneybeeForConditionalGeneration.from_pretrained(base)
    inputs = tiny_inputs(model)
    expected = PeftModel.from_pretrained(model, tmp_path / "out").eval()(**inputs).logits
    run_script(SFT, *line, "--resume")
    merged = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "out" / "merged").eval()
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-4)

    # a folder in the place of the card
    line = [*arguments(world, base, output_dir=tmp_path / "again"), *lora]
    run_script(RUN_SFT, "trouble", "folders", *line)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in adapter.items())


class BrokenHub(FakeHub):
    def commit(self, *args):
        raise HttpError(500, "Internal Error")


@pytest.mark.parametrize("saving", [["--save_strategy", "no"], ["--save_strategy", "steps", "--save_steps", 2]])
def test_the_hub_breaks(world, tmp_path, saving):
    line = [*arguments(world, output_dir=tmp_path / "out"), "--push_to_hub", "--hub_model_id", "bee/mine", *saving]
    with BrokenHub() as hub:
        result = run_script(SFT, *line, check=False, env=hub.environment(tmp_path / "home"))
        assert any("/commit/" in path for _, path in hub.requests)
    assert result.returncode == 1
    (error,) = [row for row in result.stdout.splitlines() if row.startswith("error: ")]
    assert f"{tmp_path / 'out'} is saved, but not uploaded" in error
    assert f"python hub_upload/push.py --model {tmp_path / 'out'} --repo_id bee/mine --update" in error
    check_whole(tmp_path / "out")
    assert (tmp_path / "out" / "run_summary.md").is_file()


def test_the_hub_takes_it(world, tmp_path):
    line = [*arguments(world, output_dir=tmp_path / "out"), "--push_to_hub", "--hub_model_id", "bee/mine"]
    with FakeHub() as hub:
        run_script(SFT, *line, env=hub.environment(tmp_path / "home"))
        commits = [path for _, path in hub.requests if "/commit/" in path]
        files = hub.files("bee/mine")
    assert len(commits) == 1
    assert files["model.safetensors"].content == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_a_name_on_the_hub_that_is_not_ours(world, tmp_path):
    line = [*arguments(world, output_dir=tmp_path / "out"), "--push_to_hub", "--hub_model_id", "wasp/theirs"]
    with FakeHub() as hub:
        result = run_script(SFT, *line, check=False, env=hub.environment(tmp_path / "home"))
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert any(row.startswith("error: ") and "403" in row for row in result.stdout.splitlines())
    assert not (tmp_path / "out").exists()
