# SPDX-License-Identifier: Apache-2.0
"""Compares a converted folder with what the official code computed; run by `convert_official.py --verify`.

    python hub_upload/verify_conversion.py FOLDER REFERENCE NAMES.json [FOLDER REFERENCE NAMES.json ...]

Imports nothing of this project: the folder is loaded with the code that it carries. Prints one line a quantity and
exits with 1 where a limit is passed. The D-Abstractor's limits are wider: its float32 reference is that far from float64.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText


def placed(ids: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """The official -1 at image positions becomes the placeholder's id."""
    return ids.masked_fill(ids < 0, image_token_id)


def worst_gradient(parameters: dict, gradients: dict[str, torch.Tensor], names: dict[str, str]) -> float:
    """The largest relative difference of the norm of a gradient.

    The bias of a key shifts all scores of a softmax alike: its gradient is 0 but for rounding, and relative to that
    means nothing. Norms are compared relative to themselves or to a ten-thousandth of the largest one.
    """
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    floor, worst = 1e-4 * max(norms.values()), 0.0
    for name, norm in norms.items():
        ours = parameters[names[f"abstractor.{name.removeprefix('abstractor.')}"]].grad
        worst = max(worst, abs(ours.norm().item() - norm) / max(norm, floor))
    return worst


def unequal_tokens(model, io: dict[str, torch.Tensor], expected: torch.Tensor) -> int:
    """How many tokens of greedy answers are others than the official ones."""
    generated = model.generate(
        input_ids=placed(io["gen_input_ids"], model.config.image_token_id),
        attention_mask=io["gen_attention_mask"],
        pixel_values=io["pixel_values"],
        max_new_tokens=20,
        do_sample=False,
    )[:, io["gen_input_ids"].shape[1] :]
    length = generated.shape[1]
    return int((generated != expected[:, :length]).sum() + expected[:, length:].count_nonzero())


def compare_folder(folder: str, reference: str, names_file: str) -> bool:
    """Prints the figures of one folder; True where all are within their limits.

    NAMES.json maps official tensor names to those of the folder.
    """
    io, gradients = load_file(f"{reference}/io.safetensors"), load_file(f"{reference}/projector_grads.safetensors")
    facts = json.loads(Path(reference, "io.json").read_text(encoding="utf-8"))
    names = json.loads(Path(names_file).read_text(encoding="utf-8"))
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    config = model.config
    wide = config.projector_config.projector_type == "d-abs"
    vocab_size = io["logits"].shape[-1]
    rows = []

    def compare(what: str, difference: float, limit: float):
        rows.append((what, difference, limit, difference <= limit))

    pixels = io["pixel_values"]
    tokens = model.model.get_visual_tokens(pixels)
    compare("projector output", (tokens - io["projector_output"]).abs().max().item(), 5e-4 if wide else 1e-4)

    # The official training loop gives the language model no attention mask.
    outputs = model(input_ids=placed(io["input_ids"], config.image_token_id), pixel_values=pixels)
    logits = outputs.logits[..., :vocab_size]
    compare("logits", (logits - io["logits"]).abs().max().item(), 5e-4 if wide else 1e-4)
    loss = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), io["labels"][:, 1:].flatten(), ignore_index=-100
    )
    compare("loss", abs(loss.item() - io["loss"].item()), 1e-4 if wide else 1e-5)

    loss.backward()
    worst = worst_gradient(dict(model.named_parameters()), gradients, names)
    compare("gradient norms (relative)", worst, 1e-2 if wide else 1e-3)

    if "mixed_input_ids" in io:
        with torch.no_grad():
            mixed = model(
                input_ids=placed(io["mixed_input_ids"], config.image_token_id),
                pixel_values=io["mixed_pixel_values"],
            ).logits[..., :vocab_size]
        compare("logits, mixed batch", (mixed - io["mixed_logits"]).abs().max().item(), 5e-4 if wide else 1e-4)

    unequal = unequal_tokens(model, io, torch.tensor(facts["generate"]["ids"]))
    compare("greedy tokens that differ", float(unequal), 0.0)

    print(f"{folder} against {reference}")
    for what, difference, limit, fine in rows:
        print(f"  {what:28} {difference:10.2e}  limit {limit:.0e}  {'ok' if fine else 'TOO FAR'}")
    return all(fine for *_, fine in rows)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    results = [compare_folder(*arguments[i : i + 3]) for i in range(0, len(arguments), 3)]
    sys.exit(0 if all(results) else 1)
