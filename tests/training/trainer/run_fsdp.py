# SPDX-License-Identifier: Apache-2.0
"""Trains the model in FOLDER/start sharded over processes, and says what it did in FOLDER/RANK.json.

    torchrun --nproc_per_node 2 run_fsdp.py FOLDER

Step 1 has images in every process, step 2 in the first alone, and step 3 in none.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from modeling_honeybee import HoneybeeForConditionalGeneration
from modeling_honeybee.processes import leave_processes
from tests.tiny import tiny_inputs
from training.stages import set_trained

WITH_IMAGE, WITHOUT = ((5, "image", 7, 8),), ((5, 6, 7, 8, 9),)
STEPS = [(WITH_IMAGE, WITH_IMAGE), (WITH_IMAGE, WITHOUT), (WITHOUT, WITHOUT)]


def batch(model, step: int, rank: int) -> dict:
    inputs = tiny_inputs(model, rows=STEPS[step][rank], seed=10 * step + rank)
    placeholder = inputs["input_ids"] == model.config.image_token_id
    return {**inputs, "labels": inputs["input_ids"].masked_fill(placeholder, -100)}


def shard(model):
    blocks = set(model._no_split_modules)
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module)
    return fully_shard(model)


def loss_of(model, rank: int) -> float:
    with torch.no_grad():
        return model.eval()(**batch(model, 0, rank)).loss.item()


def main(folder: Path):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = HoneybeeForConditionalGeneration.from_pretrained(folder / "start")
    whole = sum(p.numel() for p in model.parameters())
    set_trained(model, "instruct")
    shard(model.train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(len(STEPS)):
        loss = model(**batch(model, step, rank)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    here = sum(p.to_local().numel() for p in model.parameters())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "end", state_dict=state)
    dist.barrier()
    again = shard(HoneybeeForConditionalGeneration.from_pretrained(folder / "end"))
    said = {"world_size": dist.get_world_size(), "losses": losses, "share": here / whole,
            "trained": loss_of(model, rank), "reloaded": loss_of(again, rank)}  # fmt: skip
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_processes(2)
