# SPDX-License-Identifier: Apache-2.0
"""The quickstart's parts; the whole of it is run by .ci/run, which holds it to its accuracies."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from datasets import load_from_disk
from transformers import LlamaForCausalLM

from tests.tiny import REPOSITORY, run_script
from training.conversations import check_dataset
from training.quickstart import digit_scenes
from training.quickstart.digit_scenes import CELL_NAMES, DIGIT_WORDS, QUESTION_WEIGHTS, SPLITS, SceneMaker, caption
from training.quickstart.run import Questions, make_dataset
from training.quickstart.stand_ins import SymbolicScenes, make_language_model, make_stand_ins, make_tokenizer

RUN_QUICKSTART = REPOSITORY / "tests" / "training" / "quickstart" / "run_quickstart.py"
CONTENTS = [None] * 16
CONTENTS[1], CONTENTS[6], CONTENTS[8], CONTENTS[15] = 5, 2, 5, 0  # b1, c2, a3, d4


def test_splits_share_no_digit():
    spans = [range(*piece.indices(1797)) for piece in SPLITS.values()]
    assert sum(map(len, spans)) == 1797 == len(set().union(*spans))


def test_answers_are_true():
    maker = SceneMaker("train", 0)
    assert caption(CONTENTS) == "five at b1 , two at c2 , five at a3 , zero at d4"
    for _ in range(300):
        kind, question, answer = maker.question(CONTENTS)
        words = question.split()
        if kind == "what":
            digit = CONTENTS[CELL_NAMES.index(words[3])]
            assert answer == ("nothing" if digit is None else DIGIT_WORDS[digit])
        elif kind == "where":
            assert (words[3], answer) in {("two", "c2"), ("zero", "d4")}, "only digits that occur once can be asked for"
        elif kind == "count":
            assert answer == "four"
        elif kind == "exist":
            assert answer == ("yes" if words[3] in {"zero", "two", "five"} else "no")
        else:
            assert set(words) >= {"two", "zero"} and answer == "two"


def test_every_kind_is_asked_as_often_as_it_weighs():
    maker = SceneMaker("train", 1)
    kinds = [maker.question(maker.contents())[0] for _ in range(4000)]
    for kind, weight in QUESTION_WEIGHTS.items():
        assert abs(kinds.count(kind) / 4000 - weight) < 0.05, kind


def test_scenes_show_what_they_say():
    scene = SceneMaker("test", 0).scene()
    assert scene.image.size == (64, 64)
    pixels = torch.tensor(list(scene.image.convert("L").tobytes())).view(4, 16, 4, 16).amax((1, 3)).flatten()
    assert [digit is not None for digit in scene.contents] == (pixels > 0).tolist()
    assert Questions(SceneMaker("test", 0), 5).answers == Questions(SceneMaker("test", 0), 5).answers


@pytest.mark.parametrize("blind", [False, True])
def test_datasets_are_fit_to_train_on(blind, tmp_path, monkeypatch):
    monkeypatch.setattr("training.quickstart.run.ALIGN_STEPS", 1)
    make_dataset(str(tmp_path / "data"), "align", 0, blind)
    dataset = load_from_disk(tmp_path / "data")
    check_dataset(dataset, needs_images=True)
    assert set(dataset["chat_template"]) == {"caption"}
    lit = any(max(image.getextrema())[1] > 0 for images in dataset["images"][:4] for image in images)
    assert lit is not blind


def test_every_word_has_a_token():
    tokenizer, maker = make_tokenizer(), SceneMaker("train", 2)
    for _ in range(50):
        contents = maker.contents()
        _, question, answer = maker.question(contents)
        ids = tokenizer(f"{question} {answer} {caption(contents)}")["input_ids"]
        assert tokenizer.unk_token_id not in ids


def test_symbolic_scenes_put_names_where_the_image_goes(tmp_path):
    make_language_model(str(tmp_path), seed=0, steps=1, batch_size=2)
    embeddings = LlamaForCausalLM.from_pretrained(tmp_path).get_input_embeddings()
    scenes = SymbolicScenes(make_tokenizer(), seed=0)
    drawn = []
    scenes.maker.contents = lambda: drawn.append(SceneMaker("train", len(drawn)).contents()) or drawn[-1]
    embeds, mask, labels = scenes.batch(3, embeddings)
    assert embeds.shape[:2] == mask.shape == labels.shape
    for row, contents in enumerate(drawn):
        first = embeddings(scenes.cell_ids[0]) + embeddings(
            scenes.digit_ids[10 if contents[0] is None else contents[0]]
        )
        assert (embeds[row] == first).all(-1).any()
    assert (labels != -100).any(-1).all()


def test_stand_ins_are_made_once(tmp_path, monkeypatch):
    for name in ("vision", "text"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.setattr("training.quickstart.stand_ins.make_vision_tower", None)
    monkeypatch.setattr("training.quickstart.stand_ins.make_language_model", None)
    assert make_stand_ins(str(tmp_path), 0) == (str(tmp_path / "vision"), str(tmp_path / "text"))
    assert digit_scenes.GRID == 4


def test_the_whole_of_it_in_a_few_steps_and_again(tmp_path):
    result = run_script(RUN_QUICKSTART, tmp_path, 2)
    assert "Accuracy on 40 questions" in result.stdout and "blind.log" in result.stdout
    table = json.loads((tmp_path / "results.json").read_text())
    assert list(table) == ["model", "after alignment only", "blind control"]
    assert "Finished after 2 steps" in (tmp_path / "blind.log").read_text()
    again = run_script(RUN_QUICKSTART, tmp_path, 2)
    assert "Finished after" not in again.stdout and "second process" not in again.stdout
    assert json.loads((tmp_path / "results.json").read_text()) == table


def test_stopped_it_goes_on_with_both_models(tmp_path):
    command = [sys.executable, str(RUN_QUICKSTART), str(tmp_path), "2000"]
    quickstart = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # Both processes are in their loops once both have logged a loss.
    log, seen = tmp_path / "blind.log", ""
    for line in quickstart.stdout:
        seen += line
        if "'loss'" in seen and log.exists() and "'loss'" in log.read_text():
            break
    quickstart.send_signal(signal.SIGTERM)
    seen += quickstart.stdout.read()
    assert quickstart.wait(120) == 0, seen
    assert "Stopped by SIGTERM after step" in seen and "the same command again" in seen
    assert "Stopped by SIGTERM after step" in log.read_text()
    for name in ("model", "blind"):
        assert list((tmp_path / f"{name}_align").glob("checkpoint-*"))


def test_a_control_that_fails_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "blind_align").write_text("in the way")
    result = run_script(RUN_QUICKSTART, tmp_path, 2, check=False)
    assert result.returncode == 1 and "The blind control is not finished" in result.stdout
    assert "blind_align" in (tmp_path / "blind.log").read_text()
    assert (tmp_path / "model" / "model.safetensors").exists()
