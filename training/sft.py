# SPDX-License-Identifier: Apache-2.0
"""Trains a Honeybee with TRL's SFTTrainer.

    python training/sft.py                                            # the quickstart: both stages on handwritten digits

    python training/sft.py --config training/configs/align.yaml \
        --vision_model openai/clip-vit-large-patch14 --text_model lmsys/vicuna-7b-v1.5 \
        --dataset captions.jsonl --output_dir outputs/align           # stage 1: a new projector

    python training/sft.py --config training/configs/instruct.yaml \
        --model_name_or_path outputs/align --dataset data.jsonl --output_dir outputs/instruct    # stage 2

`--mixture training/configs/recipes/recipe.yaml` in place of `--dataset` trains on a recipe of several datasets. Every
field of `SFTConfig` is a flag and a YAML key, and so are TRL's model and LoRA settings (`--use_peft`); what would change
nothing here is refused. `--dry_run` checks and describes a run without starting it. SIGTERM and Ctrl-C save after the
step and exit with code 0; `--resume` goes on.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from functools import partial
from typing import TYPE_CHECKING

import yaml

from training.arguments import HoneybeeArguments, parse_arguments
from training.recipe.errors import TooManyBadSamplesError
from training.stages import freeze_for_stage, keep_trained_in_float32, parts_table, set_trained

# What a run needs beyond its settings loads for seconds. Each function imports it, so that --help, a wrong setting and
# Ctrl-C are answered before.
if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

    from training.checks import Plan
    from training.trainer import HoneybeeTrainer

logger = logging.getLogger(__name__)


def trainer_class(args: HoneybeeArguments, training_args: SFTConfig, plan: Plan):
    """The trainer that reads the run's samples in the order of its batching."""
    from training.checkpoints import global_batch_size
    from training.length_grouping import WINDOW, GroupedTrainer, dataset_lengths, mixture_lengths
    from training.recipe.trainer import MixtureTrainer
    from training.trainer import HoneybeeTrainer

    if args.batching != "grouped":
        return HoneybeeTrainer if plan.mixture is None else MixtureTrainer
    if plan.mixture is None:
        return partial(GroupedTrainer, lengths=dataset_lengths(plan.dataset, plan.collator))
    window = WINDOW * global_batch_size(training_args)
    # A mixture is shuffled already.
    return partial(GroupedTrainer, lengths=mixture_lengths(plan.mixture, plan.collator, window), shuffle=False)


def prepare(
    args: HoneybeeArguments, training_args: SFTConfig, model_args: ModelConfig
) -> tuple[HoneybeeTrainer, str | None]:
    """A trainer that is ready to run, and the checkpoint to resume from. What is wrong with the input is said here.

    Raises:
        ValueError, FileNotFoundError: with the value, the limit and the remedy.
    """
    from trl import get_peft_config

    from training.checkpoints import mark_run
    from training.checks import check_run
    from training.interruption import StopOnSignal
    from training.loading import load_model
    from training.packed_attention import use_packed_attention
    from training.recipe.trainer import MixtureCallback
    from training.report import ReportCallback

    plan = check_run(args, training_args, model_args)
    model = load_model(args, training_args, model_args)
    if model_args.use_peft:
        # LoRA takes the place of training the LLM; peft makes its own parameters trainable.
        set_trained(model, "align")
        logger.info("Stage %s with LoRA of rank %s:", args.stage, model_args.lora_r)
        for line in parts_table(plan.parameters):
            logger.info("  %s", line)
    else:
        freeze_for_stage(model, args.stage)
    # The collator prepares samples on the fly and needs their columns as they are.
    training_args.remove_unused_columns = False
    training_args.dataset_kwargs = {**(training_args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    callbacks = [StopOnSignal(), ReportCallback(plan, args, model_args)]
    if plan.mixture is not None:
        callbacks.append(MixtureCallback(plan.mixture, plan.checkpoint))
    if args.batching == "packed":
        use_packed_attention(model.model.language_model)
    trainer = trainer_class(args, training_args, plan)(
        model=model,
        args=training_args,
        data_collator=plan.collator,
        train_dataset=plan.dataset,
        processing_class=plan.collator.processor,
        peft_config=get_peft_config(model_args),
        callbacks=callbacks,
    )
    if training_args.bf16 or training_args.fp16:
        keep_trained_in_float32(trainer.model)  # now, because TRL casts what is trained beside quantized weights
    # Marked only now: a start that failed leaves the folder as it was, and every rank has seen it without the mark.
    trainer.accelerator.wait_for_everyone()
    if plan.checkpoint is None and trainer.is_world_process_zero():
        mark_run(plan.run, training_args)
    return trainer, plan.checkpoint


def run(trainer: HoneybeeTrainer, checkpoint: str | None, how_to_go_on: str = "the same command with --resume") -> None:
    """Trains and saves model, processor and trainer state in the output folder.

    Args:
        how_to_go_on: said where a signal stops the run.

    Raises:
        SystemExit: with code 0, after a SIGTERM or SIGINT and the checkpoint that it asked for.
    """
    from training.checkpoints import copy_model, is_finished
    from training.interruption import StopOnSignal

    if checkpoint is not None and is_finished(checkpoint, trainer.args):
        if trainer.is_world_process_zero():
            copy_model(checkpoint, trainer.args.output_dir)
            print(f"Nothing was left to train; saved {trainer.args.output_dir} from {checkpoint}", flush=True)
        trainer.end()
        return
    stop = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StopOnSignal))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if stop.stopped_at is None:
            trainer.save_model(trainer.args.output_dir)
            trainer.save_state()
    finally:
        if stop.stopped_at is None:
            stop.restore()
    if stop.stopped_at is not None:
        name = signal.Signals(stop.signal).name if stop.signal else "a signal to another process"
        if trainer.is_world_process_zero():
            print(
                f"Stopped by {name} after step {stop.stopped_at} of {trainer.state.max_steps}; saved "
                f"{os.path.join(trainer.args.output_dir, f'checkpoint-{stop.stopped_at}')}. Go on from there: "
                f"{how_to_go_on}.",
                flush=True,
            )
        trainer.end()
        stop.ignore()
        sys.exit(0)
    if trainer.is_world_process_zero():
        print(f"Finished after {trainer.state.global_step} steps; saved {trainer.args.output_dir}", flush=True)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


def quickstart() -> None:
    try:
        from training.quickstart.run import run_quickstart  # which imports this module

        run_quickstart()
    except KeyboardInterrupt:
        sys.exit("Interrupted; the same command goes on behind what is finished")


def main():
    # Waiting threads of torch would spin and take the core from the one that they wait for, wherever other work runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # transformers 5 has another name for it, which 4 does not know.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    if len(sys.argv) == 1:
        quickstart()
        return
    try:
        args, training_args, model_args = parse_arguments()
        if args.dry_run:
            from training.dry_run import dry_run

            print(dry_run(args, training_args, model_args))
            return
        trainer, checkpoint = prepare(args, training_args, model_args)
    except (ValueError, OSError, ImportError, yaml.YAMLError, TooManyBadSamplesError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted before the first step")
    try:
        run(trainer, checkpoint)
    except TooManyBadSamplesError as error:
        # A worker's comes with the whole of its traceback in front.
        sys.exit(f"error: {str(error).rpartition(f'{TooManyBadSamplesError.__name__}: ')[2]}")
    if args.merge and trainer.is_world_process_zero():
        from training.loading import merge_adapter

        print("Merged model:", merge_adapter(args, training_args, model_args))


if __name__ == "__main__":
    main()
