# SPDX-License-Identifier: Apache-2.0
"""What a folder must hold before it may be published: the model or adapter, its code, its processor, and no pickle."""

import ast
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

import modeling_honeybee
import processing
from modeling_honeybee import HoneybeeConfig
from modeling_honeybee.configuration_honeybee import AUTO_MAP
from modeling_honeybee.model_folder import CONVERSION_FILE, RUN_FILE, STATE_FILE, read_json, read_model_config
from processing import HoneybeeProcessor, check_processor

# The code that travels with a checkpoint, by file name.
CODE = {
    path.name: path
    for package in (modeling_honeybee, processing)
    for path in Path(package.__path__[0]).glob("*_honeybee.py")
}
# The files whose classes a saved folder names.
ENTRY_CODE = {f"{name.partition('.')[0]}.py" for name in AUTO_MAP.values()}
PROCESSOR_CODE = "processing_honeybee.py"
PUBLISHED = (
    "config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors",
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "processor_config.json", "preprocessor_config.json", "chat_template.jinja",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "LICENSE*", "NOTICE*", *CODE,
)  # fmt: skip
# What training leaves behind and `push.py` leaves out without asking, pickles included. Some of these files name places on
# somebody's disk; the card says what others may know of them.
BY_PRODUCTS = (
    "training_args.bin", STATE_FILE, RUN_FILE, CONVERSION_FILE,
    "loss.png", "tasks.png", "run_summary.md", "checkpoint-*", "runs", "README.md", ".git", ".gitattributes", ".cache",
    # Of older versions. transformers 4 cannot load a repository that has it; `load_in_fresh_process` checks that no template
    # is lost.
    "additional_chat_templates",
)  # fmt: skip
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill"}


class ExportError(ValueError):
    """A folder that must not be published; the message says why and what to do."""


@dataclass
class Export:
    """A folder that passed [`check_folder`].

    `files` maps names in the repository to files; `left_out` are the other names. `adapter` is the content of
    adapter_config.json, None for a whole model, whose `config` is then set.
    """

    folder: Path
    files: dict[str, Path]
    left_out: list[str]
    processor: HoneybeeProcessor
    config: HoneybeeConfig | None = None
    adapter: dict | None = None
    notes: list[str] = field(default_factory=list)


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle by its name or its content: a stream of protocol 2 or later, or torch's archive."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return True
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file begins with the length of its header, which may look like a pickle. No pickle has an opcode 0.
    safetensors = head[4:] == bytes(4) + b"{"
    if head[:1] == b"\x80" and len(head) > 1 and 2 <= head[1] <= 5 and not safetensors:
        return True
    if head[:2] == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return False


def is_published(name: str) -> bool:
    """Whether a file of this name in a model repository is one that `push.py` puts there."""
    return _matches(name, PUBLISHED)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def sort_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """What of a folder is published, and what is left out.

    Raises:
        ExportError: a pickle.
    """
    files, left_out = {}, []
    for root, folders, names in os.walk(folder):
        inside = Path(root).relative_to(folder)
        if root == str(folder):
            left_out += [f"{name}/" for name in sorted(folders) if _matches(name, BY_PRODUCTS)]
            folders[:] = [name for name in folders if not _matches(name, BY_PRODUCTS)]
        for name in sorted(names):
            path, relative = Path(root, name), (inside / name).as_posix()
            if inside == Path() and _matches(name, BY_PRODUCTS):
                left_out.append(relative)
            elif is_pickle(path):
                raise ExportError(
                    f"{path} is a pickle, which can run code on the machine of whoever loads it; save the weights as "
                    "safetensors (model.save_pretrained) and remove this file"
                )
            elif is_published(relative):
                files[relative] = path
            else:
                left_out.append(relative)
    return files, left_out


def _check_config(folder: Path) -> HoneybeeConfig:
    saved = read_model_config(folder, str(folder), error_class=ExportError)
    if saved.get("auto_map") != AUTO_MAP:
        raise ExportError(
            f"{folder}/config.json: auto_map is {saved.get('auto_map')}, so transformers would not find the code in the "
            f"folder; it must be {AUTO_MAP}. Load the model and save it again with save_pretrained"
        )
    return HoneybeeConfig.from_dict(saved)


def _imports(path: Path) -> tuple[set[str], set[str]]:
    """What a file imports: files beside it, and modules. As transformers, which asks for the packages before it runs the
    code, it leaves out what is imported in a `try`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {node for outer in ast.walk(tree) if isinstance(outer, ast.Try) for node in outer.body}
    beside, modules = set(), set()
    for node in ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            beside.add(f"{node.module or ''}.py")
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return beside, modules


def _check_code(folder: Path, files: dict[str, Path], entries: set[str]) -> list[str]:
    """Checks the code files `entries`, and all that they import. Returns the names of those that are not this version's."""
    needed, queue = set(), set(entries)
    while queue:
        name = queue.pop()
        if name not in files:
            raise ExportError(
                f"{folder} lacks code that its readers need: {name}; save model and processor again with "
                "save_pretrained, which copies it"
            )
        needed.add(name)
        queue |= _imports(files[name])[0] - needed
    for name in sorted(set(files) & set(CODE)):
        for module in sorted(_imports(files[name])[1]):
            top = module.split(".")[0]
            if top not in {"torch", "transformers"} and top not in sys.stdlib_module_names:
                raise ExportError(
                    f"{files[name]} imports {module}; code in a model repository may import torch, transformers and "
                    "the other code files in the folder. Save the model again with this version of Honeybee"
                )
    return [name for name in sorted(needed) if files[name].read_bytes() != CODE[name].read_bytes()]


def _check_weights(folder: Path, files: dict[str, Path], name: str) -> None:
    """Every file of weights can be read, and an index names what is there."""
    index = f"{name}.index.json"
    if index in files:
        expected: dict[str, set] = {}
        for tensor, file in read_json(files[index], ExportError).get("weight_map", {}).items():
            expected.setdefault(file, set()).add(tensor)
        if name in files:
            raise ExportError(f"{folder} has both {name} and {index}; remove the one that is not the model's")
    elif name in files:
        expected = {name: set()}
    else:
        raise ExportError(f"{folder} has no {name}; save the model with save_pretrained, which writes safetensors")
    for file, tensors in expected.items():
        if file not in files:
            raise ExportError(f"{folder} lacks {file}, which {index} names; copy it there or save the model again")
        try:
            with safe_open(files[file], "pt") as weights:
                found = set(weights.keys())
        except (SafetensorError, OSError) as error:
            raise ExportError(
                f"{files[file]} is not a whole safetensors file ({error}); save the model again"
            ) from error
        if missing := sorted(tensors - found):
            raise ExportError(f"{files[file]} lacks {len(missing)} tensors that {index} names, such as {missing[0]}")
    shards = {file for file in files if file.endswith(".safetensors")}
    if surplus := sorted(shards - set(expected)):
        raise ExportError(f"{folder} has weights that belong to no index: {', '.join(surplus)}; remove them")


def _check_processor(folder: Path, files: dict[str, Path]) -> HoneybeeProcessor:
    missing = [
        name
        for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        if name not in files
    ]
    if missing:
        raise ExportError(
            f"{folder} has no complete processor: {', '.join(missing)} missing. Save it into the folder: "
            f'HoneybeeProcessor.from_pretrained(BASE).save_pretrained("{folder}")'
        )
    try:
        processor = HoneybeeProcessor.from_pretrained(folder)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    except Exception as error:  # jinja, tokenizers and PIL each raise their own
        raise ExportError(f"the processor in {folder} does not work: {error}") from error
    if prompt.count(processor.image_token) != 1 or "What is it?" not in prompt:
        raise ExportError(
            f"the chat template in {folder} does not render an image and a question but {prompt!r}; save the processor "
            "again"
        )
    return processor


def check_folder(folder: Path) -> Export:
    """Checks everything about a folder that can be seen without running its model.

    Raises:
        ExportError: with what is wrong and the remedy.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder; give the output folder of a run, or of save_pretrained")
    files, left_out = sort_files(folder)
    export = Export(folder, files, left_out, processor=None)
    if "adapter_config.json" in files:
        export.adapter = read_json(files["adapter_config.json"], ExportError)
        _check_weights(folder, files, "adapter_model.safetensors")
        changed = _check_code(folder, files, {PROCESSOR_CODE})
    else:
        export.config = _check_config(folder)
        _check_weights(folder, files, "model.safetensors")
        changed = _check_code(folder, files, ENTRY_CODE)
    export.processor = _check_processor(folder, files)
    if export.config is not None:
        try:
            check_processor(export.config, export.processor)
        except ValueError as error:
            raise ExportError(f"{folder}: {error}") from error
    if changed:
        export.notes.append(f"code of another version of Honeybee, published as it is: {', '.join(changed)}")
    return export


def lay_out(export: Export, target: Path, texts: dict[str, str]) -> None:
    """Lays the repository out in `target`: links to the files, and `texts` by name in place of or beside them."""
    for name, path in export.files.items():
        if name not in texts:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).symlink_to(path.resolve())
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8")


def load_in_fresh_process(export: Export, staged: Path, base: str | None = None) -> dict:
    """Runs `load_check.py` on the staged folder of `export`; `base` is an adapter's base model. Returns what it found.

    Raises:
        ExportError: with the last line of what the process said, or a chat template that did not arrive.
    """
    with tempfile.TemporaryDirectory() as work:
        result = Path(work, "result.json")
        process = subprocess.run(
            [sys.executable, Path(__file__).with_name("load_check.py"), result, staged, *([base] if base else [])],
            cwd=work,
            env={**os.environ, "HF_MODULES_CACHE": str(Path(work, "modules")), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if process.returncode:
            said = [line for line in process.stdout.splitlines() if line.strip()] or ["it said nothing"]
            raise ExportError(f"the folder does not work in a process without this project: {said[-1]}")
        found = json.loads(result.read_text(encoding="utf-8"))
    lost = sorted(set(export.processor.chat_templates.items()) - set(found["chat_templates"].items()))
    if lost:
        raise ExportError(
            f"the chat template {lost[0][0]!r} would not reach those who load it by name: the files of "
            "additional_chat_templates are left out. Save the processor again with this version of Honeybee, which writes "
            "them into processor_config.json, or remove it"
        )
    return found
