# SPDX-License-Identifier: Apache-2.0
"""Which run an output folder holds, where that run goes on, and how much space its checkpoints will take."""

import glob
import json
import logging
import os
import shutil
import tempfile
import zipfile
from dataclasses import asdict

from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig

from modeling_honeybee.model_folder import RUN_FILE, STATE_FILE
from training.recipe.config import Recipe
from training.run.lora import LORA_SETTINGS
from training.run.settings import Settings
from training.samples import BUFFER_SIZE

logger = logging.getLogger(__name__)

# Fields of `SFTConfig` that `RUN_FILE` records: for the model card, for the summary, and to resume with the same settings.
RECORDED = [
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "world_size", "max_length", "bf16", "fp16", "gradient_checkpointing", "seed",
    "data_seed", "label_smoothing_factor", "neftune_noise_alpha",
]  # fmt: skip
# Those that may change when a run goes on: its length, and how the same batch is spread.
CHANGEABLE = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size",
    "gradient_checkpointing",
)  # fmt: skip
TRIAL = "_save_trial"  # what a start saves to see that it can, and removes
NOT_THE_RUN = (
    "mixture_settings", "resume", "merge", "dry_run", "eval_dataset", "eval_dataset_split", "eval_tasks", "eval_tasks_data",
    "eval_limit", "early_stopping_patience", "max_tokens_per_batch",
)  # fmt: skip

# Settings that are younger than some marks: what a run did whose mark does not have them.
YOUNGER = {
    "max_tokens_per_batch": None, "eval_split_size": None, "streaming": False, "train_vision_tower": None, "lora_vision": False,
    "vision_learning_rate": None, "projector_learning_rate": None, "elastic": None, "max_crops": None, "min_crops": None,
    "overview": None, "overview_num_query_tokens": None, "max_images_cut": None,
}  # fmt: skip


def identity_of(settings: Settings, recipe: Recipe | None) -> dict:
    """What makes a run this run and not another; kept in its output folder."""
    own, model = settings.honeybee, settings.model
    # The best so far would be compared with losses on other data, or with another measure.
    best = [(own, "eval_dataset"), (own, "eval_dataset_split"), (own, "eval_tasks"), (own, "eval_tasks_data")]
    best += [(own, "eval_limit"), (settings.training, "metric_for_best_model")]
    return {
        **{name: value for name, value in asdict(own).items() if name not in NOT_THE_RUN},
        "mixture": asdict(recipe) if recipe else None,
        # Batches by tokens have an order of samples of their own, whatever the number of tokens.
        "max_tokens_per_batch": None if own.max_tokens_per_batch is None else "given",
        "model_name_or_path": model.model_name_or_path,
        "model_revision": model.model_revision,
        "dtype": model.dtype,
        "use_peft": model.use_peft,
        **({name: getattr(place, name) for place, name in best} if settings.training.load_best_model_at_end else {}),
        **({name: getattr(model, name) for name in LORA_SETTINGS} if model.use_peft else {}),
        "global_batch_size": settings.global_batch_size,
    }


def recorded(training_args: SFTConfig) -> dict:
    """The settings in `RECORDED`, as JSON keeps them."""
    settings = {name: getattr(training_args, name) for name in RECORDED}
    # transformers 5 takes a warm-up below 1 as a share of the run; 4 has a setting of its own for that.
    settings["warmup_steps"] = settings["warmup_steps"] or getattr(training_args, "warmup_ratio", 0)
    return json.loads(json.dumps(settings))


def is_whole(checkpoint: str, processes: int = 1) -> bool:
    """Whether the trainer finished saving this checkpoint, in all processes.

    Args:
        processes: how many the run goes on with. Some may have been stopped before they wrote their part.
    """
    try:
        TrainerState.load_from_json(os.path.join(checkpoint, STATE_FILE))
    except (OSError, ValueError):
        return False
    random_states = glob.glob(os.path.join(glob.escape(checkpoint), "rng_state*.pth"))
    number = len(random_states)
    if number == 1 and os.path.basename(random_states[0]) == "rng_state.pth":
        number = processes  # of a run in one process, which may go on in more
    return number >= processes and all(map(zipfile.is_zipfile, random_states))


def checkpoints(folder: str) -> dict[int, str]:
    """Step -> path of the checkpoints in an output folder, whole or not."""
    found = glob.glob(os.path.join(glob.escape(folder), "checkpoint-*"))
    return {int(name): path for path in found if (name := path.rpartition("-")[2]).isdecimal()}


def last_whole_checkpoint(folder: str, processes: int = 1) -> str | None:
    """The newest checkpoint that a run can go on from. One that was half written when the run was killed is passed over."""
    steps = checkpoints(folder)
    return next((steps[step] for step in sorted(steps, reverse=True) if is_whole(steps[step], processes)), None)


def is_finished(folder: str, training_args: SFTConfig) -> bool:
    """Whether a checkpoint or an output folder holds the run's last step. (Resumed there, the trainer would still take one
    more.) False for a run that is counted in epochs, whose end the trainer finds by itself."""
    path = os.path.join(folder, STATE_FILE)
    return os.path.isfile(path) and 0 < training_args.max_steps <= TrainerState.load_from_json(path).global_step


class EarlyStopping(EarlyStoppingCallback):
    """transformers' own, which goes on counting where a checkpoint stopped. (The trainer would do so by setting, with the
    checkpoint's patience.)

    Args:
        checkpoint: folder that the run resumes from, or None.
    """

    def __init__(self, patience: int, checkpoint: str | None = None):
        super().__init__(patience)
        if checkpoint is not None:
            state = TrainerState.load_from_json(os.path.join(checkpoint, STATE_FILE))
            vars(self).update(early_stopping_in(state).get("attributes", {}))

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        # The trainer saves the state of callbacks that its own state names, and a checkpoint's need not name this one.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        # It is called for each dataset and for the benchmarks, and one of them has the metric.
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)


def early_stopping_in(state: TrainerState) -> dict:
    """What a trainer's state keeps of early stopping, empty if nothing: `args` and `attributes`."""
    return state.stateful_callbacks.get(EarlyStopping.__name__, {})


def has_stopped_early(folder: str, patience: int | None) -> bool:
    """Whether an output folder holds the model of a run that ended before its last step, with no less patience."""
    path = os.path.join(folder, STATE_FILE)
    if patience is None or not os.path.isfile(path):
        return False
    state = TrainerState.load_from_json(path)
    before = early_stopping_in(state).get("args", {}).get("early_stopping_patience", 0)
    return state.global_step < state.max_steps and patience <= before


def copy_model(checkpoint: str, folder: str, best: bool = False) -> None:
    """Copies a checkpoint's model or adapter and its processor, without what only resuming needs. Does nothing where the
    checkpoint is the folder itself.

    Args:
        best: copy the model of the best checkpoint until then.
    """
    if os.path.abspath(checkpoint) == os.path.abspath(folder):
        return
    state = os.path.join(checkpoint, STATE_FILE)
    if best and (name := TrainerState.load_from_json(state).best_model_checkpoint):
        # Beside this one: the whole run may have been moved.
        path = os.path.join(os.path.dirname(os.path.abspath(checkpoint)), os.path.basename(name))
        if os.path.isdir(path):
            checkpoint = path
        else:
            logger.warning("The best checkpoint, %s, is gone; the model of %s is saved instead", path, checkpoint)
    ignored = shutil.ignore_patterns("optimizer*", "scheduler*", "scaler*", "rng_state*", "global_step*", STATE_FILE)
    shutil.copytree(checkpoint, folder, ignore=ignored, dirs_exist_ok=True)
    # Last, as the trainer does: it says that the rest is whole.
    shutil.copy(state, folder)


def find_checkpoint(identity: dict, settings: Settings) -> str | None:
    """The checkpoint to resume from, or None for a new run. With `--merge` a finished run goes on, too, from its output
    folder.

    Args:
        identity: see [`identity_of`].

    Raises:
        ValueError: the output folder holds another run, a finished one, or nothing to resume.
    """
    training, merge = settings.training, settings.honeybee.merge
    folder, resume, processes = training.output_dir, training.resume_from_checkpoint, training.world_size
    if not resume:
        # A start that failed later leaves its mark, and a tracker's folder; one that was killed, its trial.
        if os.path.isdir(folder) and set(os.listdir(folder)) - {RUN_FILE, TRIAL, "runs"}:
            raise ValueError(
                f"output_dir {folder!r} already holds another run or other files; continue it with "
                "--resume (--resume_from_checkpoint true), or give another folder"
            )
        return None
    stopped_early = has_stopped_early(folder, settings.honeybee.early_stopping_patience)
    if stopped_early and not merge:
        raise ValueError(
            f"--resume: {folder!r} holds the model of a run that stopped early; raise --early_stopping_patience (now "
            f"{settings.honeybee.early_stopping_patience}) or leave it out to train on"
        )
    if merge and (stopped_early or is_finished(folder, training)):
        checkpoint = folder
    elif str(resume).lower() in ("true", "last"):
        checkpoint = last_whole_checkpoint(folder, processes)
    else:
        checkpoint = resume if is_whole(resume, processes) else None
    if checkpoint is None:
        raise ValueError(
            f"--resume_from_checkpoint {resume}: no whole checkpoint found (output_dir {folder!r}, "
            f"processes: {processes}); leave it out to start, and set --save_strategy steps --save_steps N to have some"
        )
    if changed := changes_since(identity, training):
        raise ValueError(
            f"output_dir {folder!r} holds another run: {', '.join(changed)}; resume with the same settings or use another "
            "folder"
        )
    if is_finished(checkpoint, training) and is_finished(folder, training) and not merge:
        raise ValueError(
            f"--resume: {checkpoint} is after the last step (max_steps={training.max_steps}), and {folder!r} holds "
            "the finished model; raise --max_steps to train on"
        )
    return checkpoint


def changes_since(identity: dict, training_args: SFTConfig) -> list[str]:
    """Settings that should be those of the run in the output folder, and are others. None where no run is marked there."""
    mark = os.path.join(training_args.output_dir, RUN_FILE)
    if not os.path.isfile(mark):
        return []
    with open(mark, encoding="utf-8") as file:
        before = json.load(file)
    before = {**YOUNGER, **before, **before.get("training", {})}
    if before.get("mixture"):
        before["mixture"] = {"eval": {}, **before["mixture"]}
        if "own" in before["mixture"]:
            young = {"streaming": False, "buffer_size": BUFFER_SIZE}
            before["mixture"]["own"] = [{**young, **dataset} for dataset in before["mixture"]["own"]]
    now = {**identity, **recorded(training_args)}
    changed = sorted(key for key in now if key not in CHANGEABLE and before.get(key, now[key]) != now[key])
    return [f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed]


def mark_run(identity: dict, training_args: SFTConfig) -> None:
    """Says in the output folder which run it holds."""
    os.makedirs(training_args.output_dir, exist_ok=True)
    with open(os.path.join(training_args.output_dir, RUN_FILE), "w", encoding="utf-8") as file:
        json.dump({**identity, "training": recorded(training_args)}, file, indent=2)


def check_output_dir(folder: str) -> str:
    """The nearest existing folder of a path, in which a file can be made.

    Raises:
        ValueError: the path leads through a file, or nothing can be written there.
    """
    if not folder:
        raise ValueError("output_dir is empty; give the folder that the run writes to")
    existing = os.path.abspath(folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise ValueError(f"output_dir {folder!r} cannot be a folder: {existing!r} is a file; give another folder")
    try:
        # Asking for permission is not enough: root has it, and a read-only file system does not care.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir {folder!r} cannot be written: {error.strerror} in {existing!r}; give another folder"
        ) from error
    return existing


def check_disk(training_args: SFTConfig, model_bytes: int, optimizer_bytes: int, extra_bytes: int = 0) -> int:
    """Bytes that the run will write: the most checkpoints that are kept at once, and the final model.

    Args:
        model_bytes, optimizer_bytes: of one checkpoint.
        extra_bytes: written at the end beside the model.

    Raises:
        ValueError: the output folder cannot be written, or there is less space.
    """
    folder = training_args.output_dir
    existing = check_output_dir(folder)
    number = 0
    if training_args.save_strategy == SaveStrategy.STEPS and training_args.max_steps > 0:
        interval = training_args.save_steps
        interval = interval if interval >= 1 else max(1, round(interval * training_args.max_steps))
        number = -(-training_args.max_steps // int(interval))
    elif training_args.save_strategy != SaveStrategy.NO:
        number = 1 if training_args.save_strategy == SaveStrategy.STEPS else int(training_args.num_train_epochs)
    if training_args.save_total_limit and training_args.save_total_limit > 0:
        number = min(number, training_args.save_total_limit + 1)  # the oldest goes after the newest has come
    checkpoint = model_bytes + (0 if training_args.save_only_model else optimizer_bytes)
    number = max(0, number - len(checkpoints(folder)))
    needed = number * checkpoint + model_bytes + extra_bytes
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"output_dir {folder!r} has {gigabytes(free)} free, and the run writes {gigabytes(needed)}: {number} "
            f"checkpoints of {gigabytes(checkpoint)} and the model of {gigabytes(model_bytes)}; free some space, give "
            "another folder, or keep fewer checkpoints (--save_total_limit 2, --save_steps)"
        )
    return needed


def gigabytes(number: float) -> str:
    """Bytes as a text: in GB, or in MB where that would be little."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.2f} MB"
