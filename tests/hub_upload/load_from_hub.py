# SPDX-License-Identifier: Apache-2.0
"""Loads a repository by name in a process that has torch, transformers and pillow only.

    python load_from_hub.py RESULT.pt INPUTS.pt REPO_ID REVISION [CODE_REVISION]

INPUTS.pt holds model `inputs`, and `image`, the path of a picture. Writes what each auto class gives to RESULT.pt.
"""

import sys

from hub_upload.load_check import hide_all_but

hide_all_but(["torch", "transformers", "pillow"])

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline  # noqa: E402

target, given, name, revision, *code_revision = sys.argv[1:]
given = torch.load(given)
pinned = {"revision": revision, "trust_remote_code": True}
if code_revision:
    pinned["code_revision"] = code_revision[0]

auto_classes = [AutoModelForImageTextToText]
if hasattr(transformers, "AutoModelForVision2Seq"):  # transformers 4
    auto_classes.append(transformers.AutoModelForVision2Seq)
logits = []
for auto_class in auto_classes:
    model = auto_class.from_pretrained(name, **pinned).eval()
    with torch.no_grad():
        logits.append(model(**given["inputs"]).logits)
with torch.no_grad():
    hidden = AutoModel.from_pretrained(name, **pinned).eval()(**given["inputs"]).last_hidden_state
config, processor = AutoConfig.from_pretrained(name, **pinned), AutoProcessor.from_pretrained(name, **pinned)
content = [{"type": "image", "path": given["image"]}, {"type": "text", "text": "What is it?"}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": [{"type": "image"}, content[1]]}], add_generation_prompt=True
)
if code_revision and transformers.__version__.startswith("4."):  # whose pipeline forgets the code's revision on the way
    model = AutoModelForImageTextToText.from_pretrained(name, **pinned)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
else:
    ask = pipeline("image-text-to-text", model=name, **pinned)
answer = ask(text=[{"role": "user", "content": content}], return_full_text=False, max_new_tokens=6)

try:
    import modeling_honeybee  # noqa: F401

    sys.exit("this project is importable, so nothing here shows that the repository is enough")
except ImportError:
    pass
torch.save(
    {
        "logits": logits,
        "hidden": hidden,
        "answer": answer[0]["generated_text"],
        "chat_templates": processor.chat_templates,
        "num_image_tokens": config.num_image_tokens,
        "prepared": dict(processor(images=given["image"], text=prompt, add_special_tokens=False, return_tensors="pt")),
        "modules": [type(part).__module__ for part in (config, processor, model, ask.model)],
    },
    target,
)
