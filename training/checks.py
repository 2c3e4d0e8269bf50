# SPDX-License-Identifier: Apache-2.0
"""All that can be wrong with a run, found before a weight is read: settings, output folder, model, data, space."""

import glob
import logging
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from huggingface_hub import HfApi
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from transformers import GenerationConfig, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, SFTConfig, get_peft_config

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration, HoneybeeProjectorConfig
from modeling_honeybee.configuration_honeybee import PIXELWISE_PROJECTORS
from modeling_honeybee.model_folder import NetworkError, read_json
from processing import HoneybeeProcessor, check_processor
from training.arguments import BATCHINGS, HoneybeeArguments
from training.checkpoints import LORA, check_disk, check_output_dir, describe_run, find_checkpoint, global_batch_size
from training.collator import HoneybeeDataCollator
from training.conversations import check_dataset, image_root, load_conversations
from training.engines import settle_deepspeed, whole_models
from training.loading import DTYPES, bytes_of, load_config_and_processor, state_bytes
from training.packed_attention import PACKABLE
from training.recipe.config import load_recipe
from training.recipe.mixture import Mixture
from training.recipe.sources import open_mixture
from training.samples import BadSampleError
from training.saving import check_savable
from training.stages import TRAINED, linear_names, lora_modules, parameter_counts, set_trained

logger = logging.getLogger(__name__)

LOOKED_AT = 256  # samples of a mixture, for one with an image
# With these TRL prepares text. Here the collator prepares samples, with the model's own processor.
PREPARED_BY_TRL = (
    "eos_token", "pad_token", "chat_template_path", "dataset_text_field", "truncation_mode", "shuffle_dataset",
    "pad_to_multiple_of", "completion_only_loss", "assistant_only_loss", "model_init_kwargs",
)  # fmt: skip


@dataclass
class Plan:
    """What a run is going to do.

    Args:
        run: see [`describe_run`].
        checkpoint: to resume from, or None.
        dataset: what the trainer reads: conversations, or the draws of `mixture`.
        collator: makes batches of it, with the model's processor.
        config: of the model.
        parameters: part of the model -> (all, trained) parameters, LoRA's among them.
        disk_bytes: what it will write.
    """

    run: dict
    checkpoint: str | None
    dataset: datasets.Dataset
    mixture: Mixture | None
    collator: HoneybeeDataCollator
    config: HoneybeeConfig
    parameters: dict[str, tuple[int, int]]
    disk_bytes: int


@whole_models()
def check_run(args: HoneybeeArguments, training_args: SFTConfig, model_args: ModelConfig) -> Plan:
    """Checks everything, the quick things first. Completes the settings that follow from others: accumulation from the
    global batch, and where LoRA goes.

    Raises:
        ValueError, OSError: with the value, the limit and the remedy.
    """
    check_arguments(args, training_args, model_args)
    settle_batch_size(args, training_args)
    settle_deepspeed(training_args)
    check_output_dir(training_args.output_dir)
    recipe = load_recipe(args.mixture, args.mixture_settings) if args.mixture is not None else None
    run = describe_run(args, training_args, model_args, recipe)
    checkpoint = find_checkpoint(run, training_args, args.merge)

    config, processor = load_config_and_processor(args, model_args)
    check_processor(config, processor)
    check_savable(config, processor)
    if model_args.model_name_or_path:
        check_generation_config(model_args)
    check_length(training_args, processor)
    _check_packable(args, config)
    with torch.device("meta"):
        skeleton = HoneybeeForConditionalGeneration(config)
    if model_args.use_peft:
        complete_lora(args.stage, model_args, skeleton)
    if model_args.model_name_or_path:
        check_weights(model_args.model_name_or_path, skeleton)
    parameters = count_parameters(skeleton, args.stage, model_args)
    sizes = state_bytes(parameters, config, training_args, model_args)
    merged = sum(total for total, _ in parameters.values()) * bytes_of(model_args.dtype, config)
    disk_bytes = check_disk(
        training_args,
        model_bytes=sizes["trained"] if model_args.use_peft else sizes["weights"],
        optimizer_bytes=sizes["optimizer"],
        extra_bytes=merged if args.merge else 0,
    )

    collator = HoneybeeDataCollator(processor, max_length=training_args.max_length, pack=args.batching == "packed")
    # The first process fills the caches, the others read them.
    with training_args.main_process_first(desc="opening the data"):
        if recipe is None:
            dataset, mixture = load_conversations(args.dataset, args.dataset_split), None
            collator.image_root = image_root(args.dataset)
            check_dataset(dataset, collator.image_root, args.stage == "align", collator.check_length)
            at_once = training_args.train_batch_size * training_args.world_size
            if training_args.dataloader_drop_last and len(dataset) < at_once:
                raise ValueError(
                    f"dataloader_drop_last leaves nothing of {len(dataset)} samples in batches of {at_once}; leave it out "
                    "or lower --per_device_train_batch_size"
                )
        else:
            # What does not fit into max_length is the mixture's to skip and count.
            samples = training_args.max_steps * global_batch_size(training_args)
            path = args.mixture if isinstance(args.mixture, str) else "mixture"
            mixture = open_mixture(recipe, samples, path, collator.check_length)
            if args.stage == "align":
                _check_images(mixture)
            dataset = mixture.as_dataset()
    return Plan(run, checkpoint, dataset, mixture, collator, config, parameters, disk_bytes)


def _check_packable(args: HoneybeeArguments, config: HoneybeeConfig) -> None:
    if args.batching == "packed" and config.text_config.model_type not in PACKABLE:
        raise ValueError(
            f"batching=packed is known to keep conversations apart in {', '.join(PACKABLE)}, and this LLM is of type "
            f"{config.text_config.model_type!r}; use --batching grouped"
        )


def _check_images(mixture: Mixture) -> None:
    draws = range(min(LOOKED_AT, len(mixture)))
    images = []
    for draw in draws:
        with suppress(BadSampleError):
            images.append(mixture.glance(draw)["images"])
    if images and not any(images):
        raise ValueError(
            f"none of the mixture's first {len(draws)} samples has an image, and alignment trains the projector alone, "
            "which reads nothing else; add a captioning dataset, or use --stage instruct"
        )


def check_arguments(args: HoneybeeArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Everything that can be wrong before a file is read.

    Raises:
        ValueError, FileNotFoundError: with the value and the remedy.
    """
    if args.stage not in TRAINED:
        raise ValueError(f"stage={args.stage!r} is unknown; use one of {', '.join(TRAINED)}")
    _check_data_arguments(args, training_args)
    _check_model_arguments(args, model_args)
    _check_trainer_arguments(training_args)
    if training_args.trust_remote_code:
        raise ValueError(
            "trust_remote_code: towers and LLMs with code of their own are not supported, because a saved Honeybee "
            "carries its own code alone; leave it out"
        )
    if model_args.use_peft:
        _check_lora_arguments(args, model_args)
    elif args.merge:
        raise ValueError("--merge writes a LoRA adapter and its base as one model, and there is none; add --use_peft")
    elif given := [name for name in LORA if _is_set(model_args, name) and not name.startswith("load_in")]:
        raise ValueError(f"{', '.join(given)}: a setting of LoRA, which is not used; add --use_peft or leave it out")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        if not model_args.use_peft:
            raise ValueError("load_in_4bit and load_in_8bit: a quantized model cannot be trained; add --use_peft")
        if not model_args.model_name_or_path:
            raise ValueError(
                "load_in_4bit and load_in_8bit quantize a trained model; give --model_name_or_path the output of stage 1"
            )
        if not is_bitsandbytes_available():
            raise ValueError("load_in_4bit and load_in_8bit need bitsandbytes: pip install bitsandbytes")


def _is_set(settings, name: str) -> bool:
    return getattr(settings, name) not in (None, type(settings).__dataclass_fields__[name].default)


def _check_lora_arguments(args: HoneybeeArguments, model_args: ModelConfig) -> None:
    lora_modules(args.stage)
    if model_args.lora_alpha <= 0:
        raise ValueError(f"lora_alpha={model_args.lora_alpha} would scale LoRA away; use twice lora_r, for instance")
    if _is_set(model_args, "lora_target_parameters"):
        raise ValueError(
            f"lora_target_parameters={model_args.lora_target_parameters}: LoRA goes into the LLM's linear layers; name them "
            "with --lora_target_modules"
        )
    if _is_set(model_args, "lora_task_type"):
        raise ValueError(f"lora_task_type={model_args.lora_task_type!r}: a Honeybee is a CAUSAL_LM; leave it out")


def _check_data_arguments(args: HoneybeeArguments, training_args: SFTConfig) -> None:
    if args.dataset is None and args.mixture is None:
        raise ValueError(
            "no data: give --dataset a Hub name or a path, or --mixture a recipe (or no arguments at all for the quickstart)"
        )
    if args.mixture is None and args.mixture_settings:
        raise ValueError(
            f"--set {' '.join(args.mixture_settings)} changes a mixture, and there is none; give --mixture"
        )
    if args.mixture is not None:
        if args.dataset is not None:
            raise ValueError(f"--dataset {args.dataset} and --mixture: give one; a mixture takes datasets under `own`")
        if args.dataset_split != "train":
            raise ValueError(
                f"--dataset_split {args.dataset_split} is for --dataset; a mixture's own datasets have a `split` each"
            )
        if training_args.max_steps <= 0:
            raise ValueError(
                f"max_steps={training_args.max_steps}: a mixture has no end; give --max_steps the length of the run"
            )
        if training_args.ignore_data_skip:
            raise ValueError("ignore_data_skip would read the mixture from its start after resuming; leave it out")
    if training_args.packing or training_args.padding_free:
        raise ValueError(
            "TRL's packing and padding_free are not available for samples with images; leave them out and use "
            "--batching packed"
        )
    for name in PREPARED_BY_TRL:
        if _is_set(training_args, name):
            raise ValueError(
                f"{name}={getattr(training_args, name)!r} is for data and models that TRL prepares; here the model's own "
                "processor prepares the samples, and it would change nothing; leave it out"
            )
    # The trainer's own grouping, of transformers 4 and of 5.
    sampling = getattr(training_args, "train_sampling_strategy", None) == "group_by_length"
    if sampling or getattr(training_args, "group_by_length", False):
        raise ValueError("group_by_length does not know how long a sample is; use --batching grouped")
    if args.batching not in BATCHINGS:
        raise ValueError(f"batching={args.batching!r} is unknown; use one of {', '.join(BATCHINGS)}")
    if training_args.eval_strategy != IntervalStrategy.NO:
        raise ValueError(
            f"eval_strategy={training_args.eval_strategy.value}: nothing is evaluated while training; leave it out, and "
            "score checkpoints with evaluation/run.py"
        )


def _check_model_arguments(args: HoneybeeArguments, model_args: ModelConfig) -> None:
    if model_args.dtype not in DTYPES:
        raise ValueError(f"dtype={model_args.dtype!r} is unknown; use one of {', '.join(filter(None, DTYPES))}")
    parts = (args.vision_model, args.text_model)
    if args.image_size is not None and args.image_size < 1:
        raise ValueError(f"image_size={args.image_size} must be at least one patch; leave it out for the tower's own")
    path = model_args.model_name_or_path
    if path:
        new = (*parts, args.image_size, args.vision_feature_layer, args.projector or None)
        if any(value is not None for value in new):
            raise ValueError(
                f"--model_name_or_path {path} already has a tower, an LLM and a projector; leave out --vision_model, "
                "--text_model, --projector, --image_size and --vision_feature_layer, or leave it out to start a new model"
            )
        _check_model_folder(path)
        return
    if not all(parts):
        raise ValueError(
            "no model: give --model_name_or_path a Honeybee checkpoint, or both --vision_model and --text_model "
            "to join them with a new projector"
        )
    if _is_set(model_args, "model_revision"):
        raise ValueError(
            f"model_revision={model_args.model_revision!r} is for --model_name_or_path; download the parts that you want "
            "and give their folders"
        )
    settings = args.projector or {}
    example = 'such as --projector \'{"projector_type": "c-abs", "num_query_tokens": 144}\''
    if "projector_type" not in settings:
        raise ValueError(f"--projector {settings}: a new model needs the setting projector_type; give it, {example}")
    HoneybeeProjectorConfig.from_settings(settings)
    if settings["projector_type"] not in PIXELWISE_PROJECTORS and settings.get("num_query_tokens") is None:
        raise ValueError(
            f"--projector {settings}: num_query_tokens, the visual tokens of an image, is missing; give it, {example}"
        )


def _check_model_folder(path: str) -> None:
    if (os.path.isabs(path) or path.startswith(".")) and not os.path.isdir(path):
        raise ValueError(f"{path!r} does not exist; give the output folder of a finished stage, or a Hub name")
    if not os.path.isdir(path):
        return
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        raise ValueError(
            f"{path!r} is a LoRA adapter and not a whole model; give the whole model that --merge writes beside it "
            '(README, "Train your own")'
        )
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"{path!r} is not a model: it has no config.json; give the output folder of a finished stage")
    model_type = read_json(Path(path, "config.json")).get("model_type")
    if model_type != "honeybee":
        raise ValueError(
            f"{path!r} is not a Honeybee model but has model_type={model_type!r}; to start from its parts give "
            "--vision_model and --text_model"
        )


def _check_trainer_arguments(training_args: SFTConfig) -> None:
    for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs"):
        if not isinstance(getattr(training_args, name), (dict, type(None))):
            raise ValueError(f"{name}={getattr(training_args, name)!r} is not a mapping of settings to values")
    schedule = training_args.lr_scheduler_kwargs or {}
    rate, floor, share = training_args.learning_rate, schedule.get("min_lr", 0), schedule.get("min_lr_rate") or 0
    if not 0 < rate < math.inf:
        raise ValueError(f"learning_rate={rate} must be more than 0 and finite; stage 1 uses 3e-4, stage 2 2e-5")
    if not isinstance(floor, (int, float)) or not floor >= 0:
        raise ValueError(
            f"lr_scheduler_kwargs: the floor min_lr={floor!r} must be a number of at least 0 (in YAML 1.0e-6, with a point)"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"lr_scheduler_kwargs: min_lr_rate={share} must be a share of learning_rate, from 0 to 1")
    if floor > rate:
        raise ValueError(
            f"lr_scheduler_kwargs: the floor min_lr={floor} is above learning_rate={rate}; lower it, for instance to "
            f"{rate / 30:.1e}"
        )
    _check_optimizer(training_args)
    _check_data_loader(training_args)
    _check_trackers(training_args)
    if training_args.max_steps == 0 or training_args.max_steps < -1:
        raise ValueError(f"max_steps={training_args.max_steps} must be more than 0, or -1 for --num_train_epochs")
    if training_args.max_steps < 0 and not 0 < training_args.num_train_epochs < math.inf:
        raise ValueError(
            f"num_train_epochs={training_args.num_train_epochs} must be more than 0 and finite, or give --max_steps"
        )
    if not 0 <= training_args.label_smoothing_factor < 1:
        raise ValueError(f"label_smoothing_factor={training_args.label_smoothing_factor} must be from 0 to below 1")
    if not training_args.max_grad_norm >= 0:
        raise ValueError(f"max_grad_norm={training_args.max_grad_norm} must be at least 0 (0: no clipping)")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
        if getattr(training_args, name) <= 0:
            raise ValueError(f"{name}={getattr(training_args, name)} must be more than 0")
    if training_args.max_length is not None and training_args.max_length < 1:
        raise ValueError(f"max_length={training_args.max_length} must be at least 1, or none")
    if training_args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel: Liger knows no model of type honeybee, it would change nothing; leave it out"
        )
    steps, warmup = training_args.max_steps, training_args.get_warmup_steps(max(training_args.max_steps, 0))
    if 0 < steps <= warmup:
        raise ValueError(
            f"the warm-up of {warmup} steps does not end within max_steps={steps}; lower --warmup_steps, for instance "
            f"to {steps // 25}"
        )
    if training_args.n_gpu > 1:
        raise ValueError(
            f"{training_args.n_gpu} GPUs are visible to one process; start one process for each with `accelerate "
            "launch` (training/configs/README.md), or show it one with CUDA_VISIBLE_DEVICES=0"
        )
    if training_args.save_strategy == SaveStrategy.STEPS and training_args.save_steps <= 0:
        raise ValueError(f"save_steps={training_args.save_steps} must be more than 0, or --save_strategy no")
    if training_args.save_strategy == SaveStrategy.BEST or training_args.load_best_model_at_end:
        raise ValueError(
            "save_strategy=best and load_best_model_at_end: nothing is evaluated while training; leave them out, and "
            "score checkpoints with evaluation/run.py"
        )
    _check_hub(training_args)


def _check_optimizer(training_args: SFTConfig) -> None:
    optimizer, schedule = training_args.optim.value, training_args.lr_scheduler_type.value
    try:
        if not optimizer.removeprefix("paged_").startswith("adamw"):
            with suppress(ValueError):  # some want to see the model
                Trainer.get_optimizer_cls_and_kwargs(training_args)
            return
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(training_args)
        settings = {**settings, "weight_decay": training_args.weight_decay}
        get_scheduler(
            schedule,
            kind([torch.zeros(1, requires_grad=True)], **settings),
            num_warmup_steps=0,
            num_training_steps=max(training_args.max_steps, 1),
            scheduler_specific_kwargs=training_args.lr_scheduler_kwargs,
        )
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"optim={optimizer} with betas, epsilon and weight_decay, or lr_scheduler_type={schedule} with "
            f"lr_scheduler_kwargs={training_args.lr_scheduler_kwargs} cannot be: {error}; correct what it names"
        ) from error


def _check_data_loader(training_args: SFTConfig) -> None:
    try:
        DataLoader(
            [0],
            num_workers=training_args.dataloader_num_workers,
            prefetch_factor=training_args.dataloader_prefetch_factor,
            persistent_workers=training_args.dataloader_persistent_workers,
        )
    except ValueError as error:
        raise ValueError(
            f"dataloader_num_workers={training_args.dataloader_num_workers} with dataloader_prefetch_factor="
            f"{training_args.dataloader_prefetch_factor} and dataloader_persistent_workers="
            f"{training_args.dataloader_persistent_workers} cannot be: {error}; correct what it names"
        ) from error
    if training_args.accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config: dispatch_batches cuts batches by rows, and samples have different numbers of images; leave "
            "it out"
        )


def _check_trackers(training_args: SFTConfig) -> None:
    try:
        for callback in get_reporting_integration_callbacks(training_args.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"report_to={training_args.report_to}: {error} Or give --report_to none") from error


def _check_hub(training_args: SFTConfig) -> None:
    if not training_args.push_to_hub:
        return
    try:
        HfApi(token=training_args.hub_token).whoami()
    except (NetworkError, OSError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"push_to_hub: the Hub cannot be used ({said}); log in with `hf auth login`, or leave it out and upload the "
            "finished model with hub_upload/push.py"
        ) from error


def settle_batch_size(args: HoneybeeArguments, training_args: SFTConfig) -> None:
    """Sets the accumulation steps that make `global_batch_size` of what the processes take at a time.

    Raises:
        ValueError: it does not divide, or accumulation was given and makes another number.
    """
    wanted = args.global_batch_size
    if wanted is None:
        return
    at_once = training_args.train_batch_size * training_args.world_size
    given = training_args.gradient_accumulation_steps
    shape = f"per_device_train_batch_size={training_args.train_batch_size} in {training_args.world_size} processes"
    if wanted < 1 or wanted % at_once:
        raise ValueError(
            f"global_batch_size={wanted} is not a multiple of {at_once} ({shape}); change --per_device_train_batch_size "
            "to a divisor, or the number of processes"
        )
    if given > 1 and given * at_once != wanted:
        raise ValueError(
            f"global_batch_size={wanted}, but {shape} and gradient_accumulation_steps={given} make {given * at_once}; "
            "leave gradient_accumulation_steps out, it follows"
        )
    training_args.gradient_accumulation_steps = wanted // at_once


def check_length(training_args: SFTConfig, processor: HoneybeeProcessor) -> None:
    """Raises a ValueError where `max_length` has no room for text behind one image."""
    if training_args.max_length is not None and processor.num_image_tokens >= training_args.max_length:
        raise ValueError(
            f"max_length={training_args.max_length} leaves no room for text: an image is {processor.num_image_tokens} "
            "visual tokens; raise it"
        )


def check_generation_config(model_args: ModelConfig) -> None:
    """Raises a ValueError where the model's generation_config.json cannot be loaded."""
    path = model_args.model_name_or_path
    try:
        GenerationConfig.from_pretrained(path, revision=model_args.model_revision or "main")
    except OSError:
        pass  # there is none, and none is needed
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the generation_config.json of {path!r} cannot be loaded ({error}); correct what it names, or remove the file"
        ) from error


def check_weights(path: str, skeleton: HoneybeeForConditionalGeneration) -> None:
    """Compares the names and shapes in the safetensors files of a folder with what its config makes.

    Raises:
        ValueError: no weights, tensors that are missing, or of other shapes.
    """
    if not os.path.isdir(path) or getattr(skeleton.config, "quantization_config", None):
        return
    files = glob.glob(os.path.join(glob.escape(path), "*.safetensors"))
    if not files:
        if not glob.glob(os.path.join(glob.escape(path), "*.bin")):
            raise ValueError(f"{path!r} has no weights (*.safetensors); give the output folder of a finished stage")
        return
    shapes = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                names = tensors.keys()
                shapes |= {name: tensors.get_slice(name).get_shape() for name in names}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file!r} cannot be read ({error}); copy or save it again") from error
    needed = {name: list(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    if skeleton.config.tie_word_embeddings:
        needed.pop("lm_head.weight")
    wrong = [f"{name} is {shapes[name]} and should be {shape}" for name, shape in needed.items()
             if name in shapes and shapes[name] != shape]  # fmt: skip
    wrong += [f"{name} is missing" for name in needed if name not in shapes]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"the weights in {path!r} do not belong to its config.json: {'; '.join(wrong[:3])}{more}; give the folder "
            "as a finished stage left it"
        )


def count_parameters(
    skeleton: HoneybeeForConditionalGeneration, stage: str, model_args: ModelConfig
) -> dict[str, tuple[int, int]]:
    """[`parameter_counts`] of the model as it will be trained; LoRA is put into `skeleton` for it."""
    # LoRA takes the place of training the LLM; peft makes its own parameters trainable.
    set_trained(skeleton, "align" if model_args.use_peft else stage)
    if model_args.use_peft:
        names = ", ".join(linear_names(skeleton.model.language_model))
        try:
            with torch.device("meta"):
                get_peft_model(skeleton, get_peft_config(model_args))
        except (ValueError, re.error) as error:
            raise ValueError(
                f"LoRA with lora_r={model_args.lora_r}, lora_dropout={model_args.lora_dropout} and "
                f"lora_target_modules={model_args.lora_target_modules!r} cannot be put into this model ({error}); its LLM's "
                f"linear layers are named {names}"
            ) from error
    counts = parameter_counts(skeleton)
    if isinstance(skeleton.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            f"lora_target_modules={model_args.lora_target_modules!r} reach the head, and TRL's loss reads its weight without "
            "the adapter; leave lm_head out there, and train it in full with --lora_modules_to_save lm_head"
        )
    if counts["vision_tower"][1]:
        raise ValueError(
            f"lora_target_modules={model_args.lora_target_modules!r} reach into the vision tower, which no stage trains; "
            "give names alone (q_proj v_proj), of which the LLM's are taken, or all-linear"
        )
    return counts


def complete_lora(stage: str, model_args: ModelConfig, skeleton: HoneybeeForConditionalGeneration) -> None:
    """Sets where LoRA goes, and that the projector is trained beside it: see [`lora_modules`].

    Raises:
        ValueError: a name that no layer has.
    """
    targets, language_model = model_args.lora_target_modules, skeleton.model.language_model
    if targets == "all-linear":
        targets = linear_names(language_model)
    for target in targets if isinstance(targets, list) else ():
        if not any(f".{name}".endswith(f".{target}") for name, _ in language_model.named_modules()):
            raise ValueError(
                f"lora_target_modules: the LLM has no {target!r}; its linear layers are named "
                f"{', '.join(linear_names(language_model))}"
            )
    modules = lora_modules(stage, targets) if targets else lora_modules(stage)
    model_args.lora_target_modules = modules["target_modules"]
    given = model_args.lora_modules_to_save or []
    parts = [name for part in ("model.language_model", "lm_head", "model.projector")
             for name, _ in skeleton.get_submodule(part).named_modules(prefix=part)]  # fmt: skip
    for name in given:
        if not any(f".{part}".endswith(f".{name}") for part in parts):
            raise ValueError(
                f"lora_modules_to_save: LLM and head have no {name!r}; lm_head and embed_tokens are such names, and the "
                "projector is trained without being named"
            )
    model_args.lora_modules_to_save = modules["modules_to_save"] + [name for name in given if name != "projector"]
