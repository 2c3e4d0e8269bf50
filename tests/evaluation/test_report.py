# SPDX-License-Identifier: Apache-2.0
"""Averages and the paper's rows."""

import json

import pytest

from evaluation.report import (
    PAPER_MODELS,
    PAPER_SPATIAL,
    SPATIAL,
    build,
    check_output,
    main_average,
    number,
    paper_model,
    spatial_average,
    write,
)
from modeling_honeybee import HoneybeeConfig
from tests.tiny import clip_config, llama_config, tiny_config

PUBLISHED_AVERAGES = {
    "resampler, 144 tokens": 43.9,
    "C-Abs, 144 tokens": 53.5,
    "linear, 256 tokens": 52.6,
    "C-Abs, 256 tokens": 56.3,
}


@pytest.mark.parametrize("name", PAPER_SPATIAL)
def test_avgn_of_the_papers_rows(name):
    average = spatial_average(dict(zip(SPATIAL, PAPER_SPATIAL[name])))
    assert number(average) == str(PUBLISHED_AVERAGES[name])


def scores(**summaries):
    return {
        task: {"questions": 4, "summary": summary, "quirks": {}, "notes": [], "details": {}, "model": None}
        for task, summary in summaries.items()
    }


def test_averages_from_the_tasks(tmp_path):
    tasks = scores(
        mme={"total": 1800.0, "perception": 1500.0, "cognition": 300.0, "perception/position": 135.0},
        mmbench={
            "total_acc": 70.0,
            "finegrained_perception (cross-instance)/spatial_relationship": 24.4,
            "finegrained_perception (instance-level)/object_localization": 54.3,
            "relation_reasoning/physical_relation": 66.7,
        },
        seed={"total": 65.0, "spatial_relation": 49.0, "instance_location": 58.8},
    )
    report = build(tasks, "mine", None)
    assert report["averages"]["AvgN"] == pytest.approx(53.45)
    assert report["averages"]["main"] == main_average(70.0, 65.0, 1500.0) == 70.0
    for task, content in tasks.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / "scores.json").write_text(json.dumps(content))
    write(tmp_path, "mine", "7B-C-Abs-M144")
    text = (tmp_path / "report.md").read_text()
    assert "| mine | 70.0 | 1800.0 | 65.0 | - | 70.0 |" in text
    assert "| paper, 7B-C-Abs-M144 | 70.1 | 1891.3 | 64.5 | 67.1 | - |" in text
    assert (tmp_path / "spatial.png").read_bytes().startswith(b"\x89PNG")
    check_output(tmp_path, None)
    with pytest.raises(ValueError, match="give another --output"):
        check_output(tmp_path, "another")


def test_averages_wait_for_all_their_tasks():
    report = build(scores(seed={"total": 65.0, "spatial_relation": 49.0, "instance_location": 58.8}), None, None)
    assert report["averages"] == {"AvgN": None, "main": None}
    assert report["spatial"] == {"SEED SR": 49.0, "SEED IL": 58.8}


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_published_models_are_known_by_their_shape(name, tmp_path):
    size, projector, tokens = name.split("-", 1)[0], name.split("-M")[0].split("-", 1)[1], int(name.split("-M")[1])
    width, depth = (4096, 32) if size == "7B" else (5120, 40)
    config = HoneybeeConfig(
        clip_config(image_size=224 if size == "7B" else 336, patch_size=14),
        llama_config(hidden_size=width, num_hidden_layers=depth, num_attention_heads=32 if size == "7B" else 40),
        {"projector_type": projector.lower(), "num_query_tokens": tokens},
        image_token_id=299,
    )
    config.save_pretrained(tmp_path)
    assert paper_model(tmp_path) == name


def test_any_other_model_has_no_row(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert paper_model(tmp_path) is None
