# SPDX-License-Identifier: Apache-2.0
"""What the preview prints and writes, on small sources."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from processing.processing_honeybee import SYSTEM_BASE
from tests.tiny import REPOSITORY, picture, run_script, tiny_processor
from training import preview
from training.collator import HoneybeeDataCollator
from training.quickstart import recipe_data
from training.recipe.mixture import Source
from training.recipe.stream import Stream


def question(record, rng):
    if record["answer"] is None:
        raise ValueError("no answer")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["question"]}]},
        {"role": "assistant", "content": [{"type": "text", "text": record["answer"]}]},
    ]
    return {"messages": messages, "images": [record["image"]]}


def caption(record, rng):
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": record["caption"]}]
    return {"messages": messages, "images": [record["image"]], "chat_template": "caption"}


@pytest.fixture
def sources(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("not an image")
    questions = [
        {"question": "Is <image> & <b>it</b> red?", "answer": "yes", "image": "a.png"},
        {"question": "How many?", "answer": None, "image": "a.png"},
        {"question": "What?", "answer": "a dog", "image": "b.png"},
    ]
    captions = [{"caption": "the old bridge", "image": {"path": "0.jpg", "bytes": b"no"}}]
    return [
        Source("vqav2", "vqa-open", questions, question, str(tmp_path)),
        Source("coyo", "captioning", Stream(captions), caption),
    ]


def show(sources, *arguments):
    args = preview.parse_arguments(["--config", "unused", "--samples", "1000", *map(str, arguments)])
    preview.preview(sources, np.array([0.9, 0.1]), 0, args, preview.load_processor(args))


def test_table_and_conversations(sources, capsys):
    show(sources)
    out = capsys.readouterr().out
    assert "vqav2    vqa-open          3  0.9000    900  300.00" in out
    assert "coyo     captioning   stream  0.1000    100       -" in out
    assert f"--- vqav2 0 a.png\n{SYSTEM_BASE}\nHuman: <image>\nHuman: Is <image> & <b>it</b> red?\nAI: «yes»\n" in out
    assert "--- coyo 0 0.jpg\n<image>«the old bridge»\n" in out
    assert "Skipped in vqav2: 1 malformed record" in out


def test_learned_text_is_green_in_a_terminal(sources, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show(sources)
    assert "AI: \033[32myes\033[0m" in capsys.readouterr().out


def test_jsonl(sources, tmp_path, capsys):
    show(sources, "--jsonl", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["dataset"], line["index"], line["image"]) for line in lines] == [
        ("vqav2", 0, "a.png"), ("vqav2", 2, "b.png"), ("coyo", 0, "0.jpg"),
    ]  # fmt: skip
    assert lines[1]["text"] == f"{SYSTEM_BASE}\nHuman: <image>\nHuman: What?\nAI: a dog"
    assert lines[1]["messages"][1] == {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}
    assert set(lines[0]) == {"dataset", "index", "messages", "image", "text"}
    show(sources, "--jsonl", tmp_path / "out.jsonl", "--limit", 1)
    assert "Wrote 2 samples" in capsys.readouterr().out


def test_captions_are_written_as_the_official_code_does(sources, tmp_path):
    show(sources, "--jsonl", tmp_path / "out.jsonl", "--epochs", 2)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 2, 0, 2, 0, 0]
    assert lines[-1]["text"] == "[NO_PROMPT] <image> the old bridge"


def test_without_arguments_it_makes_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    preview.main([])
    out = capsys.readouterr().out
    assert "in a run of 1,600 samples" in out and "Skipped" not in out
    assert all(f"--- {name} 1 " in out for name in recipe_data.DATASETS)
    page = (tmp_path / "outputs" / "recipe" / "preview.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 14 and 'class="no"' not in page
    assert page.count("no image") == 2, "of ShareGPT"
    cached = set((tmp_path / "cache").rglob("*.arrow"))
    preview.main([])
    assert cached and set((tmp_path / "cache").rglob("*.arrow")) == cached, (
        "made anew, the recipe's files are cached anew"
    )


def test_the_length_of_the_run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{max_steps: 10, per_device_train_batch_size: 4, gradient_accumulation_steps: 2}")
    assert preview.run_length(preview.run_settings(str(path)), processes=3) == 240
    path.write_text("mixture: {}")
    assert preview.run_length(preview.run_settings(str(path)), processes=3) == 4000 * 128


def test_page(sources, tmp_path):
    show(sources, "--html", tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "Is &lt;image&gt; &amp; &lt;b&gt;it&lt;/b&gt; red?" in page
    assert "<mark>yes</mark>" in page and "<mark>the old bridge</mark>" in page
    assert page.count('<img src="data:image/jpeg;base64,') == 1
    assert page.count('class="no">corrupt image') == 2
    assert "<td>vqav2<td>vqa-open<td>3<td>0.9000" in page


def test_mean_tokens_are_the_collators(sources, tmp_path, capsys):
    processor = tiny_processor()
    processor.save_pretrained(tmp_path / "processor")
    show(sources, "--processor", tmp_path / "processor")
    batch = HoneybeeDataCollator(processor).tokenize(
        [(sample["messages"], "default") for sample in preview.samples_of(sources[0], 0, preview.Counter())]
    )
    mean = np.mean([len(row["input_ids"]) for row in batch])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("vqav2"))
    assert row.split()[-2:] == ["300.00", f"{mean:.0f}"]


def test_a_start_of_training_loads_nothing_of_the_preview():
    command = "import sys, training.run.launch; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    loaded = set(result.stdout.split())
    assert "training.recipe.table" in loaded
    assert not loaded & {"training.preview", "training.recipe.page", "training.quickstart.digit_scenes"}


def test_errors_end_the_script_with_all_problems(tmp_path):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"mixture": {"data_root": "no/such", "balancing": "fair"}}))
    result = run_script(
        REPOSITORY / "training" / "preview.py", "--config", tmp_path / "x.yaml", check=False,
        env={"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert result.returncode == 1
    assert "x.yaml: 2 problems" in result.stdout and "no/such" in result.stdout and "'fair'" in result.stdout
