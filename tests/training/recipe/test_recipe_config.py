# SPDX-License-Identifier: Apache-2.0
"""The recipe's settings: the shipped ones, the paper's rows as overrides of them, and what is said of wrong ones."""

import subprocess
import sys

import pytest
import yaml

from tests.tiny import REPOSITORY
from training.recipe.catalogue import DATASETS, TASKS
from training.recipe.config import Recipe, RecipeError, load_recipe, parse_recipe

FOLDER = REPOSITORY / "training" / "configs" / "recipes"
SETTINGS = yaml.safe_load((FOLDER / "recipe.yaml").read_text())["mixture"]
ROWS = yaml.safe_load((FOLDER / "paper_rows.yaml").read_text())


def test_settings_are_read_without_the_libraries_that_read_data():
    command = "import sys, training.recipe.config; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    loaded = set(result.stdout.split())
    assert "training.recipe.catalogue" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "pyarrow", "PIL", "processing", "training.recipe.mixture"}


def changed(recipe):
    base = vars(parse_recipe(SETTINGS))
    return {name: value for name, value in vars(recipe).items() if value != base[name]}


def test_the_shipped_recipe_spells_out_the_defaults():
    recipe = parse_recipe(SETTINGS)
    assert recipe == Recipe(data_root="data")
    assert set(SETTINGS) == set(vars(recipe))
    assert set(recipe.weights) == set(recipe.datasets) == set(DATASETS) - {"blip"}
    assert sum(recipe.weights.values()) == pytest.approx(1.003)
    assert recipe.chosen() == recipe.datasets


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['axis']}-{row['row']}")
def test_each_row_of_the_paper_is_one_override(row):
    override = row["override"]
    recipe = parse_recipe(SETTINGS, [override] if override else [])
    assert len(changed(recipe)) == (1 if override else 0)
    assert recipe.chosen()


def test_the_rows_cover_every_axis_and_value():
    overrides = [row["override"] for row in ROWS]
    assert len(set(overrides)) == len(overrides)
    recipes = [parse_recipe(SETTINGS, [override] if override else []) for override in overrides]
    scores = {row["override"]: row.get("average") for row in ROWS}
    assert {r.balancing for r in recipes} == {"per-dataset", "per-task", "per-sample-100k", "per-dataset-tuned"}
    assert {r.identifiers for r in recipes} == {"none", "dataset-name", "task-name"}
    assert {r.granularity for r in recipes} == {"fine", "coarse"}
    assert {r.diversity for r in recipes} == {"single", "multi", "multi+flip"}
    assert {frozenset(TASKS) - {DATASETS[n].task for n in r.chosen()} for r in recipes} >= {
        frozenset([t]) for t in TASKS
    }
    assert scores["balancing=per-task"] == 67.4 and scores["turns.deduplicate={}"] == 69.6 and scores[None] == 70.6


def test_the_documentation_lists_every_row():
    text = (REPOSITORY / "docs" / "recipe.md").read_text(encoding="utf-8")
    for row in ROWS:
        override = f"`{row['override']}`" if row["override"] else "none"
        assert f"| {row['axis']} | {row['row']} | {override} | {row.get('average', '')} |" in text


def test_combination():
    def chosen(*overrides):
        return parse_recipe(SETTINGS, list(overrides)).chosen()

    assert chosen("one_dataset_per_task=true") == ["coyo", "vqav2", "sqa", "refcoco", "llava150k", "sharegpt"]
    assert chosen("one_dataset_per_task=true", "exclude=[vqav2, text-instruction]") == [
        "coyo", "gqa", "sqa", "refcoco", "llava150k",
    ]  # fmt: skip
    own = "own=[{name: mine, path: someone/mine, task: captioning}]"
    assert chosen("datasets=[vsr]", own, "weights={vsr: 1, mine: 2}") == ["vsr", "mine"]
    assert parse_recipe(SETTINGS, ["weights.vsr=3"]).weights["vsr"] == 3.0


WRONG = """
learning_rate: 1.0
mixture:
  data_root: no/such/folder
  datasets: [vqav2, gqa, vqav2, cocoqa]
  balanceing: per-task
  balancing: by-size
  weights: {vqav2: -1, gqa: many, nobody: 1}
  seed: 1
  seed: 2
  granularity: 3
  exclude: [everything]
  turns: {max_turns: {vqav2: 0}, keep: last, key: answer}
  own:
    - {name: mine, path: ./no_such.jsonl, columns: {chat: messages}}
    - {name: nameless}
  max_bad_fraction: 3
"""


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG)
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path))
    text = str(error.value)
    assert text.startswith(f"{path}: {len(error.value.problems)} problems")
    for words in (
        ["unknown setting balanceing", "balancing, "],
        ["balancing='by-size'", "per-sample-100k"],
        ["'vqav2' is named 2 times"],
        ["'cocoqa' is unknown", "aokvqa"],
        ["weights.vqav2=-1.0", "at least 0"],
        ["weights.gqa='many' must be a number"],
        ["weights='nobody' is unknown"],
        ["granularity=3 must be text"],
        ["exclude='everything'", "vqa-open"],
        ["unknown setting turns.key", "turns.keep"],
        ["own mine: columns='chat'", "completion"],
        ["own[1].path is missing"],
        ["max_bad_fraction=3.0", "less than 1"],
        ["'seed' is there twice (line 10)"],
        ["data_root 'no/such/folder' is not a folder"],
        ["path './no_such.jsonl' does not exist"],
    ):
        assert any(all(word in problem for word in words) for problem in error.value.problems), (words, text)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["weights={vsr: 0, gqa: 0}", "datasets=[vsr, gqa]"], ["weights of vsr, gqa are all 0"]),
        (["weights={vsr: 1}", "datasets=[vsr, gqa]"], ["none for gqa"]),
        (["weights={vsr: .nan}", "datasets=[vsr]"], ["finite"]),
        ([f"exclude=[{', '.join(TASKS)}]"], ["no dataset is left"]),
        (["own=[{name: vsr, path: x/y}]"], ["'vsr' is named 2 times"]),
        (["own=[{name: blip, path: x/y}]"], ["name of a dataset of the paper"]),
        (["turns.max_turns.vsr=0"], ["turns.max_turns.vsr=0", "at least 1"]),
        (["turns.deduplicate.vg=area"], ["'area'", "bbox"]),
        (
            ["identifiers=task-name", "diversity=multi"],
            ["diversity=multi choose nothing", "leave them at fine and single"],
        ),
        (["options.marks=A-"], ["options.marks='A-'", "(A)"]),
        (["turns.keep=last"], ["turns.keep='last'", "first"]),
        (["turns=merged"], ["turns='merged' must be a mapping"]),
        (["one_dataset_per_task=1"], ["must be true or false"]),
        (["seed=true"], ["seed=True must be a whole number"]),
        (["balancing=[fair"], ["not YAML"]),
        (["balancing"], ["not of the form setting=value"]),
        (["seed.of.mine=3"], ["not of the form setting=value"]),
    ],
)
def test_wrong_settings(overrides, words):
    with pytest.raises(RecipeError) as error:
        parse_recipe(SETTINGS, overrides)
    assert all(word in str(error.value) for word in words), error.value


def test_files_without_a_recipe(tmp_path):
    for text in ("learning_rate: 1", "- a list", "", "mixture: best", "a: [unclosed"):
        path = tmp_path / "file.yaml"
        path.write_text(text)
        with pytest.raises(RecipeError, match="mixture: section|not a YAML file"):
            load_recipe(str(path))
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_a_file_is_read_with_its_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    (tmp_path / "VSR" / "random").mkdir(parents=True)
    (tmp_path / "VSR" / "random" / "train.jsonl").touch()
    settings = {**SETTINGS, "data_root": str(tmp_path), "datasets": ["vsr"]}
    path.write_text(yaml.safe_dump({"learning_rate": 1e-4, "mixture": settings}))
    assert load_recipe(str(path), ["diversity=multi"]).diversity == "multi"
    with pytest.raises(RecipeError, match=r"run\.yaml with --set data_root=gone: a problem\n.*'gone' is not a folder"):
        load_recipe(str(path), ["data_root=gone"])
    with pytest.raises(RecipeError, match="2 problems\n  - .*'sqa' lacks .*LEPA.json.*\n.*'gqa' lacks"):
        load_recipe(str(path), ["datasets=[vsr, sqa, gqa, vg]", "exclude=[vg]"])
    with pytest.raises(RecipeError, match="3 problems\n(.*\n)+  - .*'sqa' lacks"):
        load_recipe(str(path), ["datasets=[vsr, sqa, gqa]", "exclude=[gqa]", "templates=none.yaml", "balancing=fair"])
    path.write_text(yaml.safe_dump({"mixture": {"data_root": "gone", "datasets": ["vsr"]}}))
    assert load_recipe(str(path), [f"data_root={tmp_path}"]).data_root == str(tmp_path)
