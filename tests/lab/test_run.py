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
from lab.plan import PRESETS, variants_of
from lab.projectors import names_of
from lab.run import compare
from lab.scene_task import scene_tasks
from tests.tiny import REPOSITORY, run_script, sample, save_clip, save_llama, write_dataset

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are killed as on POSIX")
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
    assert "| c-abs | 16 | default |" in report and "| pool-mlp | 144 | 592 |" in report  # the chosen learning rates
    assert "C-Abs is better than average pooling + MLP, at equal tokens and parameters" in report
    assert "| `shuffled` loses everything that `c-abs` knows |" in report
    assert "## Elastic: one c-abs for several M" in report and "| all of them (elastic), 8 steps |" in report
    assert "| a scale and a shift for each M |" in report and "| the largest M teaches |" in report
    for name in ("kinds", "steps", "cpu_time", "tokens", "elastic-c-abs", "looks"):
        assert f"({name}.png)" in report and (whole / f"{name}.png").stat().st_size > 5000
    records = results(whole).values()
    assert {record["projector"] for record in records} == {"pool-mlp", "c-abs", "blind", "shuffled"}
    assert {record["seed"] for record in records} == {0, 1}
    for record in records:
        steps = [point["step"] for point in record["points"]]
        is_main = record["projector"] == "c-abs" and record["num_tokens"] == 16
        expected = [2, 4, 8] if record["trained_at"] else [2, 4, 6] if is_main else [2, 4]
        assert steps == expected
    elsewhere = [record["points"][-1]["elsewhere"] for record in records if record["projector"] == "c-abs"]
    assert {frozenset(each) for each in elsewhere} == {frozenset({"4"}), frozenset()}


def killed_at(folder, reached) -> None:
    """Starts the lab and kills its first process, alone, as soon as something is there; its workers have to notice."""
    command = [sys.executable, str(RUN), *map(str, SMOKE), "--output_dir", str(folder)]
    process = subprocess.Popen(command, start_new_session=True)
    while process.poll() is None and not reached():
        time.sleep(0.02)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        except ProcessLookupError:
            return
    pytest.fail("workers outlive the process that started them")


def without_times(report) -> str:
    """The report but for the columns of CPU time and the claims about it."""
    kept, column = [], None  # of the table that a line is in
    for line in report.read_text().splitlines():
        if "CPU time |" in line or "of the shorter run" in line:
            continue
        cells = line.split("|")
        if " CPU s " in cells:
            column = cells.index(" CPU s ")
        elif not line.startswith("|"):
            column = None
        kept.append("|".join(cells if column is None else cells[:column] + cells[column + 1 :]))
    return "\n".join(kept)


def test_a_killed_run_goes_on(whole, tmp_path):
    """Nothing that was finished is trained again, and the report is that of a run that nobody killed."""
    runs, finished = tmp_path / "smoke-seed0" / "runs", {}
    killed_at(tmp_path, lambda: len(list(runs.glob("*.json"))) >= 5)
    for path in (*(tmp_path / "shared").glob("*.pt"), *runs.glob("*.json")):
        finished[path] = path.stat().st_mtime_ns
    assert 5 + 5 <= len(finished) < 5 + len(list((whole / "runs").glob("*.json")))  # five files of stand-ins
    run_script(RUN, *SMOKE, "--output_dir", tmp_path)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items())
    assert results(tmp_path / "smoke-seed0") == results(whole)
    assert without_times(tmp_path / "smoke-seed0" / "report.md") == without_times(whole / "report.md")
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
        "matched": False,
    }


def test_pretrained_parts_and_a_dataset(parts, tmp_path):
    config = tmp_path / "parts.yaml"
    config.write_text(json.dumps(parts))
    ran = run_script(RUN, "--config", config, "--projectors", "linear,c-abs", "--output_dir", tmp_path / "lab")
    planned = ran.stdout
    assert "linear          16" in planned and "c-abs            4" in planned
    assert "at least 15 runs of 1 steps" in planned
    records = results(tmp_path / "lab" / "parts.yaml-seed0").values()
    assert {record["projector"] for record in records} == {"linear", "c-abs", "shuffled"}
    for record in records:
        right = record["points"][-1]["right"]
        assert right.keys() <= {"colour", "number"} and sum(map(len, right.values())) == 8


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"points": [1]}, "at least two points"),
        ({"num_tokens": 5}, "M = 5 is not a square; use 4 or 9"),
        ({"num_tokens": 16}, "below the number of patches, 16"),
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
        tasks = dataset_tasks(own, preset, 0, str(tmp_path))
        describe(variants_of(["c-abs"], preset, tasks[0]), preset, tasks)


def test_the_shipped_config():
    own, preset = read_config(str(REPOSITORY / "lab" / "real_parts.yaml"))
    assert own.device == "cuda" and preset.points[-1] < preset.long_points[0] and preset.seeds == 3


def test_one_projector_in_one_process(whole, tmp_path):
    """Claims and pictures that need others are left out."""
    preset = PRESETS["smoke"]
    tasks = scene_tasks(preset, 0, str(whole.parent / "shared"))
    variants = variants_of(["linear"], preset, tasks[0])
    with open(compare(variants, preset, tasks, 1, str(tmp_path), "About scenes."), encoding="utf-8") as file:
        report = file.read()
    assert "None that this run can judge" in report and "None of the projectors that are looked into was run" in report


def test_the_plan_of_the_full_preset():
    preset = PRESETS["full"]
    tasks = scene_tasks(preset, 0, "")
    planned = describe(variants_of(names_of(None), preset, tasks[0]), preset, tasks)
    assert "pool-mlp       144          592       85,648" in planned and "then 78 experiments" in planned


def test_a_projector_that_fails_ends_the_run(tmp_path):
    """At once, with its error."""
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from lab.workers import Workers
import time, math
if __name__ == "__main__":
    with Workers(2) as workers:
        workers.do([(time.sleep, (300,)), (math.sqrt, (-1,))], "Calls")
"""
    (tmp_path / "fails.py").write_text(code)
    started = time.monotonic()
    ended = run_script(tmp_path / "fails.py", check=False)
    assert ended.returncode and "math domain error" in ended.stdout or "nonnegative" in ended.stdout
    assert time.monotonic() - started < 200
