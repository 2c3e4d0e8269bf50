# SPDX-License-Identifier: Apache-2.0
"""Parts of the model with a learning rate of their own, as groups of the optimizer."""

from torch import nn
from torch.optim import Optimizer

# Part -> what is in the names of its parameters, with a dot in front; peft and DDP only put more before it.
PARTS = {"vision": ".model.vision_tower.", "projector": ".model.projector."}


def split_groups(optimizer: Optimizer, model: nn.Module, rates: dict[str, float]) -> list[str | None]:
    """Moves the parameters of each part in `rates` into groups with its learning rate, behind the other groups. What else a
    group has, such as its weight decay, they keep. A schedule multiplies the rates of all groups by the same number.

    Returns:
        For each group the part that it holds; None for the rest of the model, which comes first.
    """
    part_of = {id(p): part for name, p in model.named_parameters() for part in rates if PARTS[part] in f".{name}"}
    for group in list(optimizer.param_groups):
        parameters = group["params"]
        group["params"] = [p for p in parameters if id(p) not in part_of]
        for part, rate in rates.items():
            own = [p for p in parameters if part_of.get(id(p)) == part]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return [part_of.get(id(group["params"][0])) for group in optimizer.param_groups]
