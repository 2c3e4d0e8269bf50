# SPDX-License-Identifier: Apache-2.0
"""What FSDP2 and DeepSpeed need, so that a run in them is the run of one process: models that are built whole, a head that
is gathered before it is read, and folders as one process writes them."""

from collections import Counter
from contextlib import contextmanager

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.integrations import deepspeed


@contextmanager
def whole_models():
    """Models that are built inside are whole, in every process.

    Once the trainer's arguments exist, transformers cuts up each model that is built for ZeRO-3, also one on `meta`, one to
    join from parts, and one to merge an adapter into. The trainer cuts up the one that it trains by itself.
    """
    settings = deepspeed._hf_deepspeed_config_weak_ref  # there is no public way to ask for it
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = settings


def gather_head_before_use(model: PreTrainedModel | PeftModel) -> None:
    """Lets FSDP2 gather the head's weight once the hidden states are there.

    TRL multiplies with `lm_head.weight` and does not call the module. Where the head is sharded as a unit of its own, as
    accelerate does with models whose last norm is not a direct child of the base model, nothing would gather it then, nor
    sum up its gradient over the processes. What is gathered already stays as it is.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model

    def gather(*unused):
        head = model.get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()

    model.base_model.register_forward_hook(gather)


def untie_originals(model: nn.Module) -> None:
    """Gives the frozen original that peft keeps beside a module trained in full weights of its own: FSDP2 refuses a weight
    that is shared by an embedding in one unit and a head in another."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for part in wrapper.original_module.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    if owners[id(parameter)] > 1:
                        setattr(part, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


@contextmanager
def saved_as_one_process(model: nn.Module, state_dict: dict | None):
    """What is saved inside has the code and the tensors of a model that is in one process.

    FSDP2 changes the model's class, and transformers copies the file of that class as the code of the checkpoint. And a
    tied head is gathered as a tensor of its own, which would be written beside the embedding.
    """
    own_class = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = own_class.__bases__[-1]
    if state_dict and model.config.tie_word_embeddings and not isinstance(model, PeftModel):
        state_dict |= {name: state_dict[source] for name, source in model._tied_weights_keys.items()}
    try:
        yield
    finally:
        model.__class__ = own_class
