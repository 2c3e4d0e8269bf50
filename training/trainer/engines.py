# SPDX-License-Identifier: Apache-2.0
"""What makes a run under FSDP2 or DeepSpeed the same as in one process: models are built whole, the head is gathered before
it is read, folders are as one process writes them, and a whole copy answers questions."""

import copy
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule, StateDictType
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import deepspeed
from trl import SFTConfig

from modeling_honeybee.projectors_honeybee import HoneybeeProjector


def read_deepspeed_settings(given: dict | str) -> dict:
    """The settings that `--deepspeed` gives: a mapping, JSON, or the path of a JSON file.

    Raises:
        ValueError: there is no such file, or it does not hold a JSON object.
    """
    if isinstance(given, dict):
        return given
    text = given
    if not given.startswith("{"):
        try:
            with open(given, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--deepspeed {given!r} cannot be read ({error}); give a JSON file with DeepSpeed's settings, for instance "
                "training/configs/deepspeed/zero3.json"
            ) from error
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--deepspeed {given!r} is not JSON ({error}); correct it") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ValueError(
            f'--deepspeed {given!r} has no "zero_optimization" with a stage, such as {{"zero_optimization": {{"stage": 2}}}}; '
            "add it"
        )
    return settings


def check_deepspeed(given: dict | str | None) -> None:
    """Refuses a `--deepspeed` that cannot work, before the trainer's arguments start its processes.

    Raises:
        ValueError: DeepSpeed is not installed, no launcher has started this process, or see [`read_deepspeed_settings`].
    """
    if given is None:
        return
    read_deepspeed_settings(given)
    if not deepspeed.is_deepspeed_available():
        raise ValueError(f"--deepspeed {given!r}: DeepSpeed is not installed; pip install deepspeed, or leave it out")
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(
            f"--deepspeed {given!r} needs a launcher, also for one process: torchrun --nproc_per_node 1 training/sft.py ..."
        )


def settle_deepspeed(training_args: SFTConfig) -> None:
    """Fills a second time what `--deepspeed` leaves to `auto` or leaves out: the trainer's arguments filled it before the
    accumulation steps were known. (The trainer fills the settings of `accelerate launch`, later.)

    Raises:
        ValueError: a setting that is another one in the run's own arguments.
    """
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") == "auto":  # which transformers 4 reads as a number
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(training_args.gradient_accumulation_steps)
    if not training_args.deepspeed:
        return
    given, settings = read_deepspeed_settings(training_args.deepspeed), training_args.hf_deepspeed_config
    for name in ("gradient_accumulation_steps", "train_batch_size"):
        if given.get(name, "auto") == "auto":
            settings.config[name] = "auto"
    for name in ("bf16", "fp16"):  # without the second, transformers 4 gives the model its pixels in half precision
        if name not in given:
            settings.config[name] = {"enabled": "auto"}
    settings.mismatches.clear()
    settings.trainer_config_process(training_args)
    training_args.deepspeed_plugin.gradient_accumulation_steps = settings.config["gradient_accumulation_steps"]
    if settings.mismatches:
        raise ValueError(
            f"--deepspeed {training_args.deepspeed!r}: {'; '.join(line.lstrip('- ') for line in settings.mismatches)}; set "
            'these to "auto", or give the run the same'
        )


def check_saves_whole_models(state) -> None:
    """Refuses an engine that would save shards and no model.

    Args:
        state: of the trainer's accelerator.

    Raises:
        ValueError: with the setting to change.
    """
    if (plugin := getattr(state, "fsdp_plugin", None)) and plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            f"fsdp_state_dict_type={plugin.state_dict_type.name} saves shards and no model; use FULL_STATE_DICT, as "
            "training/configs/accelerate/fsdp2.yaml does"
        )
    if (plugin := state.deepspeed_plugin) and plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model:
        raise ValueError(
            "ZeRO-3 saves shards and no model without stage3_gather_16bit_weights_on_model_save in a --deepspeed file's "
            "zero_optimization, or zero3_save_16bit_model in accelerate's; set it to true"
        )


@contextmanager
def whole_models():
    """Models that are built inside are whole, in every process.

    Once the trainer's arguments exist, transformers splits every model that is built under ZeRO-3: one on `meta`, one to join
    from parts, one to merge an adapter into. The one that is trained is split by the trainer itself.
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
    """peft keeps a frozen original beside a module that is trained in full. Here it gets weights of its own: FSDP2 refuses a
    weight that an embedding in one unit shares with a head in another."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for part in wrapper.original_module.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    if owners[id(parameter)] > 1:
                        setattr(part, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


@contextmanager
def saved_as_one_process(model: nn.Module, state_dict: dict | None):
    """Inside, a model is saved with the code and the tensors that it has in one process.

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


def gather_projector_at_once(model: nn.Module, state) -> None:
    """Lets ZeRO-3 gather the whole projector when it is called, and not part by part as they are called inside.

    Parts are called once for each M in a process's batch, and processes that do not gather the same wait for each other for ever.

    Args:
        state: of the trainer's accelerator.
    """
    if state.deepspeed_plugin is None or state.deepspeed_plugin.zero_stage != 3:
        return
    from deepspeed.utils import set_z3_leaf_modules

    def ask_for_gradient(module, args):
        # ZeRO-3 sums up what is gathered at once when the gradient of its input is there. A frozen tower needs none.
        features, *others = args
        return (features.requires_grad_() if torch.is_grad_enabled() else features), *others

    for projector in set_z3_leaf_modules(model, [HoneybeeProjector]):
        projector.register_forward_pre_hook(ask_for_gradient)


class WholeCopy:
    """A copy of a model, to generate with where an engine shards the weights. Its own are on `meta` until it is filled.

    Sharded weights are gathered layer by layer, by all processes at the same time. In generation they have neither the same
    number of steps nor images in the same batches, and would wait for each other for ever.

    Args:
        model: before it is sharded, and before a hook is put into it that belongs to the original alone.

    Raises:
        ValueError: it is quantized.
    """

    def __init__(self, model: PreTrainedModel | PeftModel):
        if getattr(model, "is_quantized", False):
            raise ValueError(
                "--eval_tasks cannot ask a quantized model that FSDP or ZeRO-3 shards; train it with DDP "
                "(training/configs/accelerate/ddp.yaml), or leave --eval_tasks out"
            )
        empty = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
        }
        self._whole = copy.deepcopy(model, empty).eval()
        self.model = self._whole.get_base_model() if isinstance(model, PeftModel) else self._whole
        vars(self.model).pop("forward", None)  # TRL's calls the original

    @contextmanager
    def filled(self, source: nn.Module, dtype: torch.dtype | None, device: torch.device) -> Iterator[PreTrainedModel]:
        """Inside, it holds the weights of `source`, the sharded model; all processes enter together.

        Args:
            dtype: of the weights, for those of floating point; None for that of `source`.
        """
        places = list(self._whole.named_parameters(remove_duplicate=False))
        weights = {}
        # By order: engines rename modules.
        for (_, place), (_, weight) in zip(places, source.named_parameters(remove_duplicate=False), strict=True):
            if id(place) not in weights:
                weights[id(place)] = nn.Parameter(gathered(weight, dtype, device), requires_grad=False)
        for buffer in self._whole.buffers():
            buffer.data = buffer.data.to(device)
        self._put({name: weights[id(place)] for name, place in places})
        try:
            yield self.model
        finally:
            self._put(dict(places))

    def _put(self, parameters: dict[str, nn.Parameter]) -> None:
        for path, parameter in parameters.items():
            module, _, name = path.rpartition(".")
            setattr(self._whole.get_submodule(module), name, parameter)


@torch.no_grad()
def gathered(weight: nn.Parameter, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
    """A weight of FSDP2 or ZeRO-3 in one piece; all processes call it together."""
    if hasattr(weight, "ds_id"):
        import deepspeed as library

        with library.zero.GatheredParameters([weight]):
            whole = weight.detach().clone()
    else:
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()
    return whole.to(device, dtype if whole.is_floating_point() else None)


def shards_weights(state) -> bool:
    """Whether no process holds a whole model.

    Args:
        state: of the trainer's accelerator.

    Raises:
        ValueError: FSDP's first version shards them; a whole model is not made of its weights here.
    """
    if plugin := getattr(state, "fsdp_plugin", None):
        if plugin.fsdp_version < 2:
            raise ValueError(
                "--eval_tasks cannot ask a model that FSDP1 shards; use fsdp_version 2, as "
                "training/configs/accelerate/fsdp2.yaml does, or leave --eval_tasks out"
            )
        return True
    return state.deepspeed_plugin is not None and state.deepspeed_plugin.zero_stage == 3
