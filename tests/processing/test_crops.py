# SPDX-License-Identifier: Apache-2.0
"""Large pictures as several squares: which grid, which pixels, how many placeholders, and what a call may say about it."""

import io
import json
import re

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import pipeline

from modeling_honeybee import HoneybeeProjectorConfig
from processing import HoneybeeProcessor, open_image, processor_from_vision_text_pretrained
from processing.crops_honeybee import WHOLE, Cut, plan_cut
from processing.prepare_tokenizer import check_processor
from tests.tiny import (
    ELASTIC,
    IMAGE_SIZE,
    REPOSITORY,
    picture,
    save_clip,
    save_llama,
    tiny_config,
    tiny_model,
    tiny_processor,
)

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
S = IMAGE_SIZE
SETTINGS = ("max_crops", "min_crops", "overview", "overview_num_query_tokens", "max_images_cut")
# Columns and rows with at most 4 crops.
WIDE, LARGE, SMALL, TALL = (3 * S, S), (2 * S, 2 * S), (20, 20), (S, 3 * S)
GRIDS = {WIDE: (3, 1), LARGE: (2, 2), SMALL: (1, 1), TALL: (1, 3)}


def cropping(**settings) -> HoneybeeProcessor:
    """M of 4, 9 and 16, an extra token an image, at most 4 crops."""
    elastic = {"elastic_num_query_tokens": [4, 9, 16], "num_eos_tokens": 1}
    return tiny_processor(10, **{**elastic, "max_crops": 4, **settings})


def pictures(sizes) -> list[Image.Image]:
    return [picture(seed, size) for seed, size in enumerate(sizes)]


def call(processor, sizes, text="<image> and <image>?", **settings):
    settings = {"return_tensors": "pt", "padding": True, **settings}
    return processor(images=pictures(sizes), text=text, **settings)


def placeholders(processor, inputs) -> list[int]:
    """The length of each run of placeholders; those of two images never touch here."""
    runs = []
    for row in (torch.as_tensor(inputs["input_ids"]) == processor.image_token_id).int().tolist():
        runs += [len(run) for run in "".join(map(str, row)).split("0") if run]
    return runs


def user(*content):
    return [{"role": "user", "content": list(content)}]


def image(size, seed: int = 0, **settings) -> dict:
    return {"type": "image", "image": picture(seed, size), **settings}


def text(words: str = "What?") -> dict:
    return {"type": "text", "text": words}


def best_grids(size, square, max_crops: int, min_crops: int) -> set[tuple[int, int]]:
    """The rule as one would write it down: what is left after each of its sentences."""
    (width, height), (side, tall) = size, square

    def scales(grid):
        return grid[0] * side / width, grid[1] * tall / height

    numbers = range(1, max_crops + 1)
    left = [(a, b) for a in numbers for b in numbers if min_crops <= a * b <= max_crops]
    kept = [grid for grid in left if scales(grid)[0] * scales(grid)[1] <= 2 + 1e-9]
    left = kept or (left if min_crops > 1 else [(1, 1)])
    details = {grid: min(*scales(grid), 1.0) for grid in left}  # of the coarser direction
    left = [grid for grid in left if details[grid] >= 0.9 * max(details.values()) - 1e-9]
    for value in (
        lambda grid: max(scales(grid)) / min(scales(grid)),  # change of aspect ratio
        lambda grid: grid[0] * grid[1],
        lambda grid: grid[0],
    ):
        least = min(map(value, left))
        left = [grid for grid in left if value(grid) <= least + 1e-9 * abs(least)]
    return set(left)


@given(
    st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    st.sampled_from([(32, 32), (336, 336), (48, 32)]),
    st.integers(1, 12),
    st.integers(1, 4),
)
def test_the_grid_is_that_of_the_rule(size, square, max_crops, min_crops):
    min_crops = min(min_crops, max_crops)
    cut = plan_cut(size, square, max_crops, min_crops)
    best = best_grids(size, square, max_crops, min_crops)
    assert {(cut.columns, cut.rows)} == best
    assert cut.overview == (cut.columns * cut.rows > 1) and cut.num_crops == cut.columns * cut.rows + cut.overview
    assert plan_cut(size, square, max_crops, min_crops, overview=False) == Cut(cut.columns, cut.rows)


@pytest.mark.parametrize(
    ("size", "max_crops", "min_crops", "grid"),
    [
        ((S, S), 9, 1, (1, 1)),
        ((S + 1, S), 9, 1, (1, 1)),  # 2 x 1 would keep a pixel's worth more
        ((S, S + 1), 9, 1, (1, 1)),
        ((S + 1, S + 1), 9, 1, (1, 1)),
        ((S + 4, S), 9, 1, (2, 1)),  # 32 / 36 is less than nine tenths
        ((7 * S, 10 * S), 9, 1, (2, 3)),  # 3 x 3 is a little finer
        ((1, 1), 9, 1, (1, 1)),
        ((1, 63 * S), 9, 1, (1, 3)),
        ((63 * S, 1), 9, 1, (3, 1)),
        ((1, 100 * S), 9, 1, (1, 6)),
        ((20, 1000), 9, 1, (1, 9)),
        ((1000, 20), 9, 1, (9, 1)),
        ((1000, 20), 4, 1, (4, 1)),
        ((20, 20), 9, 4, (2, 2)),
        ((20, 20), 9, 5, (3, 3)),
        ((S, S), 9, 2, (1, 2)),  # and not 2 x 1, which is as good
        ((4, 8), 4, 4, (1, 4)),  # and not 2 x 2
        ((6 * S, 4 * S), 24, 1, (6, 4)),
        ((6 * S, 4 * S), 23, 1, (5, 3)),
        ((6 * S, 4 * S), 10**9, 1, (6, 4)),  # and not after a search through all grids of so many
    ],
)
def test_grids(size, max_crops, min_crops, grid):
    cut = plan_cut(size, (S, S), max_crops, min_crops)
    assert (cut.columns, cut.rows) == grid


def test_the_page_shows_what_the_code_does():
    page = (REPOSITORY / "docs" / "crops.md").read_text()
    rows = re.findall(r"^\| (\d+) x (\d+) \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) == 8
    for width, height, cells in rows:
        cuts = [plan_cut((int(width), int(height)), (336, 336), most) for most in (4, 9, 16)]
        assert cells.split(" | ") == [f"{cut.columns} x {cut.rows}, {cut.num_crops}" for cut in cuts]


def by_hand(image: Image.Image, grid: tuple[int, int], overview: bool = True) -> torch.Tensor:
    """(squares, 3, S, S), pixel by pixel, with the mean and deviation of CLIP."""
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def resized(width, height):
        return image.resize((width, image.height), Image.Resampling.BICUBIC).resize(
            (width, height), Image.Resampling.BICUBIC
        )

    large = resized(grid[0] * S, grid[1] * S)
    squares = [(large, column * S, row * S) for row in range(grid[1]) for column in range(grid[0])]
    if overview and grid != (1, 1):
        squares.append((resized(S, S), 0, 0))
    values = np.zeros((len(squares), 3, S, S))
    for square, (source, left, top) in enumerate(squares):
        for y in range(S):
            for x in range(S):
                pixel = source.getpixel((left + x, top + y))
                for channel in range(3):
                    values[square, channel, y, x] = (pixel[channel] / 255 - mean[channel]) / deviation[channel]
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("overview", [True, False])
def test_squares_are_those_of_a_plain_loop(overview):
    sizes = {**GRIDS, (100, 40): (3, 1), (50, 61): (2, 2), (1, 40): (1, 1), (25, 1250): (1, 4), (S, S): (1, 1)}
    processor = cropping(overview=overview)
    for size, grid in sizes.items():
        inputs = call(processor, [size], "<image>?")
        expected = by_hand(picture(0, size), grid, overview)
        assert inputs["num_crops"].tolist() == [len(expected)], size
        torch.testing.assert_close(inputs["pixel_values"], expected, atol=1e-5, rtol=0, msg=str(size))
        # The same from the pictures alone, and with plain lists or numpy.
        alone = processor(images=pictures([size]), return_tensors="np")
        assert alone["num_crops"].tolist() == [len(expected)]
        assert np.array_equal(alone["pixel_values"], inputs["pixel_values"].numpy())
        assert call(processor, [size], "<image>?", return_tensors=None)["num_crops"] == [len(expected)]


def test_squares_lie_row_by_row():
    """Known without a resize: fields of one colour each, larger than what a filter reads across their edges."""
    fields = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    scene = Image.fromarray(fields.repeat(2 * S, 0).repeat(2 * S, 1)).convert("RGB")
    processor = cropping(max_crops=6)
    pixels = processor(images=scene, return_tensors="np", do_normalize=False)["pixel_values"]
    assert np.allclose(pixels[:6, 0, S // 2, S // 2] * 255, fields.ravel()) and len(pixels) == 7
    # The overview: the middle of each field in the whole.
    middles = pixels[6, 0, S // 4 :: S // 2, S // 6 :: S // 3][:2, :3] * 255
    assert np.allclose(middles, fields, atol=2)


def test_pictures_that_come_otherwise():
    processor = cropping()
    scene = picture(0, (100, 40))
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    scene.save(turned, "PNG", exif=exif)
    palette = scene.convert("P", palette=Image.Palette.ADAPTIVE, colors=7)
    for given_, plain, squares in (
        (turned.getvalue(), scene.transpose(Image.Transpose.ROTATE_270), 4),
        (palette, palette.convert("RGB"), 4),
        (np.asarray(scene.convert("L")), Image.merge("RGB", [scene.convert("L")] * 3), 4),
        (np.asarray(picture(0, (70, 1))), picture(0, (70, 1)), 1),
        (np.asarray(picture(0, (1, 70))), picture(0, (1, 70)), 1),
    ):
        ours, expected = (processor(images=x, text="<image>", return_tensors="pt") for x in (given_, plain))
        assert ours["num_crops"].tolist() == [squares] and torch.equal(ours["pixel_values"], expected["pixel_values"])
        assert torch.equal(ours["input_ids"], expected["input_ids"])
    (counted,) = processor._get_num_multimodal_tokens([open_image(turned.getvalue()).size[::-1]])["num_image_patches"]
    assert counted == 4


def test_off_is_as_before(tmp_path):
    off = tiny_processor(10, elastic_num_query_tokens=[4, 9, 16], num_eos_tokens=1)
    off.save_pretrained(tmp_path)
    assert not set(SETTINGS) & set(json.loads((tmp_path / "processor_config.json").read_text()))
    inputs = call(off, [WIDE, SMALL])
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"} and placeholders(off, inputs) == [10, 10]
    expected = torch.cat([by_hand(each, (1, 1)) for each in pictures([WIDE, SMALL])])
    torch.testing.assert_close(inputs["pixel_values"], expected, atol=1e-5, rtol=0)
    # The other settings of crops change nothing where none is cut, nor does a call that asks for what is so already.
    others = {"overview": False, "overview_num_query_tokens": 4, "max_images_cut": 5}
    for processor, asked in (
        (cropping(max_crops=1, **others), {}),
        (off, {"max_crops": 1}),
        (off, {"max_crops": [1, None]}),
    ):
        same = call(processor, [WIDE, SMALL], **asked)
        assert set(same) == set(inputs) and all(torch.equal(same[name], inputs[name]) for name in inputs)
    # With crops on, a call without them gives the same, and says so.
    whole = call(cropping(), [WIDE, SMALL], max_crops=1)
    assert whole.pop("num_crops").tolist() == [1, 1]
    assert all(torch.equal(whole[name], inputs[name]) for name in (*inputs, *whole))


ROWS = ["<image> and <image>?", "none", "<image>?", "<image> <image> <image>"]
SIZES = [WIDE, SMALL, LARGE, WIDE, LARGE, TALL]  # the last three are too many for a prompt to be cut


@pytest.mark.parametrize("nested", [False, True])
def test_cut_and_uncut_images_in_rows(nested):
    processor = cropping()
    images = pictures(SIZES)
    given_ = [images[:2], [], images[2:3], images[3:]] if nested else images
    inputs = processor(images=given_, text=ROWS, return_tensors="pt", padding=True)
    assert inputs["num_crops"].tolist() == [4, 1, 5, 1, 1, 1]
    assert placeholders(processor, inputs) == [40, 10, 50, 10, 10, 10]
    # Each row is what it is alone, and one without images has nothing of them.
    at = 0
    for row, ids, mask in zip(ROWS, inputs["input_ids"], inputs["attention_mask"].bool()):
        own, images = images[: row.count("<image>")], images[row.count("<image>") :]
        alone = processor(images=own or None, text=row, return_tensors="pt")
        assert torch.equal(alone["input_ids"][0], ids[mask])
        assert ("num_crops" in alone) == ("pixel_values" in alone) == bool(own)
        if own:
            squares = alone["pixel_values"]
            assert torch.equal(squares, inputs["pixel_values"][at : at + len(squares)])
            at += len(squares)
    assert at == len(inputs["pixel_values"])


def test_images_without_text_are_cut_as_with_it():
    processor, rows = cropping(max_crops=3), [pictures([WIDE]), [], pictures([SMALL, WIDE]), pictures([WIDE] * 3)]
    expected = processor(images=rows, text=["<image>" * len(row) for row in rows], return_tensors="pt", padding=True)
    assert expected["num_crops"].tolist() == [4, 1, 4, 1, 1, 1]
    alone = processor(images=rows, return_tensors="pt")
    assert torch.equal(alone["num_crops"], expected["num_crops"])
    assert torch.equal(alone["pixel_values"], expected["pixel_values"])
    one_row = processor(images=[image for row in rows for image in row], return_tensors="pt")
    assert one_row["num_crops"].tolist() == [1] * 6


@pytest.mark.parametrize(
    ("of_processor", "of_call", "grids", "tokens"),
    [
        ({}, {}, [3, 1], [4 * 10, 10]),
        ({"overview": False}, {}, [3, 1], [3 * 10, 10]),
        ({"max_images_cut": 1}, {}, [1, 1], [10, 10]),
        ({"max_crops": 2}, {}, [2, 1], [3 * 10, 10]),
        ({"min_crops": 4}, {}, [4, 4], [5 * 10, 5 * 10]),
        ({"overview_num_query_tokens": 4}, {}, [3, 1], [3 * 10 + 5, 10]),
        ({"overview_num_query_tokens": 4}, {"num_query_tokens": 16}, [3, 1], [3 * 17 + 5, 17]),
        ({"overview_num_query_tokens": 4, "overview": False}, {}, [3, 1], [3 * 10, 10]),
        ({"overview_num_query_tokens": 9}, {"num_query_tokens": [4, 16]}, [3, 1], [3 * 5 + 10, 17]),
        ({}, {"num_query_tokens": [16, None]}, [3, 1], [4 * 17, 10]),
        ({}, {"num_query_tokens": 25, "allow_untrained": True}, [3, 1], [4 * 26, 26]),
        # Of a call, for all images or each; it may be more than the processor's.
        ({}, {"max_crops": 2}, [2, 1], [3 * 10, 10]),
        ({"max_crops": 1}, {"max_crops": 3}, [3, 1], [4 * 10, 10]),
        ({"max_crops": 1}, {"max_crops": [3, None]}, [3, 1], [4 * 10, 10]),
        ({"min_crops": 4}, {"max_crops": [None, 1]}, [4, 1], [5 * 10, 10]),
        ({"min_crops": 4}, {"max_crops": torch.tensor([2, 1])}, [2, 1], [3 * 10, 10]),
        ({}, {"max_crops": np.int64(2)}, [2, 1], [3 * 10, 10]),
        # Budgets: first M, for 4 + 1 squares of M + 1 tokens, ...
        ({}, {"max_visual_tokens": 85}, [3, 1], [4 * 17, 17]),
        ({}, {"max_visual_tokens": 84}, [3, 1], [4 * 10, 10]),
        ({}, {"max_visual_tokens": 25}, [3, 1], [4 * 5, 5]),
        # ... then the crops, and what that leaves is M's again.
        ({}, {"max_visual_tokens": 24}, [2, 1], [3 * 5, 5]),
        ({}, {"max_visual_tokens": 19}, [1, 1], [5, 5]),
        ({"overview": False}, {"max_visual_tokens": 19}, [2, 1], [2 * 5, 5]),
        ({"overview": False, "max_crops": 2}, {"max_visual_tokens": 14}, [1, 1], [5, 5]),
        ({"elastic_num_query_tokens": [1, 9]}, {"max_visual_tokens": 9}, [2, 1], [3 * 2, 2]),
        ({"max_images_cut": 1}, {"max_visual_tokens": 20}, [1, 1], [10, 10]),
        ({}, {"max_visual_tokens": 30, "num_query_tokens": [None, 16]}, [1, 1], [10, 17]),
        ({}, {"max_visual_tokens": 60, "max_crops": [2, 4]}, [2, 1], [3 * 10, 10]),
        ({"overview_num_query_tokens": 4}, {"max_visual_tokens": 73}, [3, 1], [3 * 17 + 5, 17]),
        ({"overview_num_query_tokens": 4}, {"max_visual_tokens": 72}, [3, 1], [3 * 10 + 5, 10]),
    ],
)
def test_settings_and_budgets(of_processor, of_call, grids, tokens):
    processor = cropping(**of_processor)
    inputs = call(processor, [WIDE, SMALL], **of_call)
    assert placeholders(processor, inputs) == tokens
    squares = [grid + (grid > 1 and processor.overview) for grid in grids]
    assert inputs["num_crops"].tolist() == squares if "num_crops" in inputs else squares == [1, 1]
    assert len(inputs["pixel_values"]) == sum(squares)
    numbers = inputs.get("num_query_tokens", torch.tensor([9] * sum(squares)))
    assert len(numbers) == sum(squares) and numbers.sum() + sum(squares) == sum(tokens)
    if processor.overview and grids[0] > 1 and processor.overview_num_query_tokens:
        assert numbers[squares[0] - 1] == processor.overview_num_query_tokens
    if processor.max_images_cut > 1 or "max_visual_tokens" in of_call:  # a server asks beforehand
        counted = processor._get_num_multimodal_tokens([(S, 3 * S), SMALL], **of_call)
        assert counted["num_image_tokens"] == tokens and counted["num_image_patches"] == squares


def test_a_budget_that_takes_the_crops_is_spent_on_tokens():
    """Without crops a picture of 10 tokens fits into 14, and with them no cut one."""
    inputs = call(cropping(), [WIDE], "<image>?", max_visual_tokens=14)
    assert inputs["num_crops"].tolist() == [1] and (inputs["input_ids"] == cropping().image_token_id).sum() == 10


def test_a_budget_that_is_large_enough_changes_no_cut():
    """Asked again with the five crops that it has, this picture would get four: none of the finer grids is there then."""
    processor = cropping(max_crops=10)
    free, ample = (processor._plan([[(34, 151)]], max_visual_tokens=most) for most in (None, 6 * 17))
    assert free == [(9, Cut(1, 5, True))] and ample == [(16, Cut(1, 5, True))]
    assert processor._plan([[(34, 151)]], max_visual_tokens=6 * 5 - 1) == [(4, Cut(1, 4, True))]


def test_settings_may_be_set_later_and_are_saved(tmp_path):
    asked = {"max_crops": 4, "min_crops": 2, "overview": False, "overview_num_query_tokens": 4, "max_images_cut": 3}
    for processor in (cropping(**asked), tiny_processor(10)):
        for name, value in asked.items():
            setattr(processor, name, value)
        processor.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "processor_config.json").read_text())
        assert {name: saved[name] for name in SETTINGS} == asked
        loaded = HoneybeeProcessor.from_pretrained(tmp_path)
        ours, theirs = (call(each, [WIDE, SMALL]) for each in (processor, loaded))
        assert all(torch.equal(ours[name], theirs[name]) for name in (*ours, *theirs))
        assert ours["num_crops"].tolist() == [3, 4]
    # Asked while loading, and left again.
    assert HoneybeeProcessor.from_pretrained(tmp_path, max_crops=6).max_crops == 6
    loaded.max_crops = loaded.min_crops = 1
    assert "num_crops" not in call(loaded, [WIDE, SMALL])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_crops": 0}, "max_crops=0 must be a whole number of at least 1"),
        ({"max_crops": 2.5}, "max_crops=2.5 must be a whole number"),
        ({"max_crops": "9"}, "max_crops='9' must be a whole number"),
        ({"max_crops": None}, "max_crops=None must be a whole number"),
        ({"min_crops": 0}, "min_crops=0 must be a whole number"),
        ({"max_images_cut": -1}, "max_images_cut=-1 must be a whole number"),
        ({"overview_num_query_tokens": 0}, "overview_num_query_tokens=0 must be a whole number"),
        ({"overview": "yes"}, "overview='yes' must be True or False"),
        ({"min_crops": 5}, "min_crops=5 is more than max_crops=4; lower it"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        cropping(**settings)
    processor = cropping()
    for name, value in settings.items():
        setattr(processor, name, value)
    with pytest.raises(ValueError, match=words):
        call(processor, [WIDE, SMALL])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_crops": 0}, "max_crops=0 must be a whole number of at least 1"),
        ({"max_crops": True}, "max_crops=True must be a whole number"),
        ({"max_crops": [2, "3"]}, "max_crops='3' must be a whole number"),
        ({"max_crops": [2, 3, 4]}, "max_crops lists 3 numbers, but there are 2 images"),
        ({"images_kwargs": {"max_crops": 4}}, "max_crops stands in images_kwargs"),
        (
            {"max_visual_tokens": 9},
            "max_visual_tokens=9 is too small: the 2 images of the prompt need at least 10 visual",
        ),
        ({"max_visual_tokens": 33, "num_query_tokens": 16}, "max_visual_tokens=33 is too small.* at least 34"),
    ],
)
def test_calls_that_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        call(cropping(), [WIDE, SMALL], **settings)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=3),
    st.fixed_dictionaries(
        {"max_crops": st.integers(2, 7), "min_crops": st.integers(1, 2), "overview": st.booleans()},
        optional={"overview_num_query_tokens": st.sampled_from([4, 9, 16]), "max_images_cut": st.just(3)},
    ),
    st.fixed_dictionaries({}, optional={"max_visual_tokens": st.integers(30, 200), "max_crops": st.integers(1, 9)}),
)
def test_what_is_counted_is_what_is_made(sizes, of_processor, of_call):
    processor = cropping(**of_processor)
    # Servers keep what became of an image for other prompts, so it is one of its own, where it shares no budget.
    rows = [" and ".join(["<image>"] * len(sizes))] if "max_visual_tokens" in of_call else ["<image>"] * len(sizes)
    inputs = call(processor, sizes, rows, **of_call)
    counted = processor._get_num_multimodal_tokens([(height, width) for width, height in sizes], **of_call)
    assert counted["num_image_tokens"] == placeholders(processor, inputs)
    assert counted["num_image_patches"] == inputs["num_crops"].tolist()
    assert len(inputs["pixel_values"]) == inputs["num_crops"].sum()
    assert sum(counted["num_image_tokens"]) <= of_call.get("max_visual_tokens", 1000)
    # A budget that is large enough changes nothing but M.
    ample, free = (processor._plan([sizes], **{**of_call, "max_visual_tokens": most}) for most in (10**6, None))
    assert [cut for _, cut in ample] == [cut for _, cut in free] and {number for number, _ in ample} == {16}


ASKED = [
    ([image(WIDE)], {}, [4], [9] * 4),
    ([image(WIDE)], {"max_crops": 2}, [3], [9] * 3),
    ([image(WIDE, max_crops=2)], {}, [3], [9] * 3),
    ([image(WIDE, max_crops=2), text(), image(LARGE, 1)], {"max_crops": 3}, [3, 1], [9] * 4),
    ([image(WIDE, detail="low"), text(), image(LARGE, 1, detail="high")], {}, [1, 5], [4] + [16] * 5),
    ([image(WIDE, detail="auto"), text(), image(LARGE, 1)], {"max_crops": [4, 1]}, [4, 1], [9] * 5),
    ([image(WIDE, detail="low", max_crops=2, num_query_tokens=9)], {}, [3], [9] * 3),
    ([image(WIDE)], {"max_visual_tokens": 20}, [4], [4] * 4),
    ([image(WIDE)], {"processor_kwargs": {"max_crops": 1}}, [1], [9]),
    ([image(WIDE), text(), image(LARGE, 1), image(SMALL, 2)], {}, [1, 1, 1], [9] * 3),
]


@pytest.mark.parametrize(("content", "asked", "crops", "numbers"), ASKED)
def test_messages_say_it(content, asked, crops, numbers, caplog):
    processor = cropping()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    conversation = user(*content)
    inputs = processor.apply_chat_template(conversation, **options, **asked)
    assert inputs["num_crops"].tolist() == crops and len(inputs["pixel_values"]) == len(numbers)
    assert inputs.get("num_query_tokens", torch.tensor([9] * len(numbers))).tolist() == numbers
    assert (inputs["input_ids"] == processor.image_token_id).sum() == sum(numbers) + len(numbers)
    assert "have to be in `processor_kwargs`" not in caplog.text
    # By hand: what a server does that renders and reads pictures itself.
    given_ = asked.get("processor_kwargs", asked)
    own = {
        "num_query_tokens": processor.image_query_tokens(conversation),
        "max_crops": processor.image_max_crops(conversation, given_.get("max_crops")),
    }
    again = processor(
        images=[item["image"] for item in content if item["type"] == "image"], add_special_tokens=False,
        text=processor.apply_chat_template(conversation, add_generation_prompt=True), return_tensors="pt", **{**given_, **own},
    )  # fmt: skip
    assert set(again) == set(inputs) and all(torch.equal(again[name], inputs[name]) for name in inputs)


def test_what_messages_cannot_say():
    processor = cropping()
    with pytest.raises(ValueError, match="max_crops: text alone does not hold numbers .* add tokenize=True"):
        processor.apply_chat_template(user(image(WIDE)), max_crops=2)
    with pytest.raises(ValueError, match="max_crops=0 must be a whole number"):
        processor.apply_chat_template(user(image(WIDE, max_crops=0)), tokenize=True)
    with pytest.raises(ValueError, match="max_crops lists 2 numbers, but there are 1 images"):
        processor.apply_chat_template(user(image(WIDE)), tokenize=True, max_crops=[2, 2])
    # A model with one M has a choice where it cuts.
    fixed = tiny_processor(4, max_crops=4)
    with pytest.raises(ValueError, match="detail='medium' of an image must be low, high or auto"):
        fixed.apply_chat_template(user(image(WIDE, detail="medium")), tokenize=True)
    inputs = fixed.apply_chat_template(
        user(image(WIDE, detail="low"), text(), image(WIDE, 1, detail="high")), tokenize=True, return_dict=True
    )
    assert list(inputs["num_crops"]) == [1, 4] and "num_query_tokens" not in inputs


def test_fields_follow_from_the_settings():
    """So that samples that are put into one batch later have the same, whether their pictures are cut or not."""
    for of_processor, of_call, fields in (
        ({}, {}, {"num_crops"}),
        ({}, {"max_crops": 1}, {"num_crops"}),
        ({"overview_num_query_tokens": 4}, {}, {"num_crops", "num_query_tokens"}),
        ({"overview_num_query_tokens": 4, "overview": False}, {}, {"num_crops"}),
        ({"max_crops": 1}, {"max_crops": 4}, {"num_crops"}),
        ({}, {"max_visual_tokens": 40}, {"num_crops", "num_query_tokens"}),
        ({"max_crops": 1}, {"max_visual_tokens": 10}, set()),
    ):
        for size in (WIDE, SMALL):
            inputs = call(cropping(**of_processor), [size], "<image>?", **of_call)
            assert set(inputs) - {"input_ids", "attention_mask", "pixel_values"} == fields
    assert set(cropping(overview_num_query_tokens=4)(text="none")) == {"input_ids", "attention_mask"}


def test_placeholders_are_marked():
    processor = cropping()
    inputs = call(processor, [WIDE, SMALL], return_mm_token_type_ids=True)
    marked = torch.as_tensor(inputs["mm_token_type_ids"])
    assert torch.equal(marked == 1, inputs["input_ids"] == processor.image_token_id) and marked.sum() == 50


def test_no_cut_where_pictures_keep_their_size():
    """A grid of squares needs their width and height."""
    processor = cropping()
    scenes = [picture(seed, (S, S)) for seed in range(2)]
    inputs = processor(images=scenes, text="<image> <image>", do_resize=False, return_tensors="pt", max_crops=9)
    assert inputs["num_crops"].tolist() == [1, 1]
    assert processor.plan_cuts([WIDE], do_resize=False) == [WHOLE]
    # The size of a call is that of the squares.
    inputs = processor(images=picture(0, WIDE), size={"height": 48, "width": 48}, return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 3, 48, 48) and processor.plan_cuts([WIDE])[0].columns == 3


def test_model_and_processor_must_agree(tmp_path):
    def check(own, of_model, **settings):
        processor = tiny_processor(10, num_eos_tokens=1, max_crops=4, overview_num_query_tokens=own, **settings)
        model = {"num_query_tokens": 9, "num_eos_tokens": 1, "overview_num_query_tokens": of_model}
        elastic = settings.get("elastic_num_query_tokens")
        ids = {"image_token_id": processor.image_token_id}
        check_processor(tiny_config(config=ids, elastic_num_query_tokens=elastic, **model), processor)

    check(4, 4)
    check(9, None)  # as the crops'
    check(4, None, elastic_num_query_tokens=[4, 9])
    for own, of_model in ((4, None), (4, 16)):
        with pytest.raises(ValueError, match=f"visual tokens of an overview: {own} and {of_model}"):
            check(own, of_model)
    # A new processor for a model.
    projector = HoneybeeProjectorConfig(**ELASTIC, overview_num_query_tokens=25)
    made = processor_from_vision_text_pretrained(
        save_clip(tmp_path / "vision"), save_llama(tmp_path / "text"), projector.num_visual_tokens, max_crops=9,
        elastic_num_query_tokens=projector.elastic_num_query_tokens, num_eos_tokens=projector.num_eos_tokens,
        overview_num_query_tokens=projector.overview_num_query_tokens,
    )  # fmt: skip
    assert (made.max_crops, made.overview_num_query_tokens) == (9, 25)


@pytest.mark.parametrize("overview", [None, 4])
def test_pipeline(overview):
    processor = cropping(overview_num_query_tokens=overview)
    ids = {"image_token_id": processor.image_token_id}
    model = tiny_model(config=ids, **ELASTIC)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    chats = [
        user(image(WIDE), text()),
        user(image(SMALL, 1), text("Is it?")),
        user(image(LARGE, 2, max_crops=1), text()),
    ]
    expected = []
    for chat in chats:
        inputs = processor.apply_chat_template(chat, **options)
        new = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(new, skip_special_tokens=True))
    how = {"max_new_tokens": 5, "return_full_text": False}
    assert [ask(text=chat, **how)[0]["generated_text"] for chat in chats] == expected
    # Pictures that are cut and others in one batch.
    assert [answer[0]["generated_text"] for answer in ask(text=chats, batch_size=3, **how)] == expected
    if not TRANSFORMERS_4:  # whose pipeline gives a processor none of its settings with a chat
        whole = ask(text=user(image(WIDE), text()), max_crops=1, **how)[0]["generated_text"]
        assert whole == ask(text=user(image(WIDE, max_crops=1), text()), **how)[0]["generated_text"]
