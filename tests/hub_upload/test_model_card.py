# SPDX-License-Identifier: Apache-2.0
"""What a model card takes from the records beside the weights."""

import json

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import generate_model_card

from hub_upload.convert_official import convert
from hub_upload.export_check import ExportError, check_folder
from hub_upload.model_card import MARK, Part, choose_license, own_card, read_provenance, read_results, write_card
from processing import HoneybeeProcessor
from tests.golden import checkpoints
from tests.tiny import save_tiny, tiny_model


def run_file(folder, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "honeybee_run.json").write_text(json.dumps(settings))


def test_stages_are_followed_to_the_parts(tmp_path):
    """By the path that the run was given, or by the neighbour of that name where it was moved."""
    run_file(tmp_path / "align", stage="align", dataset="org/captions", vision_model="openai/clip-vit-large-patch14",
             text_model="lmsys/vicuna-7b-v1.5", model_name_or_path=None)  # fmt: skip
    run_file(tmp_path / "instruct", stage="instruct", dataset="/data/private/chats.jsonl",
             model_name_or_path="/elsewhere/align")  # fmt: skip
    provenance = read_provenance(tmp_path / "instruct")
    assert [run["stage"] for run in provenance.runs] == ["align", "instruct"]
    assert [part.name for part in provenance.parts] == ["openai/clip-vit-large-patch14", "lmsys/vicuna-7b-v1.5"]
    assert provenance.datasets == ["org/captions"]
    assert choose_license(provenance.parts, None) == "llama2"


def test_a_run_from_a_hub_model_names_it(tmp_path):
    run_file(tmp_path / "run", stage="instruct", dataset="org/chats", model_name_or_path="bee/base")
    (part,) = read_provenance(tmp_path / "run").parts
    assert (part.name, part.hub) == ("bee/base", True)


def test_runs_that_name_each_other_end(tmp_path):
    run_file(tmp_path / "a", stage="instruct", dataset="d", model_name_or_path=str(tmp_path / "b"))
    run_file(tmp_path / "b", stage="instruct", dataset="d", model_name_or_path=str(tmp_path / "a"))
    assert len(read_provenance(tmp_path / "a").runs) == 2


@pytest.mark.parametrize(
    ("licenses", "declared", "chosen"),
    [
        (["mit", "apache-2.0"], None, "apache-2.0"),
        (["mit", "llama2"], None, "llama2"),
        (["llama2", "cc-by-nc-4.0"], None, "other"),
        (["mit", None], None, "other"),
        ([], None, "other"),
        (["mit", None], "apache-2.0", "apache-2.0"),
        (["llama2"], "llama2", "llama2"),
    ],
)
def test_the_licence_follows_from_the_parts(licenses, declared, chosen):
    assert choose_license([Part("part", f"p{i}", True, name) for i, name in enumerate(licenses)], declared) == chosen


def test_a_licence_that_gives_more_than_a_part_is_refused():
    with pytest.raises(ExportError, match=r"--license mit does not follow from the parts: tower \(cc-by-nc-4.0\)"):
        choose_license([Part("vision tower", "tower", True, "cc-by-nc-4.0")], "mit")


def test_an_official_checkpoint_stays_non_commercial_also_when_trained_further(tmp_path):
    checkpoint = checkpoints()[0][0]
    from tests.golden import TOKENIZER

    convert(checkpoint, tmp_path / "converted", str(TOKENIZER))
    run_file(tmp_path / "tuned", stage="instruct", dataset="d", model_name_or_path=str(tmp_path / "converted"))
    for folder in ("converted", "tuned"):
        provenance = read_provenance(tmp_path / folder)
        assert choose_license(provenance.parts, None) == "cc-by-nc-4.0"
        with pytest.raises(ExportError, match="does not follow"):
            choose_license(provenance.parts, "apache-2.0")
    card = write_card(check_folder(tmp_path / "converted"), read_provenance(tmp_path / "converted"), "bee/official")
    assert (
        ModelCard(card).data.license == "cc-by-nc-4.0"
        and "No commercial use" in card
        and "trained by its authors" in card
    )


def test_a_mixture_is_told_without_where_it_lies(tmp_path):
    save_tiny(tmp_path / "model")
    mixture = {"root": "/home/me/secret", "datasets": {"vqav2": {"weight": 0.1, "files": ["/home/me/secret/v.json"]}}}
    run_file(tmp_path / "model", stage="instruct", dataset=None, mixture=mixture, model_name_or_path=r"C:\secret\align")
    card = write_card(check_folder(tmp_path / "model"), read_provenance(tmp_path / "model"), "bee/tiny")
    assert '{"vqav2": {"weight": 0.1, "files": ["v.json"]}}' in card and "/home/me" not in card and "C:" not in card


def test_crops_are_described(tmp_path):
    folder = save_tiny(tmp_path / "model", elastic=True)
    card = write_card(check_folder(folder), read_provenance(folder), "bee/whole")
    assert "crops" not in card and "Images are resized to a square, so small print" in card
    processor = HoneybeeProcessor.from_pretrained(folder)
    processor.max_crops, processor.overview_num_query_tokens = 9, 4
    processor.save_pretrained(folder)
    card = write_card(check_folder(folder), read_provenance(folder), "bee/cut")
    assert "cut into at most 9 crops, and the whole picture follows them as an overview (5 visual tokens)" in card
    assert "more images than 2, none is cut" in card and "1 cuts none" in card and "the squares of 9 crops" in card
    processor.overview = False
    processor.save_pretrained(folder)
    assert "overview" not in write_card(check_folder(folder), read_provenance(folder), "bee/cut")


def test_card_without_any_record(tmp_path):
    save_tiny(tmp_path / "model")
    card = write_card(check_folder(tmp_path / "model"), read_provenance(tmp_path / "model"), "bee/tiny")
    data = ModelCard(card).data
    assert (data.license, data.get("license_name")) == ("other", "see-licence-section")
    assert data.base_model is None and data.datasets is None and data.eval_results is None
    assert "Not on record" in card and "not evaluated" in card


def test_results_of_the_quickstart(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"model": {"overall": 0.96, "what": 0.94}, "blind control": {"overall": 0.2}}))
    found = read_results(path, "model")
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in found] == [
        ("accuracy", "accuracy (overall)", 0.96),
        ("accuracy", "accuracy (what)", 0.94),
    ]
    with pytest.raises(ExportError, match="holds no results"):
        read_results(path, "another")


def test_a_card_that_somebody_wrote_is_kept(tmp_path):
    assert own_card(tmp_path) is None
    for text, kept in (
        ("---\nlicense: mit\n---\nMine.", True),
        (f"---\nlicense: mit\n---\n{MARK}\n", False),
        ("# Model Card\n[More Information Needed]", False),
        ("---\ntags: [trl, generated_from_trainer]\n---\n", False),
        ("Mine. It has been trained using [TRL](https://github.com/huggingface/trl).", True),
    ):
        (tmp_path / "README.md").write_text(text)
        assert (own_card(tmp_path) is not None) == kept


@pytest.mark.parametrize("trl_was_first", [True, False])
def test_the_cards_of_trl_and_peft_are_not_somebodys(tmp_path, trl_was_first):
    """As the libraries write them: peft rewrites the tags of TRL's, and makes one of its own where there is none."""
    if trl_was_first:
        generate_model_card(
            base_model=None, model_name="adapter", hub_model_id=None, dataset_name=None, trainer_name="SFT",
            tags=["generated_from_trainer", "sft", "trl"], wandb_url=None, trackio_url=None,
        ).save(tmp_path / "README.md")  # fmt: skip
        assert own_card(tmp_path) is None
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in text and "generated_from_trainer" not in text
    assert own_card(tmp_path) is None


def test_a_setting_of_zero_is_told(tmp_path):
    save_tiny(tmp_path / "model")
    training = {"seed": 0, "weight_decay": 0.0, "warmup_steps": 0, "bf16": False, "gradient_checkpointing": True}
    run_file(tmp_path / "model", stage="align", model_name_or_path=None, dataset=None, training=training)
    card = write_card(check_folder(tmp_path / "model"), read_provenance(tmp_path / "model"), "bee/tiny")
    assert all(row in card for row in ("| seed | `0` |", "| weight_decay | `0.0` |", "| warmup_steps | `0` |"))
    assert "bf16" not in card and "| gradient_checkpointing | `True` |" in card
