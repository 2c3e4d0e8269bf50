# SPDX-License-Identifier: Apache-2.0
"""The experiment with crops: its scenes and parts, and one way from samples to the report."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from lab.crops.report import write_report
from lab.crops.scenes import DIGIT_PIXELS, LARGE_DIGIT_PIXELS, NAMES, SIDE, LargeScenes, squeezed
from lab.crops.stand_ins import (
    NOTHING,
    SymbolicScenes,
    check_parts,
    make_reader,
    make_tower,
    parts_path,
    tower_squares,
)
from lab.crops.ways import STAGES, WAYS, measure, record_path, samples_folder, train_and_ask, write_samples
from processing import HoneybeeProcessor, processor_from_vision_text_pretrained
from tests.tiny import REPOSITORY
from training.quickstart.stand_ins import make_tokenizer

CONTENTS = [None, 3, *[None] * 9, 7]  # b1 and f2 of a wide scene


def filled(picture) -> np.ndarray:
    """Whether a square as large as a digit is much brighter than noise, by cell."""
    pixels = np.asarray(picture).reshape(picture.height // SIDE, SIDE, picture.width // SIDE, SIDE).swapaxes(1, 2)
    means = np.lib.stride_tricks.sliding_window_view(pixels, (DIGIT_PIXELS, DIGIT_PIXELS), axis=(2, 3)).mean(
        axis=(4, 5)
    )
    return (means.max(axis=(2, 3)) > 23).ravel()


def test_scenes_are_large_and_their_digits_stand_in_their_cells():
    maker = LargeScenes("validation", 0)
    shapes = set()
    for _ in range(20):
        scene = maker.scene()
        shapes.add(scene.image.size)
        assert filled(scene.image).tolist() == [digit is not None for digit in scene.contents]
    assert shapes == {(256, 256), (384, 128)}
    asked = [maker.ask(CONTENTS, kind) for kind in ("where", "leftmost", "topmost", "count") for _ in range(5)]
    assert {answer for _, answer in asked[:5]} == {"b1", "f2"}
    assert {answer for _, answer in asked[5:15]} == {"three"} and {answer for _, answer in asked[15:]} == {"two"}
    assert LargeScenes("test", 1).scene().image.tobytes() == LargeScenes("test", 1).scene().image.tobytes()


def test_the_processor_cuts_a_scene_into_its_cells(tmp_path):
    make_tower(str(tmp_path / "tower"), seed=0, steps=1, squares=40, batch_size=4)
    make_reader(str(tmp_path / "reader"), seed=0, steps=1, scenes=8, batch_size=4)
    processor = processor_from_vision_text_pretrained(
        str(tmp_path / "tower"), str(tmp_path / "reader"), 1, max_crops=16, overview=False
    )
    scene = LargeScenes("validation", 3).draw(CONTENTS)
    pixels = processor(images=[scene], text=["<image>"], return_tensors="pt")["pixel_values"]
    assert len(pixels) == 12
    cut = np.asarray(scene).reshape(2, SIDE, 6, SIDE).swapaxes(1, 2).reshape(12, SIDE, SIDE)
    mean, std = (
        np.array(each)[:, None, None]
        for each in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    np.testing.assert_allclose(pixels.numpy(), (cut[:, None] / 255 - mean) / std, atol=1e-5)  # fmt: skip
    assert set(NAMES) <= set(AutoTokenizer.from_pretrained(tmp_path / "reader").get_vocab())


def test_patches_know_the_digit_whose_middle_they_hold():
    for kind, (squares, labels) in tower_squares(0, 40, "validation").items():
        assert squares.shape[1:] == (SIDE, SIDE) and labels.shape == (len(squares), 64)
        digits = (labels >= 0) & (labels < NOTHING)
        assert digits.any() and (labels == NOTHING).any(), kind
        patches = squares.reshape(-1, 8, 8, 8, 8).swapaxes(2, 3).reshape(-1, 64, 64).max(-1)
        assert patches[digits].mean() > 1.5 * patches[labels == NOTHING].mean(), kind
    # What the experiment is about: squeezed, small digits are of two pixels, and large ones as crops show small ones.
    assert DIGIT_PIXELS / 4 == 2 and LARGE_DIGIT_PIXELS / 4 == DIGIT_PIXELS
    assert squeezed(LargeScenes("test", 0).draw(CONTENTS)).size == (SIDE, SIDE)


@pytest.mark.parametrize("form, number", [(16, 16), (25, 25), ((1, 0), 12), ((4, 0), 48), ((1, 9), 21)])
def test_symbols_say_every_digit_of_a_scene_once(form, number):
    symbolic = SymbolicScenes(make_tokenizer(NAMES), "validation", 0, 2)
    contents = np.array([NOTHING if digit is None else digit for digit in CONTENTS])
    names = symbolic.name_ids[12]
    for seed in range(6):
        digits, ids = symbolic.symbols(contents, form, np.random.default_rng(seed))
        assert len(digits) == len(ids) == number
        if isinstance(form, int):
            assert {(d, i) for d, i in zip(digits, ids) if d != NOTHING} == {(3, names[1]), (7, names[11])}
        else:
            each = form[0]
            found = digits[: 12 * each].reshape(12, each)
            assert np.sort(found, axis=1)[:, 0].tolist() == contents.tolist() and not ids[: 12 * each].any()
            assert (found != NOTHING).sum() == 2
            assert sorted(ids[12 * each :][ids[12 * each :] > 0]) == ([names[1], names[11]] if form[1] else [])


def test_a_way_from_its_parts_to_the_report(tmp_path):
    name, folder, reader = "crops-1-overview-9", str(tmp_path / "seed0"), str(tmp_path / "reader")
    make_tower(f"{folder}/tower", seed=0, steps=1, squares=40, batch_size=4)
    make_reader(reader, seed=0, steps=1, scenes=8, batch_size=4)
    for stage in STAGES:
        write_samples(samples_folder(folder, stage, DIGIT_PIXELS), stage, 0, 8, DIGIT_PIXELS)
    train_and_ask(name, folder, reader, 0, "validation", 12)
    check_parts(folder, reader, 0, "validation", 20)
    ((row, settings),) = WAYS[name].rows()
    measure(name, row, settings, folder, str(tmp_path / "cost.json"), steps=1)
    records, cost = (
        json.loads(Path(record_path(folder, name, "validation")).read_text()),
        json.loads((tmp_path / "cost.json").read_text()),
    )
    assert records[0]["tokens"] == {"square": 16 + 9, "wide": 12 + 9} and len(records[0]["right"]) == 12
    processor = HoneybeeProcessor.from_pretrained(f"{folder}/models/{name}-instruct")
    assert (processor.max_crops, processor.overview_num_query_tokens) == (16, 9)
    parts = json.loads(Path(parts_path(folder, "validation")).read_text())
    report = Path(write_report(str(tmp_path), "validation", records, [cost], {0: parts})).read_text()
    assert f"| {row} | 25 / 21 |" in report and f"| {row} | {np.mean(records[0]['right']):.3f} [" in report


def test_the_command_asks_its_models_about_another_split_and_trains_none_again(tmp_path):
    command = [sys.executable, str(REPOSITORY / "lab" / "crops" / "run.py"), "--preset", "smoke", "--seeds", "0"]
    command += ["--ways", "squeezed-16", "--processes", "1", "--output_dir", str(tmp_path)]
    trained = {}
    for split in ("validation", "test"):
        subprocess.run([*command, "--split", split], check=True, timeout=600)
        report = (tmp_path / "smoke" / f"report-{split}.md").read_text()
        assert "| squeezed, M = 16 | 16 / 16 |" in report and f"scenes of {split} digits" in report
        trained[split] = {path: path.stat().st_mtime_ns for path in (tmp_path / "smoke").rglob("*.safetensors")}
    assert len(trained["test"]) == 4 and trained["validation"] == trained["test"]
    answers = [(tmp_path / "smoke" / f"results-{split}.jsonl").read_text() for split in trained]
    assert json.loads(answers[0].splitlines()[0])["kinds"] != json.loads(answers[1].splitlines()[0])["kinds"]
