# SPDX-License-Identifier: Apache-2.0
"""The lab as a user runs it: `lab/run.py`, also killed, with a projector of one's own, and on pretrained parts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lab.dataset_task import dataset_tasks, read_config
from lab.dry_run import describe
from tests.tiny import REPOSITORY, run_script, sample, save_clip, save_llama, write_dataset

RUN = REPOSITORY / "lab" / "run.py"
SMOKE = ["--preset", "smoke", "--projectors", "pool-mlp,c-abs", "--processes", 2]


def results(folder) -> dict:
    """By name, what was found, without the times."""
    found = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        for point in record["points"]:
            assert point.pop("cpu_seconds") > 0
        found[record["name"]] = record
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_script(RUN, *SMOKE, "--output_dir", folder)
    return folder / "smoke-seed0"


def test_what_a_run_leaves(whole):
    report = (whole / "report.md").read_text()
    assert "With fewer than 3 every claim is undecided" in report and "**supported**" not in report
    assert "C-Abs is better than average pooling + MLP, at equal tokens and parameters" in report
    assert "`shuffled` falls to `blind`" in report
    for name in ("kinds", "steps", "cpu_time", "tokens", "looks"):
        assert f"({name}.png)" in report and (whole / f"{name}.png").stat().st_size > 5000
    records = results(whole).values()
    assert {record["projector"] for record in records} == {"pool-mlp", "c-abs", "blind", "shuffled"}
    assert {record["seed"] for record in records} == {0, 1}
    for record in records:
        steps = [point["step"] for point in record["points"]]
        assert steps == ([2, 4, 6] if record["projector"] == "c-abs" and record["num_tokens"] == 16 else [2, 4])
    elsewhere = [record["points"][-1]["elsewhere"] for record in records if record["projector"] == "c-abs"]
    assert {frozenset(each) for each in elsewhere} == {frozenset({"4", "36"}), frozenset()}


def test_a_killed_run_goes_on(whole, tmp_path):
    """Nothing that was finished is trained again, and the report is that of a run that nobody killed."""
    process = subprocess.Popen(
        [sys.executable, str(RUN), *map(str, SMOKE), "--output_dir", str(tmp_path)], start_new_session=True
    )
    runs = tmp_path / "smoke-seed0" / "runs"
    while process.poll() is None and len(list(runs.glob("*.json"))) < 5:
        time.sleep(0.02)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)  # it alone: its workers have to notice
    process.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        except ProcessLookupError:
            break
    else:
        pytest.fail("workers outlive the process that started them")
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert 5 <= len(finished) < len(list((whole / "runs").glob("*.json")))
    run_script(RUN, *SMOKE, "--output_dir", tmp_path)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items())
    assert results(tmp_path / "smoke-seed0") == results(whole)
    assert not list(runs.glob("*.state")) and not list(runs.glob("*.part"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict:
    """Settings of a file for `--config`, with parts and data on this disk."""
    folder = tmp_path_factory.mktemp("parts")
    samples = [{**sample(i), "kind": ("colour", "number")[i % 2]} for i in range(40)]
    return {
        "vision_tower": save_clip(folder / "vision"),
        "language_model": save_llama(folder / "text"),
        "data": str(write_dataset(folder, samples)),
        "images": [20, 8, 8],
        "seeds": 1,
        "num_tokens": 4,
        "curve": [],
        "points": [1, 2],
        "long": [],
        "search_steps": 1,
        "controls": False,
    }


def test_pretrained_parts_and_a_dataset(parts, tmp_path):
    config = tmp_path / "parts.yaml"
    config.write_text(json.dumps(parts))
    planned = run_script(RUN, "--config", config, "--dry_run", "--projectors", "linear,c-abs").stdout
    assert "linear          16" in planned and "c-abs            4" in planned
    assert "at least 10 runs of 1 steps" in planned
    run_script(RUN, "--config", config, "--projectors", "linear,c-abs", "--output_dir", tmp_path / "lab")
    records = results(tmp_path / "lab" / "parts-seed0").values()
    assert {record["projector"] for record in records} == {"linear", "c-abs"}
    for record in records:
        assert {kind: len(right) for kind, right in record["points"][-1]["right"].items()}.keys() <= {
            "colour",
            "number",
        }
        assert sum(map(len, record["points"][-1]["right"].values())) == 8


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"points": [1]}, "at least two numbers of steps"),
        ({"num_tokens": 5}, "M = 5 is not a square; use 4 or 9"),
        ({"num_tokens": 25}, "above the number of patches, 16"),
        ({"images": [20, 8, 80]}, r"has 40 samples and images=\[20, 8, 80\] takes 108"),
        ({"curve": "4"}, "curve='4' is no"),
        ({"dtype": "int8"}, "dtype='int8' is no"),
        ({"steps": 3}, "unknown settings steps; known are"),
        ({"data": "none.jsonl"}, "does not exist"),
        ({"vision_tower": None}, "vision_tower=None is no"),
    ],
)
def test_wrong_settings_of_pretrained_parts(parts, tmp_path, wrong, sentence):
    config = tmp_path / "parts.yaml"
    config.write_text(json.dumps({**parts, **wrong}))
    with pytest.raises((ValueError, OSError), match=sentence):
        own, preset = read_config(str(config))
        describe(["c-abs"], preset, dataset_tasks(own, preset, 0, str(tmp_path)))


def test_unknown_projectors_are_named():
    ended = run_script(RUN, "--projectors", "mine", check=False)
    assert ended.returncode == 1 and "error: --projectors: mine unknown; known are linear, mlp" in ended.stdout
