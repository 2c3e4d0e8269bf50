# SPDX-License-Identifier: Apache-2.0
"""The lab's scenes, what its stand-ins are trained on, and the loop that trains everything."""

import pytest
import torch
from torch import nn

from lab.loop import train
from lab.scenes import (
    BOS,
    CELL_PIXELS,
    DIGIT_IDS,
    GROUPS,
    KINDS,
    NO_DIGIT,
    PLACEHOLDER,
    VOCABULARY,
    make_scenes,
    test_rows,
    training_rows,
)
from lab.stand_ins import FORMS, Tower, patch_labels, symbols
from training.quickstart.digit_scenes import DIGIT_WORDS, GRID

test_rows.__test__ = False  # pytest takes its name for that of a test
WORDS = {index: word for word, index in VOCABULARY.items()}


@pytest.fixture(scope="module")
def scenes():
    return make_scenes("test", seed=3, number=60)


def test_scenes_are_what_their_contents_say(scenes):
    again = make_scenes("test", seed=3, number=60)
    assert (scenes.pixels == again.pixels).all() and scenes.contents == again.contents
    for scene in range(len(scenes)):
        here = scenes.digits[scene] != NO_DIGIT
        assert sorted(scenes.cells[scene][here].tolist()) == [
            cell for cell, digit in enumerate(scenes.contents[scene]) if digit is not None
        ]
        for digit, cell, (x, y) in zip(
            scenes.digits[scene][here], scenes.cells[scene][here], scenes.centers[scene][here]
        ):
            assert scenes.contents[scene][cell] == digit
            assert cell == y // CELL_PIXELS * GRID + x // CELL_PIXELS
            assert scenes.pixels[scene, int(y) - 8 : int(y) + 8, int(x) - 8 : int(x) + 8].max() > 100


def test_digits_lie_across_the_lines_of_the_grid(scenes):
    here = scenes.digits != NO_DIGIT
    inside = (scenes.centers[here] % CELL_PIXELS - CELL_PIXELS / 2).abs().amax(-1) <= 1
    assert inside.float().mean() < 0.2


def test_rows_ask_one_question_of_each_kind(scenes):
    rows = test_rows(scenes, "seed", 4)
    assert (rows.ids[:, 0] == BOS).all() and (rows.ids[:, 1:5] == PLACEHOLDER).all()
    assert ((rows.labels != -100).sum(1) == 1).all()
    assert set(rows.kinds) == set(KINDS) and rows.images.diff().min() == 0
    assert rows.kinds.count("exist") == rows.kinds.count("count") == rows.kinds.count("what") == len(scenes)
    for ids, labels, image, kind in zip(rows.ids, rows.labels, rows.images, rows.kinds):
        (answer,) = labels[labels != -100].tolist()
        contents = scenes.contents[image]
        if kind == "count":
            assert DIGIT_WORDS.index(WORDS[answer]) == sum(digit is not None for digit in contents)
        if kind == "exist":
            digit = next(DIGIT_WORDS.index(WORDS[i]) for i in ids[5:].tolist() if WORDS[i] in DIGIT_WORDS)
            assert (WORDS[answer] == "yes") == (digit in contents)
    assert set(sum(GROUPS.values(), ())) == set(KINDS)


def test_training_rows_follow_from_their_seed(scenes):
    first, second, other = (training_rows(scenes, [3, 1, 4], seed, 4) for seed in ("a", "a", "b"))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])


def test_patches_know_the_digit_that_they_lie_in(scenes):
    digits, offsets = patch_labels(scenes)
    inside = digits != NO_DIGIT
    assert digits.shape == (60, 144) and offsets[inside].abs().max() <= 1
    patch = torch.tensor([3.0, 3.0]) + 6 * torch.tensor([5.0, 2.0])  # column 5, row 2
    for scene in range(60):
        away = (patch - scenes.centers[scene]).abs().amax(-1)
        expected = scenes.digits[scene][away.argmin()] if away.min() <= 8 else NO_DIGIT
        assert digits[scene, 2 * 12 + 5] == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", [2, 4, 12])
def test_symbols_name_every_digit(scenes, form, side):
    """Whatever their number, symbolic tokens hold each digit of the scene, and nobody else."""
    embeddings = nn.Embedding.from_pretrained(torch.eye(len(VOCABULARY)))
    tokens = symbols(scenes, torch.arange(60), side, form, embeddings, torch.Generator().manual_seed(0))
    assert tokens.shape == (60, side**2, len(VOCABULARY))
    for scene in range(60):
        found = (tokens[scene].sum(0)[DIGIT_IDS[:10]] > 1e-6).nonzero().flatten().tolist()
        wanted = sorted({digit for digit in scenes.contents[scene] if digit is not None})
        if form == "hard" and side == 2:
            assert set(found) <= set(wanted)  # of two digits in a window, one is named
        else:
            assert found == wanted


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers_give_one_feature_a_patch(kind, scenes):
    assert Tower(kind)(torch.from_numpy(scenes.pixels[:2])).shape == (2, 144, 64)


class Stopped(Exception):
    pass


def run_loop(path: str, stop_at: int | None = None) -> tuple[dict, list, list[int]]:
    torch.manual_seed(0)
    modules, done = nn.ModuleDict({"projector": nn.Linear(4, 4)}), []
    modules["average"] = torch.optim.swa_utils.AveragedModel(modules["projector"])

    def loss_at(step: int) -> torch.Tensor:
        if step == stop_at:
            raise Stopped
        done.append(step)
        data = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return nn.functional.dropout(modules["projector"](data), 0.5).square().mean()

    points = train(modules, 1e-2, lambda step: 1 / (1 + step), loss_at, 9, (3, 6), lambda step, _: {"step": step}, path)
    return modules.state_dict(), points, done


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path):
    whole, points, done = run_loop(str(tmp_path / "whole"))
    assert points == [{"step": 3}, {"step": 6}, {"step": 9}] and done == list(range(9))
    for stop_at in (5, 8):
        with pytest.raises(Stopped):
            run_loop(str(tmp_path / "stopped"), stop_at)
    resumed, points, done = run_loop(str(tmp_path / "stopped"))
    assert points == [{"step": 3}, {"step": 6}, {"step": 9}] and done == [6, 7, 8]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
