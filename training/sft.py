# SPDX-License-Identifier: Apache-2.0
"""Trains a Honeybee with TRL's SFTTrainer.

    python training/sft.py                                            # the quickstart: both stages on handwritten digits

    python training/sft.py --config training/configs/align.yaml \
        --vision_model openai/clip-vit-large-patch14 --text_model lmsys/vicuna-7b-v1.5 \
        --dataset captions.jsonl --output_dir outputs/align           # stage 1: a new projector

    python training/sft.py --config training/configs/instruct.yaml \
        --model_name_or_path outputs/align --dataset data.jsonl --output_dir outputs/instruct    # stage 2

`--mixture training/configs/recipes/recipe.yaml` in place of `--dataset` trains on a recipe of several datasets. Every field of `SFTConfig` is a flag and a YAML key; so are TRL's model and LoRA settings (`--use_peft`).
"""

import glob
import json
import logging
import os
import sys
import zipfile
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from transformers import TrainerState, set_seed
from trl import ModelConfig, SFTConfig, TrlParser, get_peft_config, get_quantization_config

from modeling_honeybee import HoneybeeForConditionalGeneration, HoneybeeProjectorConfig
from processing import HoneybeeProcessor, check_processor, processor_from_vision_text_pretrained
from training.collator import HoneybeeDataCollator
from training.conversations import check_dataset, load_conversations
from training.length_grouping import WINDOW, GroupedTrainer, dataset_lengths, mixture_lengths
from training.packed_attention import use_packed_attention
from training.recipe.config import Recipe, load_recipe
from training.recipe.mixture import TooManyBadSamplesError
from training.recipe.sources import open_mixture
from training.recipe.trainer import MixtureCallback, MixtureTrainer
from training.stages import TRAINED, freeze_for_stage, lora_modules
from training.trainer import HoneybeeTrainer

logger = logging.getLogger(__name__)

RUN_FILE = "honeybee_run.json"
BATCHINGS = ("packed", "grouped", "padded")
# What of `SFTConfig` is recorded in it for the model card.
RECORDED = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "world_size", "max_length", "bf16", "fp16", "seed"),
)


@dataclass
class HoneybeeArguments:
    """What is trained on what; the rest is `SFTConfig` and TRL's `ModelConfig`."""

    stage: str = field(
        default="instruct",
        metadata={"help": "`align` trains the projector, `instruct` the projector and the LLM; the tower never.",
                  "choices": list(TRAINED)},
    )  # fmt: skip
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub name or local path of a dataset with `messages` and `images`."},
    )
    batching: str = field(
        default="packed",
        metadata={"help": "`packed`: the samples of a batch in one row without padding; `grouped`: padded batches of "
                  "samples of about one length; `padded`: batches in random order, padded to their longest sample.",
                  "choices": list(BATCHINGS)},
    )  # fmt: skip
    mixture: dict | str | None = field(
        default=None,
        metadata={"help": "Instead of --dataset: a YAML file with a `mixture:` section, or that section in --config."},
    )
    mixture_settings: list[str] = field(
        default_factory=list,
        metadata={"help": "Settings of the mixture to change, as setting=value.", "aliases": ["--set"]},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    vision_model: str | None = field(
        default=None, metadata={"help": "Vision tower of a new model, instead of --model_name_or_path."}
    )
    text_model: str | None = field(default=None, metadata={"help": "Language model of a new model."})
    vision_feature_layer: int | None = field(
        default=None, metadata={"help": "Layer of the tower that a new projector reads; default: -2."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Image size of a new model, where it is not the tower's own."}
    )
    projector: dict | str | None = field(
        default=None,
        metadata={"help": "Settings of a new projector, as JSON or a YAML mapping: fields of HoneybeeProjectorConfig."},
    )

    def __post_init__(self):
        if isinstance(self.projector, str):
            try:
                self.projector = json.loads(self.projector)
            except json.JSONDecodeError as error:
                raise ValueError(f"--projector {self.projector!r} is not JSON ({error})") from error
        if not isinstance(self.projector, (dict, type(None))):
            raise ValueError(f"--projector {self.projector!r} is not a mapping of settings to values")


def _check_model_folder(path: str) -> None:
    if (os.path.isabs(path) or path.startswith(".")) and not os.path.isdir(path):
        raise ValueError(f"{path!r} does not exist; give the output folder of a finished stage, or a Hub name")
    if not os.path.isdir(path):
        return
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        raise ValueError(
            f"{path!r} is a LoRA adapter and not a whole model; merge it into its base model first (README, "
            '"Train your own") and give the merged folder'
        )
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"{path!r} is not a model: it has no config.json; give the output folder of a finished stage")
    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        model_type = json.load(file).get("model_type")
    if model_type != "honeybee":
        raise ValueError(
            f"{path!r} is not a Honeybee model but has model_type={model_type!r}; to start from its parts give "
            "--vision_model and --text_model"
        )


def check_arguments(args: HoneybeeArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Everything that can be wrong before a file is read.

    Raises:
        ValueError, FileNotFoundError: with the value and the remedy.
    """
    if args.stage not in TRAINED:
        raise ValueError(f"stage={args.stage!r} is unknown; use one of {', '.join(TRAINED)}")
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
        if training_args.max_steps <= 0:
            raise ValueError(
                f"max_steps={training_args.max_steps}: a mixture has no end; give --max_steps the length of the run"
            )
        if training_args.ignore_data_skip:
            raise ValueError("ignore_data_skip would read the mixture from its start after resuming; leave it out")
    parts = (args.vision_model, args.text_model)
    if model_args.model_name_or_path:
        path = model_args.model_name_or_path
        if any(parts) or args.projector or args.image_size is not None or args.vision_feature_layer is not None:
            raise ValueError(
                f"--model_name_or_path {path} already has a tower, an LLM and a projector; leave out --vision_model, "
                "--text_model, --projector, --image_size and --vision_feature_layer, or leave it out to start a new model"
            )
        _check_model_folder(path)
    elif not all(parts):
        raise ValueError(
            "no model: give --model_name_or_path a Honeybee checkpoint, or both --vision_model and --text_model "
            "to join them with a new projector"
        )
    if model_args.use_peft:
        lora_modules(args.stage)
    if args.batching not in BATCHINGS:
        raise ValueError(f"batching={args.batching!r} is unknown; use one of {', '.join(BATCHINGS)}")
    if training_args.packing or training_args.padding_free:
        raise ValueError(
            "TRL's packing and padding_free are not available for samples with images; leave them out and use "
            "--batching packed"
        )
    if args.projector is not None:
        HoneybeeProjectorConfig.from_settings(args.projector)


def global_batch_size(training_args: SFTConfig) -> int:
    """Samples in one step of all processes."""
    return training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size


def describe_run(
    args: HoneybeeArguments, training_args: SFTConfig, model_args: ModelConfig, recipe: Recipe | None
) -> dict:
    """What makes a run this run and not another; kept in its output folder."""
    return {
        **asdict(args),
        "mixture": asdict(recipe) if recipe else None,
        "model_name_or_path": model_args.model_name_or_path,
        "use_peft": model_args.use_peft,
        "global_batch_size": global_batch_size(training_args),
    }


def is_whole(checkpoint: str) -> bool:
    """Whether the trainer came to the end of saving: it writes its own state last."""
    try:
        TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    except (OSError, ValueError):
        return False
    # Other processes may have been stopped while they wrote theirs.
    random_states = glob.glob(os.path.join(glob.escape(checkpoint), "rng_state*.pth"))
    return bool(random_states) and all(map(zipfile.is_zipfile, random_states))


def last_whole_checkpoint(folder: str) -> str | None:
    """The newest checkpoint that a run can go on from; one that was being written when the run was killed is not."""
    checkpoints = glob.glob(os.path.join(glob.escape(folder), "checkpoint-*"))
    steps = {int(name): path for path in checkpoints if (name := path.rpartition("-")[2]).isdecimal()}
    return next((steps[step] for step in sorted(steps, reverse=True) if is_whole(steps[step])), None)


def find_checkpoint(run: dict, training_args: SFTConfig) -> str | None:
    """The checkpoint to resume from, or None for a new run.

    Raises:
        ValueError: the output folder holds another run, or nothing to resume.
    """
    folder, resume = training_args.output_dir, training_args.resume_from_checkpoint
    mark = os.path.join(folder, RUN_FILE)
    if not resume:
        if os.path.isdir(folder) and os.listdir(folder):
            raise ValueError(
                f"output_dir {folder!r} already holds another run or other files; continue it with "
                "--resume_from_checkpoint true, or give another folder"
            )
        return None
    if str(resume).lower() in ("true", "last"):
        checkpoint = last_whole_checkpoint(folder)
    else:
        checkpoint = resume if is_whole(resume) else None
    if checkpoint is None:
        raise ValueError(
            f"--resume_from_checkpoint {resume}: no whole checkpoint found (output_dir {folder!r}); "
            "leave it out to start, and set --save_strategy steps --save_steps N to have some"
        )
    if os.path.isfile(mark):
        with open(mark, encoding="utf-8") as file:
            before = json.load(file)
        changed = sorted(key for key in run if before.get(key) != run[key])
        if changed:
            raise ValueError(
                f"output_dir {folder!r} holds another run: "
                + ", ".join(f"{key} was {before.get(key)!r} and is {run[key]!r}" for key in changed)
                + "; resume with the same settings or use another folder"
            )
    return checkpoint


def load_model_and_processor(args: HoneybeeArguments, training_args: SFTConfig, model_args: ModelConfig):
    """The model that the arguments name, new or trained, and the processor that goes with it."""
    dtype = {None: None, "auto": "auto"}.get(model_args.dtype, getattr(torch, model_args.dtype or "", None))
    if model_args.model_name_or_path is None:
        set_seed(training_args.seed)  # of the projector's first weights
        model = HoneybeeForConditionalGeneration.from_vision_text_pretrained(
            args.vision_model,
            args.text_model,
            image_size=args.image_size,
            vision_feature_layer=-2 if args.vision_feature_layer is None else args.vision_feature_layer,
            dtype=dtype if isinstance(dtype, torch.dtype) else None,
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=training_args.trust_remote_code,
            **(args.projector or {}),
        )
        processor = processor_from_vision_text_pretrained(
            args.vision_model, args.text_model, model.config.num_image_tokens, args.image_size
        )
        return model, processor
    loading = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    if quantization := get_quantization_config(model_args):
        loading["quantization_config"] = quantization
    path = model_args.model_name_or_path
    model = HoneybeeForConditionalGeneration.from_pretrained(
        path, revision=model_args.model_revision, dtype=dtype or "auto", **loading
    )
    processor = HoneybeeProcessor.from_pretrained(path, revision=model_args.model_revision)
    return model, processor


def prepare(
    args: HoneybeeArguments, training_args: SFTConfig, model_args: ModelConfig
) -> tuple[HoneybeeTrainer, str | None]:
    """A trainer that is ready to run, and the checkpoint to resume from. What is wrong with the input is said here.

    Raises:
        ValueError, FileNotFoundError: with the value, the limit and the remedy.
    """
    check_arguments(args, training_args, model_args)
    recipe = load_recipe(args.mixture, args.mixture_settings) if args.mixture is not None else None
    run = describe_run(args, training_args, model_args, recipe)
    checkpoint = find_checkpoint(run, training_args)
    # The first process fills the caches, the others read them.
    with training_args.main_process_first(desc="opening the data"):
        if recipe is None:
            dataset, mixture = load_conversations(args.dataset, args.dataset_split), None
            image_root = os.path.dirname(os.path.abspath(args.dataset)) if os.path.isfile(args.dataset) else ""
            most_images = check_dataset(dataset, image_root, needs_images=args.stage == "align")
        else:
            mixture = open_mixture(recipe, training_args.max_steps * global_batch_size(training_args))
            if args.stage == "align" and {source.task for source in mixture.sources} == {"text-instruction"}:
                raise ValueError(
                    "the mixture has no dataset with images, and alignment trains the projector alone, which reads "
                    "nothing else; add a captioning dataset, or use --stage instruct"
                )
            # A sample with more images than max_length has room for is the mixture's to skip.
            dataset, image_root, most_images = mixture.as_dataset(), "", 1

    model, processor = load_model_and_processor(args, training_args, model_args)
    check_processor(model.config, processor)
    visual_tokens = most_images * processor.num_image_tokens
    if training_args.max_length is not None and visual_tokens >= training_args.max_length:
        raise ValueError(
            f"max_length={training_args.max_length} leaves no room for text: {most_images} images of "
            f"{processor.num_image_tokens} visual tokens are {visual_tokens} tokens; raise it"
        )
    # LoRA takes the place of training the LLM; peft makes its own parameters trainable.
    freeze_for_stage(model, "align" if model_args.use_peft else args.stage)
    if model_args.use_peft and model_args.lora_target_modules is None:
        modules = lora_modules(args.stage)
        model_args.lora_target_modules = modules["target_modules"]
        model_args.lora_modules_to_save = model_args.lora_modules_to_save or modules["modules_to_save"]
        logger.info("  LoRA of rank %s on the LLM's q and v", model_args.lora_r)

    # The collator prepares samples on the fly and needs their columns as they are.
    training_args.remove_unused_columns = False
    training_args.dataset_kwargs = {**(training_args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    packed = args.batching == "packed"
    collator = HoneybeeDataCollator(processor, training_args.max_length, image_root, pack=packed)
    if packed:
        use_packed_attention(model.model.language_model)
    if mixture is not None:
        mixture.collator = collator  # what does not fit into max_length is skipped and counted
    trainer_class = HoneybeeTrainer if mixture is None else MixtureTrainer
    if args.batching == "grouped":
        lengths = (
            dataset_lengths(dataset, collator)
            if mixture is None
            else mixture_lengths(mixture, collator, WINDOW * global_batch_size(training_args))
        )
        trainer_class = partial(GroupedTrainer, lengths=lengths, shuffle=mixture is None)
    trainer = trainer_class(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=dataset,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
        callbacks=None if mixture is None else [MixtureCallback(mixture, checkpoint)],
    )
    # Marked only now: a start that failed leaves the folder as it was, and every rank has seen it without the mark.
    trainer.accelerator.wait_for_everyone()
    if checkpoint is None and trainer.is_world_process_zero():
        os.makedirs(training_args.output_dir, exist_ok=True)
        with open(os.path.join(training_args.output_dir, RUN_FILE), "w", encoding="utf-8") as file:
            json.dump({**run, "training": {name: getattr(training_args, name) for name in RECORDED}}, file, indent=2)
    return trainer, checkpoint


def run(trainer: HoneybeeTrainer, checkpoint: str | None) -> None:
    """Trains and saves model, processor and trainer state in the output folder."""
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(trainer.args.output_dir)
    trainer.save_state()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if len(sys.argv) == 1:
        from training.quickstart import run_quickstart

        run_quickstart()
        return
    try:
        parser = TrlParser((HoneybeeArguments, SFTConfig, ModelConfig))
        trainer, checkpoint = prepare(*parser.parse_args_and_config(fail_with_unknown_args=True))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        run(trainer, checkpoint)
    except TooManyBadSamplesError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
