# SPDX-License-Identifier: Apache-2.0
"""Loads saved folders the way a stranger does: a process without this project, trl, datasets or peft.

    python foreign_process.py RESULT FOLDER [FOLDER ...]

Reads `inputs.pt` of each folder and writes logits, greedy tokens, answers and loading information of each to RESULT.
"""

import sys

HIDDEN = {"modeling_honeybee", "processing", "training", "hub_upload", "trl", "datasets", "peft", "sklearn"}


class _Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [_Hiding(finder) for finder in sys.meta_path]

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline  # noqa: E402


def inspect(folder: str) -> dict:
    remote = {"trust_remote_code": True}
    saved = torch.load(f"{folder}/inputs.pt")
    auto_classes = [AutoModelForImageTextToText]
    if hasattr(transformers, "AutoModelForVision2Seq"):  # transformers 4
        auto_classes.append(transformers.AutoModelForVision2Seq)
    logits = []
    for auto_class in auto_classes:
        model, info = auto_class.from_pretrained(folder, output_loading_info=True, **remote)
        with torch.no_grad():
            logits.append(model.eval()(**saved["inputs"]).logits)
    tokens = model.generate(**saved["inputs"], **saved["greedy"])
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder, **remote).eval()(**saved["inputs"]).last_hidden_state
    processor = AutoProcessor.from_pretrained(folder, **remote)
    prompt = processor.apply_chat_template(saved["messages"], add_generation_prompt=True)
    prepared = processor(images=saved["image"], text=prompt, add_special_tokens=False, return_tensors="pt")
    ask = pipeline("image-text-to-text", model=folder, **remote)
    items = saved["messages"][0]["content"]
    chats = [
        [{"role": "user", "content": [{**item, "image": image} if item["type"] == "image" else item for item in items]}]
        for image in (saved["image"], saved["other_image"])
    ]
    options = {"return_full_text": False, "max_new_tokens": 6}
    config = AutoConfig.from_pretrained(folder, **remote).text_config
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    return {
        "logits": logits,
        "hidden": hidden,
        "tokens": tokens,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
        "rope_theta": rope["rope_theta"],
        "prepared": dict(prepared),
        "single": [ask(text=chat, **options)[0]["generated_text"] for chat in chats],
        "batched": [row[0]["generated_text"] for row in ask(text=chats * 2, batch_size=4, **options)],
        "module": type(model).__module__,
    }


torch.save({folder: inspect(folder) for folder in sys.argv[2:]}, sys.argv[1])
