# SPDX-License-Identifier: Apache-2.0
"""Loads a folder as a stranger does, with torch, transformers and pillow alone, and asks it one question. Also checks that
its language model answers in it, and its tower sees in it, as each does alone.

    python hub_upload/load_check.py RESULT.json FOLDER [BASE]

Every other installed package is hidden, this project included. With BASE, FOLDER is a peft adapter of that model, and
peft is there too. It runs in a process of its own; of this project it reads one file, `probe_honeybee.py`, which needs no
other.
"""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

OURS = {"modeling_honeybee", "processing", "training", "evaluation", "hub_upload", "serving", "benchmarks", "tests"}


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def needed_distributions(roots: list[str]) -> set[str]:
    """Distributions that `roots` and what they require (extras not counted) consist of."""
    from packaging.requirements import Requirement

    found, queue = set(), list(roots)
    while queue:
        name = _normal(queue.pop())
        if name in found:
            continue
        found.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        for text in requirements:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return found


class _Hiding:
    def __init__(self, finder, hidden: set[str]):
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


def hide_all_but(roots: list[str]) -> None:
    """Makes every installed package that `roots` do not need unimportable in this process."""
    kept = needed_distributions(roots)
    hidden = OURS | {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not kept & {_normal(owner) for owner in owners}
    }
    sys.meta_path[:] = [_Hiding(finder, hidden) for finder in sys.meta_path]


def check_parts(model, name: str) -> None:
    """The probe of this project: the code in the folder may be older than it."""
    path = Path(__file__).parents[1] / "modeling_honeybee" / "probe_honeybee.py"
    spec = importlib.util.spec_from_file_location("probe_honeybee", path)
    probe = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    try:
        probe.check_parts(model, name)
    except ValueError as error:
        sys.exit(str(error))


def check(folder: str, base: str | None) -> dict:
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    remote = {"trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(base or folder, dtype="auto", **remote).eval()
    code = type(model).__module__
    check_parts(model, base or folder)
    if base:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder).eval()
    processor = AutoProcessor.from_pretrained(folder, **remote)
    for what, module in (("model", code), ("processor", type(processor).__module__)):
        if not module.startswith("transformers_modules."):
            sys.exit(f"the {what} came from {module} and not from the folder's own code")

    size = model.config.vision_config.image_size
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(
        images=Image.new("RGB", (size, size), "gray"), text=prompt, add_special_tokens=False, return_tensors="pt"
    )
    with torch.inference_mode():
        if not torch.isfinite(model(**inputs).logits).all():
            sys.exit("the model's logits are not finite numbers; its weights are broken")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {
        "answer": answer,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "chat_templates": templates_of(processor),
    }


def templates_of(processor) -> dict[str, str]:
    """All chat templates by name, also of a processor whose code is older than the property."""
    template = processor.chat_template
    by_name = template if isinstance(template, dict) else {"default": template}
    return getattr(processor, "chat_templates", by_name)


if __name__ == "__main__":
    result, folder, *rest = sys.argv[1:]
    hide_all_but(["torch", "transformers", "pillow", *(["peft"] if rest else [])])
    found = check(folder, rest[0] if rest else None)
    with open(result, "w", encoding="utf-8") as file:
        json.dump(found, file)
