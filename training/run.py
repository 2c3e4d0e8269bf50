# SPDX-License-Identifier: Apache-2.0
"""A training run from its settings to the saved model."""

import logging
import os
import shlex
import signal
import sys
from functools import partial

import yaml
from trl import ModelConfig, SFTConfig, get_peft_config

from modeling_honeybee.model_folder import NetworkError
from training.arguments import HoneybeeArguments
from training.checkpoints import check_output_dir, copy_model, global_batch_size, is_finished, mark_run
from training.checks import Plan, check_run
from training.dry_run import dry_run
from training.interruption import StopOnSignal
from training.length_grouping import WINDOW, GroupedTrainer, dataset_lengths, mixture_lengths
from training.loading import load_model, merge_adapter
from training.packed_attention import use_packed_attention
from training.recipe.trainer import MixtureCallback, MixtureTrainer
from training.report import Report
from training.samples import TooManyBadSamplesError
from training.saving import prove_saving, push
from training.stages import freeze_for_stage, keep_trained_in_float32, parts_table, set_trained
from training.trainer import HoneybeeTrainer

logger = logging.getLogger(__name__)


def launch(args: HoneybeeArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Describes the run (`--dry_run`), or prepares it, trains, saves, uploads and merges.

    Raises:
        SystemExit: with a sentence, for what is wrong with the input or went wrong after the model was saved; with code 0
            after a signal.
    """
    try:
        if args.dry_run:
            print(dry_run(args, training_args, model_args))
            return
        trainer, checkpoint = prepare(args, training_args, model_args)
    except (ValueError, OSError, ImportError, yaml.YAMLError, TooManyBadSamplesError, NetworkError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted before the first step")
    try:
        run(trainer, checkpoint)
    except TooManyBadSamplesError as error:
        # A worker's comes with the whole of its traceback in front.
        sys.exit(f"error: {str(error).rpartition(f'{TooManyBadSamplesError.__name__}: ')[2]}")
    if trainer.is_world_process_zero():
        finish(trainer, args, training_args, model_args)
    trainer.leave()


def trainer_class(args: HoneybeeArguments, training_args: SFTConfig, plan: Plan):
    """The trainer that reads the run's samples in the order of its batching."""
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
    plan = check_run(args, training_args, model_args)
    existing = check_output_dir(training_args.output_dir)  # the trainer makes the folder
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
    callbacks = [StopOnSignal(), Report(plan, args, model_args)]
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
    if model_args.use_peft:
        # peft writes its card before the adapter, which a card that fails would lose; hub_upload/push.py writes ours.
        trainer.model.create_or_update_model_card = lambda folder: None
    prove_saving(trainer, existing)
    # Marked only now: a start that failed leaves the folder as it was, and every rank has seen it without the mark.
    trainer.accelerator.wait_for_everyone()
    if plan.checkpoint is None and trainer.is_world_process_zero():
        mark_run(plan.run, training_args)
    return trainer, plan.checkpoint


def callback_of(trainer: HoneybeeTrainer, kind: type):
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind))


def train(trainer: HoneybeeTrainer, checkpoint: str | None) -> None:
    """Trains. What fails after the last step, such as a tracker that cannot close, is a warning: the model is to be saved."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Exception:
        if not trainer.state.global_step >= trainer.state.max_steps > 0:
            raise
        logger.warning("All steps are done, and this failed after them:", exc_info=True)


def run(trainer: HoneybeeTrainer, checkpoint: str | None, how_to_go_on: str = "the same command with --resume") -> None:
    """Trains, saves model, processor and trainer state in the output folder, and then writes the report there.

    Args:
        how_to_go_on: said where a signal stops the run.

    Raises:
        SystemExit: with code 0, after a SIGTERM or SIGINT and the checkpoint that it asked for.
    """
    if checkpoint is not None and is_finished(checkpoint, trainer.args):
        if trainer.is_world_process_zero():
            copy_model(checkpoint, trainer.args.output_dir)
            print(f"Nothing was left to train; saved {trainer.args.output_dir} from {checkpoint}", flush=True)
        trainer.end()
        return
    stop = callback_of(trainer, StopOnSignal)
    try:
        train(trainer, checkpoint)
        if stop.stopped_at is None:
            trainer.save_model(trainer.args.output_dir, _internal_call=True)  # a call of ours would upload it as well
            trainer.save_state()
        if trainer.is_world_process_zero():
            callback_of(trainer, Report).write(trainer.args, trainer.state)
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
        trainer.leave()
        sys.exit(0)
    if trainer.is_world_process_zero():
        print(f"Finished after {trainer.state.global_step} steps; saved {trainer.args.output_dir}", flush=True)
    trainer.end()


def finish(
    trainer: HoneybeeTrainer, args: HoneybeeArguments, training_args: SFTConfig, model_args: ModelConfig
) -> None:
    """Uploads and merges, where that was asked for. One that fails keeps neither the saved model nor the other from us.

    Raises:
        SystemExit: with a sentence for each that failed.
    """
    folder, errors = training_args.output_dir, []

    def failed(what: str, error: Exception, remedy: str) -> None:
        said = (str(error) or type(error).__name__).splitlines()[0]
        errors.append(f"error: {folder} is saved, but {what} ({type(error).__name__}: {said}); {remedy}")

    if training_args.push_to_hub:
        try:
            push(trainer)
        except Exception as error:
            command = (
                f"python hub_upload/push.py --model {shlex.quote(folder)} --repo_id {trainer.hub_model_id} --update"
            )
            failed("not uploaded", error, f"upload it with `{command}`")
    if args.merge:
        try:
            print("Merged model:", merge_adapter(args, training_args, model_args))
        except Exception as error:
            failed("not merged with its base model", error, "merge it with the same command and --resume")
    if errors:
        sys.exit("\n".join(errors))
