# SPDX-License-Identifier: Apache-2.0
"""Saved folders in the hands of strangers, with this release of transformers and with others."""

import ast
import sys

import pytest
import torch

from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor, processor_from_vision_text_pretrained
from tests.tiny import (
    ELASTIC,
    NEW_PROJECTOR,
    NO_OTHER_PYTHONS,
    OTHER_PYTHONS,
    PROJECTORS,
    REPOSITORY,
    elastic_processor,
    picture,
    run_script,
    save_clip,
    save_llama,
    save_qwen2,
    save_siglip,
    tiny_inputs,
    tiny_model,
    tiny_processor,
)

GREEDY = {"max_new_tokens": 8, "do_sample": False}
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
FINER = [
    {"role": "user", "content": [{"type": "image", "num_query_tokens": 16}, {"type": "text", "text": "What is it?"}]}
]
SHIPPED = [
    REPOSITORY / "modeling_honeybee" / "configuration_honeybee.py",
    REPOSITORY / "modeling_honeybee" / "deformable_attention_honeybee.py",
    REPOSITORY / "modeling_honeybee" / "projectors_honeybee.py",
    REPOSITORY / "modeling_honeybee" / "probe_honeybee.py",
    REPOSITORY / "modeling_honeybee" / "generation_config_honeybee.py",
    REPOSITORY / "modeling_honeybee" / "joining_honeybee.py",
    REPOSITORY / "modeling_honeybee" / "modeling_honeybee.py",
    REPOSITORY / "processing" / "crops_honeybee.py",
    REPOSITORY / "processing" / "processing_honeybee.py",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One saved folder for each projector, one for each kind of tower and language model, an elastic one, and one whose
    processor cuts."""
    root, saved = tmp_path_factory.mktemp("saved"), {}
    for projector_type in PROJECTORS:
        model = tiny_model(projector_type)
        saved[projector_type] = (model, tiny_processor(model.config.num_image_tokens))
    for name, save_vision, save_text in (
        ("clip-llama", save_clip, save_llama),
        ("siglip-qwen2", save_siglip, save_qwen2),
    ):
        parts = save_vision(root / f"{name}-vision"), save_text(root / f"{name}-text")
        torch.manual_seed(0)
        model = HoneybeeForConditionalGeneration.from_vision_text_pretrained(*parts, **NEW_PROJECTOR)
        saved[name] = (model, processor_from_vision_text_pretrained(*parts, model.config.num_image_tokens))
    saved["elastic"] = (tiny_model("d-abs", **ELASTIC), elastic_processor())
    cutting = elastic_processor()
    cutting.max_crops, cutting.overview_num_query_tokens = 4, 4
    saved["cutting"] = (tiny_model(config={"image_token_id": cutting.image_token_id}, **ELASTIC), cutting)
    references = {}
    for name, (model, processor) in saved.items():
        folder = str(root / name.replace("-", "_"))
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        elastic = name == "elastic"
        inputs = tiny_inputs(model, [(5, "image", 7, "image")], numbers=[16, 4]) if elastic else tiny_inputs(model)
        messages = FINER if elastic else MESSAGES
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        asked = {"images": first_picture(folder), "text": prompt, "add_special_tokens": False, "return_tensors": "pt"}
        prepared = processor(**asked)
        if name == "cutting":
            assert prepared["num_crops"].tolist() == [5] and prepared["num_query_tokens"].tolist() == [9] * 4 + [4]
            inputs = dict(prepared)
        with torch.no_grad():
            output = model(**inputs)
            hidden = model.model(**inputs).last_hidden_state
            tokens = model.generate(**inputs, **GREEDY)
        torch.save({"inputs": inputs, "greedy": GREEDY, "messages": messages, "image": None}, f"{folder}/inputs.pt")
        references[folder] = (model, output.logits, hidden, tokens, prepared)
    return references


def first_picture(folder):
    """Of 64 x 64 pixels where it is to be cut, into four squares of 32 x 32 and an overview."""
    return picture(size=(64, 64)) if folder.endswith("cutting") else picture()


def load_in(python, folders, tmp_path):
    # Pictures travel as files: torch.load reads nothing but tensors and plain values.
    for number, folder in enumerate(folders):
        paths = {"image": str(tmp_path / f"{number}.png"), "other_image": str(tmp_path / f"{number}-other.png")}
        first_picture(folder).save(paths["image"])
        picture(1).save(paths["other_image"])
        torch.save({**torch.load(f"{folder}/inputs.pt"), **paths}, f"{folder}/inputs.pt")
    result = tmp_path / "result.pt"
    run_script(
        REPOSITORY / "tests" / "foreign_process.py",
        result,
        *folders,
        python=python,
        cwd=tmp_path,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    return torch.load(result)


@pytest.mark.parametrize("release", ["this", "others"])
def test_folders_load_without_this_project(folders, release, tmp_path):
    if release == "others" and not OTHER_PYTHONS:
        pytest.skip(NO_OTHER_PYTHONS)
    for number, python in enumerate([sys.executable] if release == "this" else OTHER_PYTHONS):
        (tmp_path / str(number)).mkdir()
        compare(folders, load_in(python, folders, tmp_path / str(number)))


def compare(folders, results):
    for folder, (model, logits, hidden, tokens, prepared) in folders.items():
        result = results[folder]
        assert result["module"].startswith("transformers_modules."), result["module"]
        assert result["missing"] == [] and result["unexpected"] == []
        for other in result["logits"]:
            torch.testing.assert_close(other, logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(result["hidden"], hidden, atol=1e-5, rtol=0)
        assert torch.equal(result["tokens"], tokens)
        assert result["tied"] == model.config.tie_word_embeddings
        rope = getattr(model.config.text_config, "rope_parameters", None) or model.config.text_config.to_dict()
        assert result["rope_theta"] == rope["rope_theta"] != 10000.0
        assert set(result["prepared"]) == set(prepared)
        for name, tensor in prepared.items():
            torch.testing.assert_close(result["prepared"][name], tensor, atol=1e-5, rtol=0)
        assert result["batched"] == result["single"] * 2


def test_saved_again_by_a_stranger_it_is_still_whole(folders, tmp_path):
    """A folder that was loaded with its own code and saved elsewhere carries that code along."""
    folder = next(iter(folders))
    script = (
        "import sys; from transformers import AutoModelForImageTextToText as M, AutoProcessor as P\n"
        f"M.from_pretrained({folder!r}, trust_remote_code=True).save_pretrained('again')\n"
        f"P.from_pretrained({folder!r}, trust_remote_code=True).save_pretrained('again')\n"
    )
    run_script("-c", script, cwd=tmp_path, env={"HF_MODULES_CACHE": str(tmp_path / "modules")})
    for file in SHIPPED:
        assert (tmp_path / "again" / file.name).read_text() == file.read_text()
    loaded = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "again")
    model, logits, *_ = folders[folder]
    assert torch.equal(loaded(**tiny_inputs(model)).logits, logits)
    assert HoneybeeProcessor.from_pretrained(tmp_path / "again").num_image_tokens == model.config.num_image_tokens


def test_the_code_in_a_folder_joins_parts(folders, tmp_path):
    """In a process without this project; with the same seed it makes the model that was saved."""
    folder = next(folder for folder in folders if folder.endswith("siglip_qwen2"))
    parts = [folder.replace("siglip_qwen2", f"siglip-qwen2-{part}") for part in ("vision", "text")]
    script = (
        "import sys, torch\n"
        "sys.modules['modeling_honeybee'] = sys.modules['processing'] = None\n"
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module as get_class\n"
        f"model_class = get_class('modeling_honeybee.HoneybeeForConditionalGeneration', {folder!r})\n"
        "torch.manual_seed(0)\n"
        f"settings = {NEW_PROJECTOR!r}\n"
        f"model = model_class.from_vision_text_pretrained(*{parts!r}, **settings)\n"
        f"config = model_class.config_from_vision_text_pretrained(*{parts!r}, **settings)\n"
        "assert type(config).__module__.startswith('transformers_modules.') and model.config.to_dict() == config.to_dict()\n"
        "model.save_pretrained('joined')\n"
    )
    run_script("-c", script, cwd=tmp_path, env={"HF_MODULES_CACHE": str(tmp_path / "modules")})
    joined = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "joined")
    model, logits, *_ = folders[folder]
    assert torch.equal(joined(**tiny_inputs(model)).logits, logits)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_import_torch_and_transformers_only(path):
    tree = ast.parse(path.read_text())
    guarded = {node for outer in ast.walk(tree) if isinstance(outer, ast.Try) for node in outer.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module, "only `from .name import x` survives the flat folder of the Hub"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for module in modules:
                top = module.split(".")[0]
                assert (
                    top in {"torch", "transformers"}
                    or top in sys.stdlib_module_names
                    or (top == "PIL" and node in guarded)
                ), f"{path.name} imports {module}"


@pytest.mark.parametrize(
    "package", ["modeling_honeybee", "processing", "training", "evaluation", "hub_upload", "serving", "lab"]
)
def test_imports_between_the_packages_point_one_way(package):
    packages = {
        "modeling_honeybee",
        "processing",
        "training",
        "evaluation",
        "hub_upload",
        "serving",
        "lab",
        "benchmarks",
        "tests",
    }
    # `modeling_honeybee` registers the processor beside the models; the files that it ships do not import it.
    allowed = {package, "processing"} | (set() if package == "processing" else {"modeling_honeybee"})
    allowed |= {"evaluation"} if package == "training" else set()  # which asks benchmarks while it trains
    allowed |= {"training"} if package == "lab" else set()  # whose scenes, datasets and collator it takes
    for path in (REPOSITORY / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            used = {name.split(".")[0] for name in names} & packages
            assert used <= allowed, f"{path.relative_to(REPOSITORY)} imports {', '.join(sorted(used - allowed))}"
