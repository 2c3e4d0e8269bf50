# SPDX-License-Identifier: Apache-2.0
"""Streams of files: what is read, in which order, and what is said of those that cannot be."""

import gc
import gzip
import importlib.util
import io
import json
import os
import pickle
import tarfile
from functools import partial

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from tests.tiny import picture
from training.conversations import normalize_conversation
from training.recipe.config import RecipeError, load_recipe, parse_recipe
from training.recipe.mixture import Mixture, Source
from training.recipe.sources import open_mixture, open_streamed
from training.recipe.stream import ShuffledStream
from training.recipe.streaming import open_stream, stream_root
from training.samples import TooManyBadSamplesError

needs_zstandard = pytest.mark.skipif(importlib.util.find_spec("zstandard") is None, reason="zstandard is not installed")


def row(index, **more):
    asked, said = {"role": "user", "content": f"What is {index}?"}, {"role": "assistant", "content": f"{index}"}
    return {"messages": [asked, said], "images": ["p.png"], **more}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def png(seed=0):
    data = io.BytesIO()
    picture(seed).save(data, "PNG")
    return data.getvalue()


def write_tar(path, rows):
    with tarfile.open(path, "w") as tar:
        for index, row in enumerate(rows):
            add(tar, f"{index:04}.json", json.dumps({**row, "images": None}).encode())
            add(tar, f"{index:04}.png", png())


def write_zst(path, rows):
    import zstandard

    frames = [zstandard.ZstdCompressor().compress(lines(part).encode()) for part in (rows[:9], rows[9:])]
    path.write_bytes(b"".join(frames))


WRITERS = {
    "jsonl": lambda path, rows: path.write_text(lines(rows)),
    "jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows).encode())),
    "jsonl.zst": write_zst,
    "parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=16),
    "tar": write_tar,
}
KINDS = [pytest.param(kind, marks=needs_zstandard if kind == "jsonl.zst" else ()) for kind in WRITERS]
SIZES = (70, 0, 41, 25, 64)  # rows of each file


@pytest.fixture
def files(tmp_path):
    """Writes files of a type with 200 rows, and gives the pattern of their names."""

    def write(kind, **more):
        picture().save(tmp_path / "p.png")
        start = 0
        for number, size in enumerate(SIZES):
            if size or kind not in ("parquet",):
                WRITERS[kind](tmp_path / f"part-{number}.{kind}", [row(i, **more) for i in range(start, start + size)])
            start += size
        return str(tmp_path / f"part-*.{kind}")

    return write


def said(sample):
    return int(sample["messages"][1]["content"][0]["text"])


def answers(path, positions, **settings):
    stream, convert = open_stream(path, **settings)
    return [int(convert(stream[position])["messages"][1]["content"]) for position in positions]


@pytest.mark.parametrize("kind", KINDS)
def test_each_epoch_has_every_record_once_and_any_position_can_be_read(kind, files):
    path = files(kind)
    read = answers(path, range(600), seed=1, buffer_size=32)
    epochs = [read[start : start + 200] for start in (0, 200, 400)]
    assert all(sorted(epoch) == list(range(200)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    again = [430, 429, 470, 3, 599, 0]
    assert answers(path, again, seed=1, buffer_size=32) == [read[position] for position in again]
    assert answers(path, range(200), seed=2, buffer_size=32) != epochs[0]
    assert sorted(answers(path, range(200), seed=1, buffer_size=1)) == list(range(200))


def test_a_buffer_has_records_of_several_files(files):
    read = answers(files("jsonl"), range(50), buffer_size=50)
    ends = np.cumsum(SIZES)
    assert len(set(np.searchsorted(ends, read, side="right"))) >= 3
    # Seeds and the order that they give do not depend on a release of anything.
    assert answers(files("jsonl"), range(8), seed=7, buffer_size=20) == [138, 140, 137, 1, 136, 2, 112, 116]


@pytest.mark.parametrize("kind", KINDS)
def test_workers_read_what_one_process_reads(kind, files):
    path = files(kind)
    samples = []
    for workers in (0, 2):
        mixture = open_streamed(path, "train", 30, 300, seed=3)
        mixture[70]  # so that forked workers find open files
        loader = DataLoader(mixture.as_dataset(), batch_size=4, collate_fn=list, num_workers=workers)
        samples.append([(s["index"], said(s), s["images"][0].size) for batch in loader for s in batch])
    assert samples[0] == samples[1]
    assert [index for index, *_ in samples[0]] == list(range(300))
    assert sorted(answer for _, answer, _ in samples[0][:200]) == list(range(200))


def test_a_stream_keeps_little_and_closes_its_files():
    opened, closed = [], []

    def shard(number, rows):
        opened.append(number)
        try:
            for start in range(0, 1000, rows):
                yield list(range(number * 1000 + start, number * 1000 + start + rows))
        finally:
            closed.append(number)

    stream = ShuffledStream([partial(shard, number) for number in range(30)], seed=0, buffer_size=100)
    stream[25_000]
    assert len(stream._kept) <= 3 and len(opened) - len(closed) <= 10
    assert all(block.order is None for _, block in list(stream._kept)[:-1]), "what is skipped is not shuffled"
    stream.keep(5000)
    read = [stream[position] for position in range(25_000, 29_000)]
    assert [stream[position] for position in range(25_000, 29_000)] == read and len(stream._kept) <= 52
    first = len(opened)
    assert stream[3] == stream.anew()[3] and len(opened) > first
    del stream
    gc.collect()
    assert len(opened) == len(closed)


def test_a_stream_can_be_sent_to_a_process(files):
    stream, _ = open_stream(files("parquet"), seed=1, buffer_size=16)
    assert pickle.loads(pickle.dumps(stream))[150] == stream[150]


def test_a_folder_is_read_by_its_splits(tmp_path):
    for split, start in (("train", 0), ("test", 100)):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "rows.jsonl").write_text(
            lines(row(i) for i in range(start, start + 9)) + "{broken\n"
        )
    path = str(tmp_path / "data")
    stream, convert = open_stream(path, "test")
    assert sum(b"broken" in stream[position] for position in range(10)) == 1
    with pytest.raises(ValueError, match="no split 'val'; it has train, test"):
        open_stream(path, "val")
    datasets.Dataset.from_list([row(0)]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="save_to_disk.* leave streaming out"):
        open_stream(str(tmp_path / "saved"))


def test_what_a_parquet_file_holds_of_pictures(tmp_path):
    images = [[png(i)] for i in range(5)]
    pictures = datasets.Dataset.from_list(
        [{**row(i), "images": [{"bytes": images[i][0], "path": None}]} for i in range(5)],
        features=datasets.Features(
            {
                "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
                "images": datasets.List(datasets.Image()),
            }
        ),
    )
    pictures.to_parquet(tmp_path / "as_images.parquet")
    plain = [{**row(i), "images": images[i]} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "as_bytes.parquet")
    for name in ("as_images", "as_bytes"):
        mixture = open_streamed(str(tmp_path / f"{name}.parquet"), "train", 10, 5, seed=0)
        samples = sorted((mixture[draw] for draw in range(5)), key=said)
        assert [list(s["images"][0].getdata()) for s in samples] == [list(picture(i).getdata()) for i in range(5)]


def test_tar_samples_are_rows_or_captions(tmp_path):
    shown = [{"type": "image"}, {"type": "text", "text": "Which is red?"}, {"type": "image"}]
    messages = [{"role": "user", "content": shown}, {"role": "assistant", "content": "the first"}]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/0.jpg", png(1))
        add(tar, "x/0.txt", "a caption: é".encode())
        add(tar, "x/0.json", b'{"url": "http://x/y.jpg", "similarity": 0.3}')  # as img2dataset has it
        add(tar, "x/1.1.PNG", png(2))
        add(tar, "x/1.0.png", png(3))
        add(tar, "x/1.json", json.dumps({"messages": messages, "images": ["not read"]}).encode())
        add(tar, "x/2.json", json.dumps(row(2)).encode())
        add(tar, "x/3.txt", b"\xff")
        add(tar, "x/3.jpg", png())
        add(tar, "x/4.json", json.dumps(row(4)).encode())
        add(tar, "x/4.mp4", b"film")
    stream, convert = open_stream(str(tmp_path / "a.tar"), buffer_size=1)
    caption, two, text = (normalize_conversation(convert(stream[position])) for position in range(3))
    assert caption[0][1]["content"][0]["text"] == "a caption: é" and len(caption[1]) == 1
    assert convert(stream[0])["chat_template"] == "caption"
    assert [image["bytes"] for image in two[1]] == [png(2), png(3)] and two[0][0]["content"] == shown
    assert text[1] == ["p.png"] and stream_root(str(tmp_path / "a.tar")) == str(tmp_path)
    with pytest.raises(ValueError, match="utf-8"):
        convert(stream[3])
    with pytest.raises(ValueError, match=r"x/4\.mp4 is not read"):
        convert(stream[4])


def test_columns_and_prompts(tmp_path):
    chat = [{"chat": row(i)["messages"], "photos": ["p.png"], "note": "x"} for i in range(3)]
    (tmp_path / "chat.jsonl").write_text(lines(chat))
    stream, convert = open_stream(str(tmp_path / "chat.jsonl"), columns={"messages": "chat", "images": "photos"})
    assert convert(stream[0]).keys() == {"messages", "images", "note"}
    (tmp_path / "prompts.jsonl").write_text(lines([{"prompt": "What?", "completion": "that", "images": []}]))
    stream, convert = open_stream(str(tmp_path / "prompts.jsonl"))
    assert normalize_conversation(convert(stream[0]))[0][1]["content"][0]["text"] == "that"
    with pytest.raises(ValueError, match="first 3 records have no pics, they have chat, photos, note"):
        open_stream(str(tmp_path / "chat.jsonl"), columns={"messages": "chat", "images": "pics"})


def test_broken_lines_are_counted_and_too_many_stop(tmp_path):
    picture().save(tmp_path / "p.png")
    good = [json.dumps(row(i)) for i in range(190)]
    broken = [
        "{not json",
        "[1]",
        "",
        json.dumps({**row(0), "images": ["gone.png"]}),
        json.dumps({**row(0), "tools": ["t"]}),
    ]
    (tmp_path / "few.jsonl").write_text("\n".join(good[:90] + broken + good[90:]))
    mixture = open_streamed(str(tmp_path / "few.jsonl"), "train", 10, 195, seed=0)
    assert {said(mixture[draw]) for draw in range(195)} == set(range(190))
    (skipped,) = mixture.skipped().values()
    # A bad record after another is met by both draws.
    assert 4 <= skipped["malformed record"] <= 7 and 1 <= skipped["missing image"] <= 4 and len(skipped) == 2
    (tmp_path / "many.jsonl").write_text("\n".join(good[:30] + broken * 8))
    with pytest.raises(TooManyBadSamplesError, match="more than max_bad_fraction=0.1"):
        open_streamed(str(tmp_path / "many.jsonl"), "train", 1000, 100, seed=0)


def test_a_file_that_cannot_be_read_on_is_said_with_its_place(tmp_path):
    whole = gzip.compress(lines(row(i) for i in range(50_000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) * 3 // 4])
    stream, _ = open_stream(str(tmp_path / "cut.jsonl.gz"))
    with pytest.raises(
        TooManyBadSamplesError, match=r"cannot be read on behind its first [\d,]+ records .*cut\.jsonl\.gz: EOFError"
    ):
        stream[50_000]


WRONG = {
    "no match": ("gone-*.jsonl", None, {}, "no file matches"),
    "empty": ("a.jsonl", "", {}, "has no records"),
    "json": (
        "a.json",
        "[]",
        {},
        r"files of type json, .*\.parquet and \.tar can be streamed; a \.json file is read as a whole",
    ),
    "csv": ("a.csv", "messages\n1\n", {}, "files of type csv, and .jsonl"),
    "split": ("a.jsonl", lines([row(0)]), {"split": "val"}, "no split 'val'; leave it out"),
    "columns": (
        "a.jsonl",
        '{"question": "x", "answer": "y"}\n',
        {},
        "columns question, answer, but training reads `messages`",
    ),
    "not json": ("a.jsonl", "hello\n", {}, "none of its first 1 records can be trained on.* JSONDecodeError"),
    "user last": ("a.jsonl", lines([{"messages": row(0)["messages"][:1]}]), {}, "ends with the user"),
    "unread": (
        "a.jsonl",
        lines([row(0, photo="x.jpg")]),
        {},
        "column 'photo' with 'x.jpg', which training does not read",
    ),
    "tools": ("a.jsonl", lines([row(0, tools=["t"])]), {}, "record has tools, which training does not read"),
    "no parquet": ("a.parquet", "hello", {}, r"a\.parquet: ArrowInvalid.*repair the file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_streamed_is_said(case, tmp_path):
    name, content, settings, words = WRONG[case]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        open_stream(str(tmp_path / name), **settings)


def test_mixed_types_and_missing_packages_are_said(tmp_path, monkeypatch):
    for name in ("a.jsonl", "b.parquet", "c.jsonl.zst"):
        (tmp_path / name).write_text(lines([row(0)]))
    with pytest.raises(ValueError, match="several types, jsonl, parquet; match one"):
        open_stream(str(tmp_path / "[ab]*"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="zstandard; pip install zstandard"):
        open_stream(str(tmp_path / "c.jsonl.zst"))


def test_streams_join_a_recipe(files, tmp_path):
    path = files("jsonl")
    mine = {"name": "mine", "path": path, "streaming": True, "buffer_size": 40}
    settings = {"data_root": "", "datasets": [], "own": [mine], "balancing": "per-dataset"}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"mixture": settings}))
    mixture = open_mixture(load_recipe(str(tmp_path / "recipe.yaml")), 200)
    samples = [mixture[draw] for draw in range(200)]
    assert sorted(map(said, samples)) == list(range(200)) and samples[0]["images"][0].size == picture().size
    (source,) = mixture.sources
    assert source.size is None and source.records.buffer_size == 40
    state = mixture.state_dict()
    assert state["files"] == {"mine": 5}
    mixture.load_state_dict(json.loads(json.dumps(state)))
    os.unlink(path.replace("*", "0"))
    with pytest.raises(ValueError, match="has files={'mine': 5} and this one has {'mine': 4}"):
        open_mixture(load_recipe(str(tmp_path / "recipe.yaml")), 200).load_state_dict(state)

    def problems(more, **changes):
        with pytest.raises(RecipeError) as error:
            parse_recipe({**settings, **more, "own": [{**mine, **changes}]})
        return str(error.value)

    assert "own mine: buffer_size=0 must be at least 1" in problems({}, buffer_size=0)
    assert "buffer_size=40 is for a stream; add streaming: true" in problems({}, streaming=False)
    assert "eval.mine=0.1: nothing can be kept of a stream" in problems({"eval": {"mine": 0.1}})
    gone = {**settings, "own": [{**mine, "path": str(tmp_path / "gone*.jsonl")}]}
    with pytest.raises(RecipeError, match="mine: dataset .* no file matches"):
        open_mixture(load_recipe(gone), 200)
    plain = {**settings, "own": [{"name": "mine", "path": path}]}
    with pytest.raises(RecipeError, match="does not exist; add streaming: true"):
        load_recipe(plain)


def test_checkpoints_of_mixtures_without_files_still_load():
    source = Source("x", "a", range(9), lambda record, rng: row(record))
    mixture = Mixture([source], np.ones(1), 9)
    assert "files" not in mixture.state_dict()
    mixture.load_state_dict(mixture.state_dict())


def test_images_lie_beside_the_files(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.tar").touch()
    roots = [stream_root(str(tmp_path / name)) for name in ("a/b/x.tar", "a/b/*.tar", "a/*/x.tar", "a/b/x?.tar", "a")]
    assert roots == [*map(str, (tmp_path / "a" / "b", tmp_path / "a" / "b", tmp_path / "a", tmp_path / "a" / "b")), ""]
    assert stream_root("user/name") == stream_root("file:///data/*.tar") == ""


def test_urls_and_formats_of_datasets_are_read_too(files, tmp_path):
    path = files("jsonl.gz")
    assert answers("file://" + path, range(20), seed=1) == answers(path, range(20), seed=1)
    (tmp_path / "lists").mkdir()
    for number in range(3):
        (tmp_path / "lists" / f"{number}.json").write_text(json.dumps([row(number * 10 + i) for i in range(10)]))
    read = answers(str(tmp_path / "lists"), range(60), buffer_size=10)
    assert sorted(read[:30]) == sorted(read[30:]) == list(range(30)) and read[:30] != read[30:]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    picture(3).save(pictures / "a.png")
    (pictures / "metadata.jsonl").write_text(lines([{"messages": row(7)["messages"], "file_name": "a.png"}]))
    mixture = open_streamed(str(pictures), "train", 10, 1, seed=0)
    assert list(mixture[0]["images"][0].getdata()) == list(picture(3).getdata())
