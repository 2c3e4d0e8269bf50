# SPDX-License-Identifier: Apache-2.0
"""The mixture: shares, order with workers, ranks and restarts, and what it does with bad records."""

import gc
import itertools
import json
import pickle
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader, SequentialSampler
from transformers import TrainerState
from trl import SFTConfig

from tests.tiny import picture, tiny_model, tiny_processor
from training.collator import HoneybeeDataCollator
from training.recipe.balancing import BALANCINGS, sampling_weights
from training.recipe.callback import MixtureCallback
from training.recipe.config import parse_recipe
from training.recipe.mixture import Mixture, Source, sample_random
from training.recipe.stream import Stream
from training.samples import TooManyBadSamplesError
from training.trainer.trainer import HoneybeeTrainer

SIZES = {"tiny": 7, "small": 900, "medium": 40_000, "large": 160_000, "huge": 3_000_000}
TASKS = {"tiny": "a", "small": "a", "medium": "b", "large": "b", "huge": "b"}


def render(record, rng):
    """A conversation without images, with something drawn in it."""
    return {
        "messages": [
            {"role": "user", "content": f"What is {record}?"},
            {"role": "assistant", "content": f"{record} {rng.random()}"},
        ]
    }


def numbered(name, size, task="a"):
    return Source(name, task, range(size), render)


def stream_of(size, shuffled=False):
    shards = [list(range(start, min(start + 10, size))) for start in range(0, size, 10)]

    def generate(shards):
        for shard in shards:
            for number in shard:
                yield {"number": number}

    stream = datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": shards})
    return stream.shuffle(seed=1, buffer_size=16) if shuffled else stream


def small_mixture(num_samples=5000, seed=3, stream=True):
    sources = [numbered("x", 50), numbered("y", 1000), numbered("z", 20_000)]
    if stream:
        sources.append(Source("s", "b", Stream(stream_of(400, shuffled=True)), render))
    return Mixture(sources, sampling_weights(sources, "per-dataset"), num_samples, seed)


def key(sample):
    return sample["dataset"], sample["index"], sample["messages"][1]["content"][0]["text"]


def read(mixture, workers=0, draws=None, batch_size=8):
    dataset = mixture.as_dataset()
    if draws is not None:
        dataset = dataset.select(draws)
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=lambda batch: batch)
    return [key(sample) for batch in loader for sample in batch]


@pytest.fixture(scope="module")
def first_5000():
    mixture = small_mixture()
    return [key(mixture[draw]) for draw in range(5000)]


# The formulas, written a second time.
EXPECTED = {
    "per-dataset": [0.2] * 5,
    "per-task": [0.25, 0.25, 1 / 6, 1 / 6, 1 / 6],
    "per-sample-100k": [n / 240_907 for n in (7, 900, 40_000, 100_000, 100_000)],
    "per-dataset-tuned": [0.05, 0.0, 0.15, 0.5, 0.3],
}
TUNED = {"tiny": 0.1, "small": 0.0, "medium": 0.3, "large": 1.0, "huge": 0.6}


@pytest.mark.parametrize("balancing", EXPECTED)
def test_observed_shares_are_the_formulas(balancing):
    sources = [numbered(name, size, TASKS[name]) for name, size in SIZES.items()]
    weights = sampling_weights(sources, balancing, TUNED)
    np.testing.assert_allclose(weights, EXPECTED[balancing], atol=1e-12)
    drawn, _ = Mixture(sources, weights, 200_000).schedule(0, 200_000)
    shares = np.bincount(drawn, minlength=5) / 200_000
    assert np.abs(shares - EXPECTED[balancing]).max() < 0.01
    assert (shares[np.array(EXPECTED[balancing]) == 0] == 0).all()


def test_every_record_comes_once_an_epoch_and_anew_ordered():
    sources = [numbered("x", 50), numbered("y", 1000)]
    mixture = Mixture(sources, sampling_weights(sources, "per-dataset"), 200_000)
    drawn, indices = mixture.schedule(0, 200_000)
    for number, source in enumerate(sources):
        read = indices[drawn == number]
        epochs = read[: len(read) // source.size * source.size].reshape(-1, source.size)
        assert len(epochs) > 50
        assert (np.sort(epochs) == np.arange(source.size)).all()
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
        # Where a record stands in an epoch is uniform: the mean over epochs of its place is near the middle.
        places = np.argsort(epochs).mean(axis=0) / (source.size - 1)
        assert np.abs(places - 0.5).max() < 6 * (1 / 12 / len(epochs)) ** 0.5


def test_a_schedule_is_what_is_read(first_5000):
    mixture = small_mixture(200_000)
    for start, stop in ((0, 300), (65_500, 65_600), (131_000, 131_100)):
        drawn, indices = mixture.schedule(start, stop)
        samples = [mixture[draw] for draw in range(start, stop)]
        assert [mixture.sources[n].name for n in drawn] == [s["dataset"] for s in samples]
        assert list(indices) == [s["index"] for s in samples]
    assert [key(mixture[draw]) for draw in range(300)] == first_5000[:300], "the length of a run changes its samples"


def test_samples_depend_on_seed_dataset_index_and_epoch_alone(first_5000):
    for name, index, answer in first_5000[:200]:
        possible = [f"{sample_random(3, name, index, epoch).random()}" for epoch in range(30)]
        assert name == "s" or answer.split()[1] in possible
    other = small_mixture(seed=4)
    assert [key(other[draw]) for draw in range(200)] != first_5000[:200]


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_workers_change_nothing(workers, first_5000):
    assert read(small_mixture(), workers) == first_5000


@pytest.mark.parametrize("workers", [0, 2])
def test_restarting_at_1237_changes_nothing(workers, first_5000):
    assert read(small_mixture(), workers, range(1237, 5000)) == first_5000[1237:]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_share_the_batches_of_one(workers, first_5000):
    ranks = []
    for rank in range(2):
        loader = DataLoader(
            small_mixture().as_dataset(), batch_size=4, num_workers=workers, collate_fn=lambda batch: batch
        )
        loader = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        ranks.append([[key(sample) for sample in batch] for batch in loader])
    together = [sample for batches in zip(*ranks) for batch in batches for sample in batch]
    assert together == first_5000
    # x alone repeats, after an epoch; as draws, no sample is in both.
    assert sum(len(batch) for batch in ranks[0]) == sum(len(batch) for batch in ranks[1]) == 2500
    once = [{s for batch in rank for s in batch if s[0] == "z"} for rank in ranks]
    assert once[0] and once[1] and not once[0] & once[1]


def test_a_stream_that_is_dropped_closes_its_files_at_once():
    class Records:
        open = 0

        def __iter__(self):
            Records.open += 1
            try:
                yield from range(9)
            finally:
                Records.open -= 1

    gc.collect()
    gc.disable()
    try:
        stream = Stream(Records())
        assert stream[12] == 3 and Records.open == 1
        assert stream[2] == 2 and Records.open == 1, "read anew"
        del stream
        assert Records.open == 0
    finally:
        gc.enable()


def test_a_stream_goes_on_shuffled_anew_and_can_be_read_at_any_position():
    stream = Stream(stream_of(30, shuffled=True))
    read = [stream[position]["number"] for position in range(90)]
    epochs = [read[start : start + 30] for start in (0, 30, 60)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [stream[position]["number"] for position in (89, 88, 3, 2, 70)] == [read[p] for p in (89, 88, 3, 2, 70)]
    assert pickle.loads(pickle.dumps(Stream(list(range(9)))))[12] == 3
    with pytest.raises(RuntimeError, match="no records"):
        Stream([])[0]


def with_images(root, kinds):
    """A source whose record `i` is spoilt as `kinds[i]` says."""
    good = root / "good.png"
    picture().save(good)
    (root / "corrupt.png").write_bytes(good.read_bytes()[:-200])
    (root / "text.png").write_text("not an image")
    Image.new("L", (300, 300)).save(root / "bomb.png")

    def render(kind, rng):
        answer = "" if kind == "empty" else f"a dog {rng.random()}"
        if kind == "malformed":
            return {"messages": [{"role": "user", "content": {}["no_such"]}]}
        image = f"{kind}.png" if kind in ("corrupt", "text", "bomb", "absent") else "good.png"
        messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]
        if kind == "user_last":
            messages.pop()
        return {"messages": messages, "images": [image]}

    return Source("p", "a", kinds, render, str(root))


def test_bad_records_are_replaced_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    kinds = ["good"] * 93 + ["corrupt", "text", "bomb", "absent", "empty", "malformed", "user_last"]
    source = with_images(tmp_path, kinds)
    mixtures = [Mixture([source], np.ones(1), 1000) for _ in range(2)]
    sequences = [read(mixture, workers) for mixture, workers in zip(mixtures, (0, 2))]
    assert sequences[0] == sequences[1]
    assert len(sequences[0]) == 1000 and all(kinds[index] == "good" for _, index, _ in sequences[0])
    for mixture in mixtures:
        skipped = mixture.skipped()["p"]
        once = {
            "corrupt image": 20, "decompression bomb": 10, "missing image": 10, "empty answer": 10,
            "malformed record": 10, "malformed conversation": 10,
        }  # fmt: skip
        # 10 epochs; a bad record after another is met by both draws.
        assert skipped.keys() == once.keys() and all(once[r] <= n <= once[r] + 6 for r, n in skipped.items()), skipped
        assert f"p: {skipped['missing image']} missing image, {skipped['corrupt image']} corrupt" in mixture.report()
    again = Mixture([source], np.ones(1), 1000)
    again.load_state_dict(json.loads(json.dumps(mixtures[1].state_dict())))
    assert again.skipped() == mixtures[1].skipped()
    with pytest.raises(ValueError, match="seed=0 and this one has 1"):
        Mixture([source], np.ones(1), 1000, seed=1).load_state_dict(mixtures[1].state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_records_stop_with_the_counts(workers, tmp_path):
    source = with_images(tmp_path, ["good"] * 70 + ["corrupt"] * 20 + ["absent"] * 10)
    mixture = Mixture([source], np.ones(1), 1000, max_bad_fraction=0.2)
    with pytest.raises(TooManyBadSamplesError, match=r"p: \d+ missing image, \d+ corrupt image.* max_bad_fraction"):
        read(mixture, workers)
    used, _, unusable, *reasons = mixture._counts.clone().sum(0)[0].tolist()
    # A worker that still reads may stand between the count of a record and that of its reason.
    assert 20 <= used + unusable < 400 and abs(unusable - sum(reasons)) <= workers
    counts = mixture.skipped()["p"]
    assert counts["corrupt image"] > counts["missing image"]


def test_what_is_held_out_is_read_again_and_again(tmp_path):
    good = with_images(tmp_path, ["good"] * 20)
    few_bad = with_images(tmp_path, ["good"] * 16 + ["absent"] * 4).records
    (evaluated,) = Mixture([replace(good, held_out=few_bad)], np.ones(1), 10).held_out().values()
    rounds = [[evaluated[draw]["index"] for draw in range(20)] for _ in range(8)]
    assert all(each == rounds[0] for each in rounds) and len(set(rounds[0])) == 16
    all_bad = with_images(tmp_path, ["absent"] * 5).records
    (evaluated,) = Mixture([replace(good, held_out=all_bad)], np.ones(1), 10).held_out().values()
    with pytest.raises(TooManyBadSamplesError, match="none of 101 records of p in a row"):
        evaluated[0]


def test_a_stream_may_have_many_bad_records_in_a_row(tmp_path):
    source = with_images(tmp_path, ["good"] * 900 + ["absent"] * 150 + ["good"] * 50)
    mixture = Mixture([replace(source, records=Stream(source.records))], np.ones(1), 940, max_bad_fraction=0.2)
    assert [mixture[draw]["index"] for draw in range(901)] == [*range(900), 1050]
    assert mixture.skipped()["p"] == {"missing image": 150}


def test_a_source_with_nothing_usable_ends(tmp_path):
    mixture = Mixture([with_images(tmp_path, ["absent"])], np.ones(1), 10, max_bad_fraction=0.9)
    with pytest.raises(TooManyBadSamplesError, match="37 of 37 records of p"):
        mixture[0]


def test_reading_ahead_gives_the_same_samples_from_streams_of_its_own():
    mixture = small_mixture()
    ahead = mixture.read_ahead(500)
    streams = [one.sources[-1].records for one in (mixture, ahead)]
    seen = [key(ahead.glance(draw)) for draw in range(300)]
    assert [stream._next > 0 for stream in streams] == [False, True]
    assert seen == [key(mixture[draw]) for draw in range(300)]
    assert streams[0].look_back == 500 > streams[1].look_back


def test_a_balancing_is_a_function_and_a_name(monkeypatch):
    monkeypatch.setitem(BALANCINGS, "by-name", lambda sources, tuned: [len(source.name) for source in sources])
    recipe = parse_recipe({"data_root": "", "balancing": "by-name"})
    sources = [numbered("x", 3), numbered("yyy", 3)]
    assert sampling_weights(sources, recipe.balancing, recipe.weights).tolist() == [0.25, 0.75]


def test_mixtures_that_cannot_be():
    with pytest.raises(ValueError, match="x: a name is there twice"):
        Mixture([numbered("x", 3), numbered("x", 4)], np.ones(2) / 2, 10)
    with pytest.raises(ValueError, match="no records in x"):
        Mixture([numbered("x", 0)], np.ones(1), 10)
    with pytest.raises(ValueError, match="none for y"):
        sampling_weights([numbered("x", 1), numbered("y", 1)], "per-dataset-tuned", {"x": 1.0})
    for weights in ({"x": 0.0}, {"x": -1.0}, {"x": float("nan")}):
        with pytest.raises(ValueError, match="no distribution"):
            sampling_weights([numbered("x", 1)], "per-dataset-tuned", weights)
    with pytest.raises(ValueError, match="per-task"):
        sampling_weights([numbered("x", 1)], "by-size")
    with pytest.raises(IndexError, match="10"):
        Mixture([numbered("x", 3)], np.ones(1), 10)[10]


def train(folder, source, max_steps, checkpoint=None, workers=0, max_bad_fraction=0.1):
    """Trains the projector of a tiny model; the trainer, the mixture and the samples of each batch."""
    mixture = Mixture([source, numbered("n", 40)], np.array([0.8, 0.2]), 2 * max_steps, max_bad_fraction=max_bad_fraction)  # fmt: skip
    collator, seen = HoneybeeDataCollator(tiny_processor()), []

    def collate(batch):
        seen.append([key(sample) for sample in batch])
        return collator(batch)

    args = SFTConfig(
        output_dir=str(folder), max_steps=max_steps, per_device_train_batch_size=2, save_steps=3, logging_steps=1,
        learning_rate=1e-3, report_to="none", use_cpu=True, bf16=False, dataloader_num_workers=workers,
        remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=False,
        disable_tqdm=True, gradient_checkpointing=False, lr_scheduler_type="constant",
    )  # fmt: skip
    dataset = mixture.as_dataset()
    trainer = HoneybeeTrainer(
        model=tiny_model(config={"image_token_id": tiny_processor().image_token_id}), args=args, data_collator=collate, train_dataset=dataset,
        processing_class=tiny_processor(), callbacks=[MixtureCallback(mixture, checkpoint)], sampler=SequentialSampler(dataset),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, mixture, seen


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_training_resumes_with_the_next_sample(tmp_path):
    source = with_images(tmp_path, ["good"] * 33)
    whole, _, seen = train(tmp_path / "whole", source, 12)
    expected = Mixture([source, numbered("n", 40)], np.array([0.8, 0.2]), 24)
    assert list(itertools.chain(*seen))[:24] == [key(expected[draw]) for draw in range(24)]
    resumed, _, rest = train(tmp_path / "again", source, 12, str(tmp_path / "whole" / "checkpoint-6"))
    assert rest == seen[6:]
    np.testing.assert_allclose(losses(resumed)[-6:], losses(whole)[-6:], rtol=1e-6)
    other = with_images(tmp_path, ["good"] * 34)
    with pytest.raises(ValueError, match="another mixture|the checkpoint's mixture"):
        train(tmp_path / "other", other, 12, str(tmp_path / "whole" / "checkpoint-6"))
    TrainerState().save_to_json(str(tmp_path / "trainer_state.json"))
    with pytest.raises(ValueError, match="without a mixture"):
        MixtureCallback(expected, str(tmp_path))


def test_training_goes_through_3_percent_of_corrupt_images_and_stops_at_30(tmp_path, caplog):
    source = with_images(tmp_path, ["good"] * 29 + ["corrupt"])
    with caplog.at_level("INFO"):
        trainer, mixture, _ = train(tmp_path / "few", source, 12, workers=2, max_bad_fraction=0.2)
    assert trainer.state.global_step == 12
    assert Counter(mixture.skipped()["p"]).total() >= 1
    assert "Records skipped (process 0): p: 1 corrupt image" in caplog.text
    source = with_images(tmp_path, ["good"] * 7 + ["corrupt"] * 3)
    with pytest.raises(TooManyBadSamplesError, match="p: .* corrupt image"):
        train(tmp_path / "many", source, 30, workers=2)


def test_batches_of_the_mixture_are_the_collators(tmp_path):
    mixture = Mixture([with_images(tmp_path, ["good"] * 5)], np.ones(1), 4)
    collator = HoneybeeDataCollator(tiny_processor())
    (batch,) = DataLoader(mixture.as_dataset(), batch_size=4, collate_fn=collator)
    assert batch["pixel_values"].shape[0] == 4 and torch.isfinite(batch["pixel_values"]).all()
