# SPDX-License-Identifier: Apache-2.0
"""What is refused before a weight is read: settings that cannot be, and models and data that do not fit them."""

import glob
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from transformers import GenerationConfig, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig, SFTConfig

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration, HoneybeeProjectorConfig
from modeling_honeybee.configuration_honeybee import PIXELWISE_PROJECTORS
from modeling_honeybee.model_folder import NetworkError, read_model_config
from processing import HoneybeeProcessor, check_processor
from training.collator import CROPS, most_crops
from training.recipe.mixture import Mixture
from training.run.arguments import BATCHINGS, HoneybeeArguments
from training.run.loading import DTYPES, projector_settings
from training.run.lora import check_lora_settings
from training.run.saving import check_savable
from training.run.settings import Settings, is_set
from training.samples import BadSampleError
from training.stages import TRAINED, trains_language_model
from training.trainer.kernels import check_compile, check_liger
from training.trainer.packed_attention import PACKABLE

SEARCHED_FOR_AN_IMAGE = 256  # samples of a mixture

OF_TRL = (
    "it is for data and models that TRL prepares; here the model's own processor prepares the samples, and it would change "
    "nothing; leave it out"
)
PACKING = (
    "TRL's packing and padding_free are not available for samples with images; leave them out and use --batching packed"
)
GROUPING = "the trainer's group_by_length does not know how long a sample is; use --batching grouped"
# Settings that ask for what a run does not do, and why. What would change nothing is in `settings.WITHOUT_EFFECT`.
REFUSED = {
    "auto_find_batch_size": "the samples of a step would change where memory runs out; lower --per_device_train_batch_size (or "
    "--max_tokens_per_batch), and --global_batch_size keeps the step as it is",
    "chat_template_path": OF_TRL,
    "completion_only_loss": OF_TRL,
    "eos_token": OF_TRL,
    "eval_packing": PACKING,
    "group_by_length": GROUPING,  # of transformers 4
    "lora_target_parameters": "LoRA goes into the LLM's linear layers; name them with --lora_target_modules",
    "lora_task_type": "a Honeybee is a CAUSAL_LM; leave it out",
    "model_init_kwargs": OF_TRL,
    "packing": PACKING,
    "padding_free": PACKING,
    "truncation_mode": OF_TRL,
    "trust_remote_code": "towers and LLMs with code of their own are not supported, because a saved Honeybee carries its own "
    "code alone; leave it out",
}
# The same, where one value alone asks for it.
REFUSED_VALUES = {
    ("save_strategy", "best"): "a run that is stopped between its best steps could not go on from there; use "
    "--load_best_model_at_end with --save_total_limit 2, which keeps the best checkpoint and the last",
    ("train_sampling_strategy", "group_by_length"): GROUPING,  # of transformers 5
}
CHOICES = {"batching": BATCHINGS, "dtype": [name for name in DTYPES if name], "stage": list(TRAINED)}
MORE_THAN_0 = "more than 0"
# Setting -> what it must be, and whether it is, given all settings of its class.
RANGES: dict[str, tuple[str, Callable]] = {
    "buffer_size": ("at least 1, which shuffles nothing but files", lambda s: s.buffer_size >= 1),
    "early_stopping_patience": ("at least 1", lambda s: s.early_stopping_patience is None or s.early_stopping_patience >= 1),
    "eval_limit": ("at least 1, or leave it out to ask all questions", lambda s: s.eval_limit is None or s.eval_limit >= 1),
    "eval_split_size": ("between 0 and 1, for instance 0.01",
                        lambda s: s.eval_split_size is None or 0 < s.eval_split_size < 1),
    "global_batch_size": ("at least 1", lambda s: s.global_batch_size is None or s.global_batch_size >= 1),
    "gradient_accumulation_steps": (MORE_THAN_0, lambda s: s.gradient_accumulation_steps > 0),
    "image_size": ("at least one patch; leave it out for the tower's own", lambda s: s.image_size is None or s.image_size >= 1),
    "label_smoothing_factor": ("from 0 to below 1", lambda s: 0 <= s.label_smoothing_factor < 1),
    "learning_rate": ("more than 0 and finite; stage 1 uses 3e-4, stage 2 2e-5", lambda s: 0 < s.learning_rate < math.inf),
    "logging_steps": (MORE_THAN_0, lambda s: s.logging_steps > 0),
    "lora_alpha": (f"{MORE_THAN_0}; use twice lora_r, for instance", lambda s: not s.use_peft or s.lora_alpha > 0),
    "max_crops": ("at least 1, which cuts no picture", lambda s: s.max_crops is None or s.max_crops >= 1),
    "max_grad_norm": ("at least 0 (0: no clipping)", lambda s: s.max_grad_norm >= 0),
    "max_images_cut": ("at least 1; --max_crops 1 cuts no picture", lambda s: s.max_images_cut is None or s.max_images_cut >= 1),
    "max_length": ("at least 1, or none", lambda s: s.max_length is None or s.max_length >= 1),
    "max_steps": (f"{MORE_THAN_0}, or -1 for --num_train_epochs", lambda s: s.max_steps > 0 or s.max_steps == -1),
    "max_tokens_per_batch": ("at least 1", lambda s: s.max_tokens_per_batch is None or s.max_tokens_per_batch >= 1),
    "min_crops": ("at least 1, and at most max_crops",
                  lambda s: s.min_crops is None or 1 <= s.min_crops <= (s.max_crops or s.min_crops)),
    "num_train_epochs": ("more than 0 and finite, or give --max_steps",
                         lambda s: s.max_steps > 0 or 0 < s.num_train_epochs < math.inf),
    "overview_num_query_tokens": ("at least 1; leave it out for as many as a crop has",
                                  lambda s: s.overview_num_query_tokens is None or s.overview_num_query_tokens >= 1),
    "per_device_eval_batch_size": (MORE_THAN_0, lambda s: s.per_device_eval_batch_size > 0),
    "per_device_train_batch_size": (MORE_THAN_0, lambda s: s.per_device_train_batch_size > 0),
    "projector_learning_rate": ("more than 0 and finite; leave it out for learning_rate",
                                lambda s: s.projector_learning_rate is None or 0 < s.projector_learning_rate < math.inf),
    "save_steps": (f"{MORE_THAN_0}, or --save_strategy no",
                   lambda s: s.save_strategy != SaveStrategy.STEPS or s.save_steps > 0),
    "train_vision_tower": ("all, or a number of its last blocks from 1; leave it out to train nothing of it",
                           lambda s: s.train_vision_tower in (None, "all")
                           or isinstance(s.train_vision_tower, int) and s.train_vision_tower >= 1),
    "vision_learning_rate": ("more than 0 and finite; leave it out for learning_rate",
                             lambda s: s.vision_learning_rate is None or 0 < s.vision_learning_rate < math.inf),
}  # fmt: skip


def check_settings(settings: Settings) -> None:
    """Everything that can be wrong before a file is read.

    Raises:
        ValueError, FileNotFoundError: with the value and the remedy.
    """
    for part in (settings.honeybee, settings.training, settings.model):
        _check_values(part)
    _check_data(settings)
    _check_token_batches(settings)
    _check_model(settings.honeybee, settings.model)
    check_lora_settings(settings)
    _check_learning_rate(settings.training)
    _check_parts(settings)
    _check_optimizer(settings.training)
    _check_processes(settings.training)
    _check_compile(settings)
    _check_trackers(settings.training)
    _check_hub(settings.training)


def _check_values(part: HoneybeeArguments | SFTConfig | ModelConfig) -> None:
    """Each setting by itself: see the tables above."""
    values = vars(part)
    for name, choices in CHOICES.items():
        if name in values and values[name] not in (*choices, None):
            raise ValueError(f"{name}={values[name]!r} is unknown; use one of {', '.join(choices)}")
    refused = {name: why for name, why in REFUSED.items() if name in values and is_set(part, name)}
    refused |= {name: why for (name, value), why in REFUSED_VALUES.items() if values.get(name) == value}
    for name, why in refused.items():
        raise ValueError(f"{name}={getattr(values[name], 'value', None) or repr(values[name])}: {why}")
    for name, (bounds, holds) in RANGES.items():
        if name in values and not holds(part):
            raise ValueError(f"{name}={values[name]} must be {bounds}")


def _check_data(settings: Settings) -> None:
    own, training = settings.honeybee, settings.training
    if own.dataset is None and own.mixture is None:
        raise ValueError(
            "no data: give --dataset a Hub name or a path, or --mixture a recipe (or no arguments at all for the quickstart)"
        )
    if own.mixture is not None:
        _check_mixture(own)
    elif own.mixture_settings:
        raise ValueError(f"--set {' '.join(own.mixture_settings)} changes a mixture, and there is none; give --mixture")
    elif is_set(own, "buffer_size") and not own.streaming:
        raise ValueError(f"--buffer_size {own.buffer_size} shuffles a stream; give --streaming, or leave it out")
    elif own.streaming and own.eval_split_size is not None:
        raise ValueError(
            f"--eval_split_size {own.eval_split_size}: nothing can be kept of a stream; give --eval_dataset a file of its own"
        )
    if own.mixture is None and not own.streaming:
        return
    kind = "stream" if own.mixture is None else "mixture"
    if training.max_steps <= 0:
        raise ValueError(f"max_steps={training.max_steps}: a {kind} has no end; give --max_steps the length of the run")
    if training.ignore_data_skip:
        raise ValueError(f"ignore_data_skip would read the {kind} from its start after resuming; leave it out")


def _check_mixture(own: HoneybeeArguments) -> None:
    if own.streaming or is_set(own, "buffer_size"):
        raise ValueError(
            "--streaming and --buffer_size are for --dataset; a mixture's own datasets have `streaming` and `buffer_size` each"
        )
    if own.dataset is not None:
        raise ValueError(f"--dataset {own.dataset} and --mixture: give one; a mixture takes datasets under `own`")
    if own.dataset_split != "train":
        raise ValueError(
            f"--dataset_split {own.dataset_split} is for --dataset; a mixture's own datasets have a `split` each"
        )
    if own.eval_split_size is not None:
        raise ValueError(
            f"--eval_split_size {own.eval_split_size} is a share of --dataset; a mixture has a share for each dataset "
            "under `eval`, or give --eval_dataset"
        )


def _check_token_batches(settings: Settings) -> None:
    own, training = settings.honeybee, settings.training
    tokens, longest = own.max_tokens_per_batch, training.max_length
    if tokens is None:
        return
    if own.global_batch_size is None:
        raise ValueError(
            f"max_tokens_per_batch={tokens} needs to know the samples of a step; give --global_batch_size, for instance 128"
        )
    if training.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps={training.gradient_accumulation_steps} follows from max_tokens_per_batch={tokens}; "
            "leave it out"
        )
    if own.batching != "packed":
        raise ValueError(
            f"max_tokens_per_batch={tokens} is for --batching packed, and this is {own.batching}; leave it out"
        )
    if longest is None or longest > tokens:
        raise ValueError(
            f"max_tokens_per_batch={tokens} must hold a sample of max_length={longest}; raise the first, or give a lower --max_length"
        )
    if training.dataloader_drop_last:
        raise ValueError("dataloader_drop_last with max_tokens_per_batch: no batch is to be filled up; leave it out")


def _check_model(own: HoneybeeArguments, model: ModelConfig) -> None:
    path = model.model_name_or_path
    if path:
        new = (own.vision_model, own.text_model, own.image_size, own.vision_feature_layer, own.projector or None)
        if any(value is not None for value in new):
            raise ValueError(
                f"--model_name_or_path {path} already has a tower, an LLM and a projector; leave out --vision_model, "
                "--text_model, --projector, --image_size and --vision_feature_layer, or leave it out to start a new model"
            )
        _check_model_folder(path)
        return
    if not (own.vision_model and own.text_model):
        raise ValueError(
            "no model: give --model_name_or_path a Honeybee checkpoint, or both --vision_model and --text_model "
            "to join them with a new projector"
        )
    if is_set(model, "model_revision"):
        raise ValueError(
            f"model_revision={model.model_revision!r} is for --model_name_or_path; download the parts that you want "
            "and give their folders"
        )
    settings = projector_settings(own)
    example = 'such as --projector \'{"projector_type": "c-abs", "num_query_tokens": 144}\''
    if "projector_type" not in settings:
        raise ValueError(f"--projector {settings}: a new model needs the setting projector_type; give it, {example}")
    HoneybeeProjectorConfig.from_settings(settings)
    if settings["projector_type"] not in PIXELWISE_PROJECTORS and settings.get("num_query_tokens") is None:
        raise ValueError(
            f"--projector {settings}: num_query_tokens, the visual tokens of an image, is missing; give it, {example}"
        )


def _check_model_folder(path: str) -> None:
    if not os.path.isdir(path):
        if os.path.isabs(path) or path.startswith("."):
            raise ValueError(f"{path!r} does not exist; give the output folder of a finished stage, or a Hub name")
        return
    read_model_config(Path(path), repr(path), "to start from its parts give --vision_model and --text_model")


def _check_learning_rate(training: SFTConfig) -> None:
    for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs"):
        if not isinstance(getattr(training, name), (dict, type(None))):
            raise ValueError(f"{name}={getattr(training, name)!r} is not a mapping of settings to values")
    schedule, rate = training.lr_scheduler_kwargs or {}, training.learning_rate
    floor, share = schedule.get("min_lr", 0), schedule.get("min_lr_rate") or 0
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
    steps, warmup = training.max_steps, training.get_warmup_steps(max(training.max_steps, 0))
    if 0 < steps <= warmup:
        raise ValueError(
            f"the warm-up of {warmup} steps does not end within max_steps={steps}; lower --warmup_steps, for instance "
            f"to {steps // 25}"
        )


def _check_parts(settings: Settings) -> None:
    """Whether the vision tower can be trained, each part with a learning rate of its own is trained beside others, and the
    optimizer can have several."""
    own, training = settings.honeybee, settings.training
    if own.vision_learning_rate is not None and own.train_vision_tower is None and not own.lora_vision:
        raise ValueError(
            f"vision_learning_rate={own.vision_learning_rate}: nothing of the vision tower is trained; give "
            "--train_vision_tower all, a number of its last blocks, or --lora_vision with --use_peft, or leave it out"
        )
    if own.projector_learning_rate is not None and not trains_language_model(own.stage):
        raise ValueError(
            f"projector_learning_rate={own.projector_learning_rate}: stage {own.stage!r} does not train the LLM, so that the "
            "projector's rate is --learning_rate; give that"
        )
    reentrant = (training.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if training.gradient_checkpointing and reentrant and (own.train_vision_tower is not None or own.lora_vision):
        raise ValueError(
            "gradient_checkpointing_kwargs: with use_reentrant=True the vision tower's blocks would get no gradient where the "
            "embeddings in front of them need none; leave it out"
        )
    given = [f"{part}_learning_rate={rate}" for part, rate in settings.learning_rates.items()]
    optimizer = training.optim.value
    if given and ("layerwise" in optimizer or "lomo" in optimizer):
        raise ValueError(f"{', '.join(given)}: optim={optimizer} has one learning rate; use adamw_torch, for instance")
    plugin = training.deepspeed_plugin
    for name in ("optimizer", "scheduler"):
        if given and plugin is not None and name in plugin.deepspeed_config:
            raise ValueError(
                f"{', '.join(given)}: the {name} of DeepSpeed's own settings has one learning rate; leave it out there, and "
                "the trainer's is used"
            )


def _check_optimizer(training: SFTConfig) -> None:
    optimizer, schedule = training.optim.value, training.lr_scheduler_type.value
    try:
        if not optimizer.removeprefix("paged_").startswith("adamw"):
            with suppress(ValueError):  # some want to see the model
                Trainer.get_optimizer_cls_and_kwargs(training)
            return
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(training)
        settings = {**settings, "weight_decay": training.weight_decay}
        get_scheduler(
            schedule,
            kind([torch.zeros(1, requires_grad=True)], **settings),
            num_warmup_steps=0,
            num_training_steps=max(training.max_steps, 1),
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"optim={optimizer} with betas, epsilon and weight_decay, or lr_scheduler_type={schedule} with "
            f"lr_scheduler_kwargs={training.lr_scheduler_kwargs} cannot be: {error}; correct what it names"
        ) from error


def _check_processes(training: SFTConfig) -> None:
    DataLoader(  # torch says what is wrong with these
        [0],
        num_workers=training.dataloader_num_workers,
        prefetch_factor=training.dataloader_prefetch_factor,
        persistent_workers=training.dataloader_persistent_workers,
    )
    if training.accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config: dispatch_batches cuts batches by rows, and samples have different numbers of images; leave "
            "it out"
        )
    if training.n_gpu > 1:
        raise ValueError(
            f"{training.n_gpu} GPUs are visible to one process; start one process for each with `accelerate launch` "
            "(training/configs/README.md), or show it one with CUDA_VISIBLE_DEVICES=0"
        )


def _check_compile(settings: Settings) -> None:
    if settings.compile is None:
        return
    if settings.liger:
        raise ValueError(
            "torch_compile with use_liger_kernel: torch cannot compile Liger's kernels in every release; give one of them"
        )
    check_compile(**settings.compile)


def _check_trackers(training: SFTConfig) -> None:
    try:
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"report_to={training.report_to}: {error} Or give --report_to none") from error


def _check_hub(training: SFTConfig) -> None:
    if not training.push_to_hub:
        return
    try:
        HfApi(token=training.hub_token).whoami()
    except (NetworkError, OSError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"push_to_hub: the Hub cannot be used ({said}); log in with `hf auth login`, or leave it out and upload the "
            "finished model with hub_upload/push.py"
        ) from error


def check_model_files(settings: Settings, config: HoneybeeConfig, processor: HoneybeeProcessor) -> None:
    """Whether config and processor belong together, can be saved, and suit the run; weights are looked at elsewhere.

    Raises:
        ValueError: with the value and the remedy.
    """
    check_processor(config, processor)
    check_savable(config, processor)
    if settings.model.model_name_or_path:
        check_generation_config(settings.model)
    _check_crops(settings.honeybee, processor)
    max_length, model_type = settings.training.max_length, config.text_config.model_type
    most = processor.count_image_tokens(max(processor.trained_num_query_tokens), most_crops(processor))
    if max_length is not None and most >= max_length:
        cut, remedy = "", ""
        if processor.max_crops > 1:
            squares = most_crops(processor).num_crops
            cut, remedy = f" in {squares} squares (max_crops={processor.max_crops})", ", or lower --max_crops"
        raise ValueError(
            f"max_length={max_length} leaves no room for text: an image{cut} is {most} visual tokens; raise it{remedy}"
        )
    if settings.liger:
        check_liger(model_type, None if settings.honeybee.dry_run else settings.training.device)
    if settings.honeybee.batching == "packed" and model_type not in PACKABLE:
        raise ValueError(
            f"batching=packed is known to keep conversations apart in {', '.join(PACKABLE)}, and this LLM is of type "
            f"{model_type!r}; use --batching grouped"
        )


def _check_crops(own: HoneybeeArguments, processor: HoneybeeProcessor) -> None:
    """Refuses settings of crops that would change nothing."""
    given = [name for name in CROPS if getattr(own, name) is not None and name != "max_crops"]
    if given and processor.max_crops == 1:
        raise ValueError(
            f"{', '.join(f'--{name} {getattr(own, name)}' for name in given)}: no picture is cut with max_crops=1; give "
            "--max_crops, for instance 9, or leave it out"
        )
    if own.overview_num_query_tokens is not None and not processor.overview:
        raise ValueError(
            f"--overview_num_query_tokens {own.overview_num_query_tokens}: no overview follows the crops; give --overview True, "
            "or leave it out"
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


def check_number(dataset: Dataset, settings: Settings, kind: str = "train") -> None:
    """Raises a ValueError where `dataloader_drop_last` leaves no batch to `kind`, "train" or "eval"."""
    training = settings.training
    at_once = getattr(training, f"{kind}_batch_size") * training.world_size
    if training.dataloader_drop_last and len(dataset) < at_once:
        raise ValueError(
            f"dataloader_drop_last leaves nothing of {len(dataset)} samples in batches of {at_once}; leave it out "
            f"or lower --per_device_{kind}_batch_size"
        )


def check_images(mixture: Mixture) -> None:
    """Raises a ValueError where alignment would see no image."""
    draws = range(min(SEARCHED_FOR_AN_IMAGE, len(mixture)))
    ahead, images = mixture.read_ahead(1), []
    for draw in draws:
        with suppress(BadSampleError):
            images.append(ahead.glance(draw)["images"])
    if images and not any(images):
        raise ValueError(
            f"none of the first {len(draws)} samples has an image, and alignment trains the projector alone, which reads "
            "nothing else; give data with images (to a mixture, a captioning dataset), or use --stage instruct"
        )
