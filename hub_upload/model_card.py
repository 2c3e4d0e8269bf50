# SPDX-License-Identifier: Apache-2.0
"""The card (README.md) of a model repository, from what the run that made the model wrote down."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import RepositoryNotFoundError

from hub_upload.export_check import Export, ExportError
from modeling_honeybee.model_folder import CONVERSION_FILE, RUN_FILE, STATE_FILE, NetworkError, read_json

# Words in the cards that other tools leave beside the weights: a card with all words of a row is one of these. peft
# rewrites the tags of TRL's card, so that the Trainer's tag is not in it.
GENERATED = (
    ("[More Information Needed]",),  # peft's: the Hub's template with nothing filled in
    ("generated_from_trainer",),
    ("It has been trained using [TRL](https://github.com/huggingface/trl).", "If you had a time machine,"),
)
# A card that carries this line is written anew by the next push; without it, it is somebody's own and is kept.
MARK = "<!-- Written by hub_upload/push.py. Remove this line to keep changes that you make. -->"
CODE_LICENSE = "apache-2.0"
PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "cc0-1.0", "unlicense"}
# Parts of the paper's models: the licence of CLIP stands in its GitHub repository and not on its Hub page.
KNOWN_LICENSES = {
    "openai/clip-vit-large-patch14": "mit",
    "openai/clip-vit-large-patch14-336": "mit",
    "lmsys/vicuna-7b-v1.5": "llama2",
    "lmsys/vicuna-13b-v1.5": "llama2",
}


@dataclass
class Part:
    """Something that the model was made from. `hub`: whether `name` is a name on the Hub."""

    role: str
    name: str
    hub: bool
    license: str | None = None


@dataclass
class Provenance:
    """`runs` (oldest first) hold what each training run recorded, its trainer's state under "state"."""

    runs: list[dict] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    conversion: dict | None = None


def _is_hub_name(name: str) -> bool:
    return not Path(name).exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def _last_part(path: str) -> str:
    """The last part of a path of any operating system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _card_license(folder: Path) -> str | None:
    """The licence in the metadata of a local part's own card."""
    card = folder / "README.md"
    found = re.search(r"^license: *(\S+) *$", card.read_text(encoding="utf-8"), re.M) if card.is_file() else None
    return found[1] if found else None


def _add_part(provenance: Provenance, role: str, name: str) -> None:
    if _is_hub_name(name):
        provenance.parts.append(Part(role, name, True, KNOWN_LICENSES.get(name)))
    else:
        provenance.parts.append(Part(role, _last_part(name), False, _card_license(Path(name))))


def read_provenance(folder: Path) -> Provenance:
    """What is on record beside the weights: training runs, back to the first whose folder is still there, or the
    conversion of an official checkpoint. Only names are taken over, not where things lay on somebody's disk."""
    provenance, seen = Provenance(), set()
    while folder.resolve() not in seen:
        seen.add(folder.resolve())
        if (folder / CONVERSION_FILE).is_file():
            conversion = read_json(folder / CONVERSION_FILE, ExportError)
            provenance.conversion = conversion
            provenance.parts.append(Part("official checkpoint", conversion["checkpoint"], False, conversion["license"]))
            for role in ("vision tower", "language model"):
                if name := conversion.get(role.replace(" ", "_")):
                    _add_part(provenance, role, name)
            break
        if not (folder / RUN_FILE).is_file():
            if provenance.runs:
                _add_part(provenance, "Honeybee model it was trained from", str(folder))
            break
        run = read_json(folder / RUN_FILE, ExportError)
        if (folder / STATE_FILE).is_file():
            run["state"] = read_json(folder / STATE_FILE, ExportError)
        provenance.runs.insert(0, run)
        start = run.get("model_name_or_path")
        if not start:
            for role, key in (("vision tower", "vision_model"), ("language model", "text_model")):
                if run.get(key):
                    _add_part(provenance, role, run[key])
            break
        # Relative to where the run was started, which may be elsewhere; a neighbour of that name is the usual case.
        candidates = [path for path in (Path(start), folder.parent / Path(start).name) if path.is_dir()]
        if not candidates:
            _add_part(provenance, "Honeybee model it was trained from", start)
            break
        folder = candidates[0]
    for run in provenance.runs:
        name = run.get("dataset")
        if name and _is_hub_name(name) and name not in provenance.datasets:
            provenance.datasets.append(name)
    return provenance


def look_up_parts(provenance: Provenance, api) -> None:
    """Asks the Hub (`api`, an HfApi) about the parts that have names on it. A part that it does not have no longer counts as
    one of the Hub's; a Hub that cannot be reached changes nothing."""
    for part in [part for part in provenance.parts if part.hub]:
        try:
            card = api.model_info(part.name).card_data
        except RepositoryNotFoundError:
            part.hub = False
        except (NetworkError, OSError):
            continue
        else:
            part.license = (card.license if card is not None else None) or part.license
    for name in list(provenance.datasets):
        try:
            api.dataset_info(name)
        except RepositoryNotFoundError:
            provenance.datasets.remove(name)
        except (NetworkError, OSError):
            continue


def choose_license(parts: list[Part], declared: str | None) -> str:
    """The licence that follows from the parts; `declared` speaks for the parts whose licence is unknown.

    Raises:
        ExportError: `declared` gives more rights than a part does.
    """
    # The official weights were published under one licence for the whole.
    official = [part for part in parts if part.role == "official checkpoint"]
    parts = official or parts
    known = {part.license for part in parts if part.license}
    restrictive = sorted(known - PERMISSIVE)
    if declared is not None:
        if restrictive and declared not in (*restrictive, "other"):
            named = ", ".join(f"{part.name} ({part.license})" for part in parts if part.license in restrictive)
            raise ExportError(f"--license {declared} does not follow from the parts: {named}; leave it out")
        return declared
    if len(known) == 0 or any(part.license is None for part in parts) or len(restrictive) > 1:
        return "other"
    return restrictive[0] if restrictive else CODE_LICENSE


def read_curve(path: Path) -> dict | None:
    """Scores against M, of an output folder of `evaluation/run.py --num_query_tokens`; `text` is what people read of them."""
    if not (path / "curve.json").is_file():
        return None
    curve = read_json(path / "curve.json", ExportError)
    if not curve.keys() >= {"rows", "default", "text"}:
        raise ExportError(f"{path / 'curve.json'} is not from evaluation/run.py; give its output folder as --results")
    return curve


def read_results(path: Path, model: str) -> list[EvalResult]:
    """Results in the Hub's format, from an output folder of `evaluation/run.py` (`TASK/scores.json`; of several M those of
    the default, or of the largest where that was not asked) or from the table of the quickstart (`results.json`, the row
    named `model`).

    Raises:
        ExportError: neither of the two.
    """
    found, asked = [], ""
    if curve := read_curve(path):
        numbers = [row["num_query_tokens"] for row in curve["rows"]]
        if curve["default"] not in numbers:
            asked = f", M = {numbers[-1]}"
        path = path / f"M{numbers[-1] if asked else curve['default']}"
    if path.is_dir():
        for file in sorted(path.glob("*/scores.json")):
            task, scores = file.parent.name, read_json(file, ExportError)
            name = scores.get("display_name", task)  # older files have none
            if "questions" in scores:  # not always all of a benchmark's
                name += f", {scores['questions']} questions{asked}"
            found += [(task, name, metric, value) for metric, value in (scores.get("summary") or {}).items()]
    elif path.is_file():
        row = read_json(path, ExportError).get(model)
        found = [("digit-scenes", "Held-out digit scenes", f"accuracy ({kind})", v) for kind, v in (row or {}).items()]
    found = [entry for entry in found if isinstance(entry[3], (int, float)) and not isinstance(entry[3], bool)]
    if not found:
        raise ExportError(
            f"--results {path} holds no results: give the output folder of evaluation/run.py, or the quickstart's "
            f"results.json with a row {model!r}"
        )
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=task,
            dataset_name=dataset,
            metric_type="accuracy" if metric.startswith("acc") else metric,
            metric_name=metric,
            metric_value=value,
        )
        for task, dataset, metric, value in found
    ]


def card_data(
    export: Export,
    provenance: Provenance,
    repo_id: str,
    license: str,
    languages: list[str],
    results: list[EvalResult] | None,
) -> ModelCardData:
    """Metadata in the Hub's format; huggingface_hub builds its `model-index`."""
    bases = [part.name for part in provenance.parts if part.hub]
    if export.adapter is not None:
        bases = [export.adapter["base_model_name_or_path"]]
    more = {"license_name": "see-licence-section", "license_link": "#licence"} if license == "other" else {}
    relation = {"base_model_relation": "adapter"} if export.adapter is not None else {}
    return ModelCardData(
        language=languages,
        license=license,
        library_name="transformers" if export.adapter is None else "peft",
        pipeline_tag="image-text-to-text",
        tags=["honeybee", "multimodal", "custom_code"],
        base_model=bases or None,
        datasets=provenance.datasets or None,
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
        **more,
        **relation,
    )


_CHAT = """chat = [
    {{
        "role": "user",
        "content": [{{"type": "image", "path": "photo.jpg"}}, {{"type": "text", "text": "{question}"}}],
    }}
]"""
_ASK = """prompt = processor.apply_chat_template(
    [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "{question}"}}]}}],
    add_generation_prompt=True,
)
inputs = processor(images="photo.jpg", text=prompt, add_special_tokens=False, return_tensors="pt")
new = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.tokenizer.decode(new[0], skip_special_tokens=True))"""
_AUTO_BLOCK = (
    """from transformers import AutoModelForImageTextToText, AutoProcessor

pinned = {{"revision": "{revision}", "trust_remote_code": True}}
model = AutoModelForImageTextToText.from_pretrained("{repo}", code_revision="{revision}", dtype="auto", **pinned)
processor = AutoProcessor.from_pretrained("{repo}", **pinned)

"""
    + _ASK
)
_PIPELINE_BLOCK = """from transformers import pipeline

ask = pipeline("image-text-to-text", model="{repo}", revision="{revision}", trust_remote_code=True)
{chat}
print(ask(text=chat, return_full_text=False, max_new_tokens=64)[0]["generated_text"])"""
_PROJECT_BLOCK = """from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor

model = HoneybeeForConditionalGeneration.from_pretrained("{repo}", revision="{revision}", dtype="auto")
processor = HoneybeeProcessor.from_pretrained("{repo}", revision="{revision}")

inputs = processor.apply_chat_template(
    [{{"role": "user", "content": [{{"type": "image", "path": "photo.jpg"}}, {{"type": "text", "text": "{question}"}}]}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
new = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.tokenizer.decode(new[0], skip_special_tokens=True))"""
_ADAPTER_BLOCK = (
    """from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}", trust_remote_code=True, dtype="auto")
model = PeftModel.from_pretrained(base, "{repo}", revision="{revision}")
processor = AutoProcessor.from_pretrained("{repo}", revision="{revision}", trust_remote_code=True)

"""
    + _ASK
)


def _python(block: str) -> str:
    return f"```python\n{block}\n```"


def _usage(export: Export, repo_id: str, revision: str) -> str:
    values = {"repo": repo_id, "revision": revision, "question": "What is in the picture?"}
    if export.adapter is not None:
        values["base"] = export.adapter["base_model_name_or_path"]
        return f"With peft, on its base model:\n\n{_python(_ADAPTER_BLOCK.format(**values))}"
    blocks = {
        "As a pipeline (torch, transformers and pillow are enough):": _PIPELINE_BLOCK.format(
            **values, chat=_CHAT.format(**values)
        ),
        "By the auto classes. `revision` pins the weights and `code_revision` the code that comes with them; give the "
        "commit that you have read instead of a branch:": _AUTO_BLOCK.format(**values),
        "With the Honeybee project installed, without code from this repository:": _PROJECT_BLOCK.format(**values),
    }
    return "\n\n".join(f"{words}\n\n{_python(block)}" for words, block in blocks.items())


def _table(head: tuple[str, ...], rows: list[tuple], last_column: str = "---") -> str:
    lines = [head, ["---"] * (len(head) - 1) + [last_column], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _describe_model(export: Export) -> str:
    if export.adapter is not None:
        adapter = export.adapter
        return (
            f"A {adapter.get('peft_type', 'peft')} adapter of `{adapter['base_model_name_or_path']}`, a "
            "[Honeybee](https://arxiv.org/abs/2312.06742) model: a multimodal language model with a locality-enhanced "
            f"projector. Rank {adapter.get('r')}; saved in full: {', '.join(adapter.get('modules_to_save') or ['nothing'])}."
            f"{_describe_crops(export)}"
        )
    config = export.config
    projector, vision, text = config.projector_config, config.vision_config, config.text_config
    rows = [
        ("vision tower", f"{vision.model_type}, {vision.image_size} px, width {vision.hidden_size}"),
        ("projector", f"{projector.projector_type}, {_visual_tokens(config)} visual tokens an image"),
        ("language model", f"{text.model_type}, width {text.hidden_size}, {text.num_hidden_layers} layers"),
    ]
    chosen = ""
    if projector.elastic_num_query_tokens:
        chosen = (
            "\n\nThe number of visual tokens can be chosen for each image: `num_query_tokens=...` in a call of the processor, "
            'the pipeline or `apply_chat_template`, or `"num_query_tokens"` in an image\'s item of a chat.'
        )
    return (
        "A [Honeybee](https://arxiv.org/abs/2312.06742) model (CVPR 2024): a vision tower and a language model joined by "
        "a projector that keeps locality and sets the number of visual tokens.\n\n"
        f"{_table(('part', 'what it is'), rows)}{chosen}{_describe_crops(export)}"
    )


def _describe_crops(export: Export) -> str:
    processor = export.processor
    if processor.max_crops == 1:
        return ""
    most = processor.max_crops
    fewest = f"{processor.min_crops} to {most}" if processor.min_crops > 1 else f"at most {most}"
    which = "Every picture is" if processor.min_crops > 1 else "Large and wide pictures are"
    overview = ""
    if processor.overview:
        number = processor.overview_num_query_tokens
        own = "" if number is None else f" ({number + processor.num_eos_tokens} visual tokens)"
        overview = f", and the whole picture follows them as an overview{own}"
    return (
        f"\n\n{which} cut into {fewest} crops{overview}; each crop has the visual tokens of an image. Where a prompt has more "
        f"images than {processor.max_images_cut}, none is cut. `max_crops=...` in a call of the processor, `apply_chat_template` "
        'or (with a chat: on transformers 5) the pipeline, or `"max_crops"` in an image\'s item of a chat, lowers the number; 1 cuts none.'
    )


def _visual_tokens(config) -> str:
    projector = config.projector_config
    if not projector.elastic_num_query_tokens:
        return str(config.num_image_tokens)
    extra = f" and {projector.num_eos_tokens} more" if projector.num_eos_tokens else ""
    trained = ", ".join(map(str, projector.elastic_num_query_tokens))
    return f"{trained} (default: {projector.num_query_tokens}){extra}"


def _public(value, hub_names: set[str]):
    """A setting without places on somebody's disk: a path becomes its last part, unless it is a name on the Hub."""
    if isinstance(value, dict):
        return {_public(key, hub_names): _public(inner, hub_names) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(inner, hub_names) for inner in value]
    if isinstance(value, str) and value not in hub_names and ("/" in value or "\\" in value):
        return _last_part(value)
    return value


def _setting_rows(settings: dict, hub_names: set[str]) -> list[tuple[str, str]]:
    rows = []
    for name, value in settings.items():
        value = _public(value, hub_names)
        if isinstance(value, dict) and name == "mixture":
            rows += _setting_rows({f"mixture: {key}": inner for key, inner in value.items()}, hub_names)
        elif value is not False and value not in (None, {}, []):  # 0 == False, and a seed of 0 is a setting
            shown = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
            rows.append((name, "`" + shown.replace("|", "\\|").replace("\n", " ") + "`"))
    return rows


def _describe_training(provenance: Provenance) -> str:
    said = []
    if provenance.conversion is not None:
        said.append(
            f"The weights are those of the official release (`{provenance.conversion['checkpoint']}`), converted to "
            "this format; they were trained by its authors."
        )
    hub_names = {part.name for part in provenance.parts if part.hub} | set(provenance.datasets)
    for number, run in enumerate(provenance.runs, 1):
        settings = {**{k: v for k, v in run.items() if k not in ("state", "training")}, **run.get("training", {})}
        rows = _setting_rows(settings, hub_names)
        state = run.get("state", {})
        rows += [(name, f"`{state[name]}`") for name in ("global_step", "epoch") if name in state]
        losses = [entry["loss"] for entry in state.get("log_history", []) if "loss" in entry]
        if losses:
            rows.append(("training loss, first and last logged", f"`{losses[0]:.4f}`, `{losses[-1]:.4f}`"))
        said.append(f"Run {number} of {len(provenance.runs)}:\n\n{_table(('setting', 'value'), rows)}")
    return "\n\n".join(said) or "Not on record: the folder holds no record of a training run."


def _describe_results(results: list[EvalResult] | None, curve: dict | None) -> str:
    if not results:
        return "None were given with this model. Treat it as not evaluated."
    rows = [(r.dataset_name, r.metric_name, f"{r.metric_value:.4g}") for r in results]
    table = _table(("data", "measure", "value"), rows, last_column="---:")
    return table if curve is None else f"{table}\n\nAgainst M, the number of visual tokens:\n\n{curve['text']}"


def _describe_license(provenance: Provenance, license: str, declared: bool) -> str:
    said = [f"`{license}`" + (", stated by whoever published it." if declared else ", which follows from the parts:")]
    rows = [(part.role, f"`{part.name}`", part.license or "not known") for part in provenance.parts]
    rows.append(("code", "Honeybee for Transformers", CODE_LICENSE))
    said.append(_table(("part", "name", "licence"), rows))
    if license == "other":
        said.append("The terms of every part apply together; find out those that are not known before you use it.")
    if license == "cc-by-nc-4.0":
        said.append("No commercial use, also of what is made from it.")
    return "\n\n".join(said)


def write_card(
    export: Export,
    provenance: Provenance,
    repo_id: str,
    revision: str = "main",
    license: str | None = None,
    languages: list[str] | None = None,
    results: list[EvalResult] | None = None,
    curve: dict | None = None,
) -> str:
    """The whole card. `license` is what the publisher states, None to let it follow from the parts; `curve` is what
    [`read_curve`] returns.

    Raises:
        ExportError: a licence that the parts do not allow.
    """
    chosen = choose_license(provenance.parts, license)
    data = card_data(export, provenance, repo_id, chosen, languages or ["en"], results)
    return f"""---
{data.to_yaml()}
---
{MARK}

# {repo_id.split("/")[-1]}

{_describe_model(export)}

## Use

{_usage(export, repo_id, revision)}

## Training

{_describe_training(provenance)}

## Results

{_describe_results(results, curve)}

## Limits

It answers fluently also where it is wrong: it may name things that are not in the picture, miscount, and misplace them.
{_resized(export)}, so small print and long formats lose detail. It was not tested for safety; do not use it
where a wrong answer harms someone.

## Licence

{_describe_license(provenance, chosen, license is not None)}
"""


def _resized(export: Export) -> str:
    most = export.processor.max_crops
    return (
        "Images are resized to a square"
        if most == 1
        else f"Images are resized to a square, or to the squares of {most} crops"
    )


def own_card(folder: Path) -> str | None:
    """The card that somebody wrote into the folder, or None: there is none, or only what a tool put there (this one,
    peft's and TRL's templates)."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    return None if any(all(words in text for words in row) for row in ((MARK,), *GENERATED)) else text
