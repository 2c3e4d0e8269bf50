# SPDX-License-Identifier: Apache-2.0
"""The same benchmark through lmms-eval and through run.py. Needs lmms-eval, which no extra has (docs/evaluation.md)."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, Features, Image, Value

from evaluation.run import main
from evaluation.task import read_task
from evaluation.tasks import TASKS
from tests.evaluation.make_data_root import make_data_root
from tests.evaluation.test_run import save_model
from tests.tiny import run_script

lmms_eval = pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")


def test_mme_offline(tmp_path):
    save_model(tmp_path / "model")
    make_data_root(tmp_path / "data")
    keys = ("question_id", "question", "answer", "category")
    rows = []
    for question in read_task(TASKS["mme"], tmp_path / "data"):
        fields = question.fields
        name = f"{fields['dataset_name']}/{fields['image_id']}"
        row = dict(zip(keys, (name, fields["question"], fields["answer"], fields["dataset_name"])))
        rows.append({**row, "image": fields["image_path"]})
    features = Features({**dict.fromkeys(keys, Value("string")), "image": Image()})
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "mme.parquet"))
    task = {
        "include": str(Path(lmms_eval.__file__).parent / "tasks" / "mme" / "mme.yaml"),
        "task": "mme_offline",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "mme.parquet")}},
        "generation_kwargs": {"max_new_tokens": 20},
        "lmms_eval_specific_kwargs": {
            "default": {"pre_prompt": "Answer the question using a single word or phrase. ", "post_prompt": ""}
        },
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mme_offline.yaml").write_text(yaml.safe_dump(task))
    options = [
        "--model",
        "honeybee",
        "--model_args",
        f"pretrained={tmp_path / 'model'},dtype=float32",
        "--device",
        "cpu",
    ]
    options += ["--tasks", "mme_offline", "--include_path", tmp_path / "tasks", "--batch_size", "8"]
    run_script("-m", "lmms_eval", *options, "--log_samples", "--output_path", tmp_path / "lmms", python=sys.executable)
    (samples,) = (tmp_path / "lmms").rglob("*samples_mme_offline.jsonl")
    theirs = {s["doc_id"]: s["filtered_resps"] for s in map(json.loads, samples.read_text().splitlines())}

    options = ["--model", str(tmp_path / "model"), "--data_root", str(tmp_path / "data"), "--dtype", "float32"]
    main([*options, "--tasks", "mme", "--output", str(tmp_path / "ours")])
    ours = [
        json.loads(line)["pred"] for line in (tmp_path / "ours" / "mme" / "predictions.jsonl").read_text().splitlines()
    ]
    assert len(theirs) == len(ours) == 56
    assert [theirs[number].strip() for number in range(56)] == [text.strip() for text in ours]
    (results,) = (tmp_path / "lmms").rglob("*results.json")
    scores = json.loads(results.read_text())["results"]["mme_offline"]
    summary = json.loads((tmp_path / "ours" / "mme" / "scores.json").read_text())["summary"]
    for part in ("perception", "cognition"):
        assert scores[f"mme_{part}_score,none"] == pytest.approx(summary[part])
