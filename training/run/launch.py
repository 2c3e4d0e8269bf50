# SPDX-License-Identifier: Apache-2.0
"""A training run from its settings to the saved model."""

import logging
import os
import shlex
import signal
import sys

import yaml
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainerCallback

from modeling_honeybee import HoneybeeForConditionalGeneration
from modeling_honeybee.model_folder import NetworkError
from modeling_honeybee.processes import leave_processes, use_attention_for_any_shape
from training.recipe.callback import MixtureCallback
from training.run.checkpoints import EarlyStopping, check_output_dir, copy_model, is_finished, mark_run
from training.run.dry_run import dry_run
from training.run.loading import load_model
from training.run.lora import freeze_for_lora, merge_adapter
from training.run.plan import Plan, make_plan
from training.run.report import Report
from training.run.saving import prove_saving, push
from training.run.settings import Settings
from training.samples import TooManyBadSamplesError
from training.stages import freeze_for_stage, keep_trained_in_float32, parts_table
from training.trainer.benchmarks import Benchmarks
from training.trainer.elastic_rows import ElasticEpochs
from training.trainer.interruption import StopOnSignal
from training.trainer.kernels import compile_blocks, use_liger_kernels
from training.trainer.length_grouping import grouped_sampler
from training.trainer.packed_attention import use_packed_attention
from training.trainer.trainer import HoneybeeTrainer

logger = logging.getLogger(__name__)


def launch(settings: Settings) -> None:
    """Describes the run (`--dry_run`), or prepares it, trains, saves, uploads and merges.

    Raises:
        SystemExit: with a sentence, for what is wrong with the input or went wrong after the model was saved; with code 0
            after a signal.
    """
    try:
        if settings.honeybee.dry_run:
            print(dry_run(settings))
            return
        trainer, checkpoint = prepare(settings)
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
        finish(trainer, settings)
    leave_processes(trainer.accelerator.num_processes)


def prepare(settings: Settings) -> tuple[HoneybeeTrainer, str | None]:
    """A trainer that is ready to run, and the checkpoint to resume from. What is wrong with the input is found here.

    Raises:
        ValueError, FileNotFoundError: with the value, the limit and the remedy.
    """
    plan, training = make_plan(settings), settings.training
    existing = check_output_dir(training.output_dir)  # the trainer makes the folder
    model = load_model(settings)
    freeze(model, settings, plan)
    speed_up(model.model.language_model, settings)
    benchmarks = Benchmarks(plan.tasks, plan.collator.processor, training.eval_batch_size) if plan.tasks else None
    trainer = HoneybeeTrainer(
        model=model,
        args=training,
        data_collator=plan.collator,
        train_dataset=plan.dataset,
        # Benchmarks alone are no dataset, and the trainer wants one: it evaluates each of none.
        eval_dataset={} if benchmarks is not None and plan.evaluation is None else plan.evaluation,
        processing_class=plan.collator.processor,
        peft_config=plan.lora,
        callbacks=callbacks(settings, plan),
        sampler=choose_sampler(settings, plan),
        learning_rates=settings.learning_rates,
        benchmarks=benchmarks,
    )
    if settings.honeybee.lora_vision and training.gradient_checkpointing:
        # TRL asks for the reentrant kind for LoRA under ZeRO-3; the tower's blocks would get no gradient with it.
        training.gradient_checkpointing_kwargs = {
            **(training.gradient_checkpointing_kwargs or {}),
            "use_reentrant": False,
        }
    if training.bf16 or training.fp16:
        keep_trained_in_float32(trainer.model)  # now, because TRL casts what is trained beside quantized weights
    prove_saving(trainer, existing)
    # Marked only now: a start that failed leaves the folder as it was, and every rank has seen it without the mark.
    trainer.accelerator.wait_for_everyone()
    if plan.checkpoint is None and trainer.is_world_process_zero():
        mark_run(plan.identity, training)
    return trainer, plan.checkpoint


def freeze(model: HoneybeeForConditionalGeneration, settings: Settings, plan: Plan) -> None:
    """Freezes what the run does not train, and logs what it does."""
    stage = settings.honeybee.stage
    if plan.lora is None:
        freeze_for_stage(model, stage, settings.honeybee.train_vision_tower)
        return
    freeze_for_lora(model)
    logger.info("Stage %s with LoRA of rank %s:", stage, plan.lora.r)
    for line in parts_table(plan.parameters):
        logger.info("  %s", line)


def speed_up(language_model: PreTrainedModel, settings: Settings) -> None:
    """Gives the language model the attention, kernels and compiled parts that the settings ask for."""
    use_attention_for_any_shape()
    if settings.honeybee.batching == "packed":
        use_packed_attention(language_model)
    if settings.liger:
        use_liger_kernels(language_model)
    if settings.compile is not None:
        number = compile_blocks(language_model, **settings.compile)
        logger.info("%s blocks of the language model are compiled in their first step", number)


def callbacks(settings: Settings, plan: Plan) -> list[TrainerCallback]:
    """What stops a run, reports on it, keeps a mixture's counts, and tells a dataset's rows the epoch."""
    found = [StopOnSignal(), Report(settings, plan)]
    if plan.mixture is not None:
        found.append(MixtureCallback(plan.mixture, plan.checkpoint))
    if plan.rows is not None:
        found.append(ElasticEpochs(plan.rows))
    if settings.honeybee.early_stopping_patience is not None:
        found.append(EarlyStopping(settings.honeybee.early_stopping_patience, plan.checkpoint))
    return found


def choose_sampler(settings: Settings, plan: Plan) -> Sampler | None:
    """The order in which samples are read; None for a random one."""
    if plan.batches is not None:
        return plan.batches
    if settings.honeybee.batching == "grouped":
        size, seed = settings.global_batch_size, settings.data_seed
        return grouped_sampler(plan.dataset, plan.mixture, plan.collator, size, seed)
    # A mixture is shuffled already. (transformers 5 has a setting for this, 4 has nothing.)
    return None if plan.mixture is None else SequentialSampler(plan.dataset)


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
    folder, stop = trainer.args.output_dir, callback_of(trainer, StopOnSignal)
    if checkpoint is not None and (checkpoint == folder or is_finished(checkpoint, trainer.args)):
        if trainer.is_world_process_zero():
            copy_model(checkpoint, folder, best=trainer.args.load_best_model_at_end)
        end(trainer, f"Nothing was left to train; saved {folder} from {checkpoint}")
        return
    try:
        train(trainer, checkpoint)
        if stop.stopped_at is None:
            trainer.save_model(folder, _internal_call=True)  # a call of ours would upload it as well
            trainer.save_state()
        if trainer.is_world_process_zero():
            callback_of(trainer, Report).write(trainer.state, interrupted=stop.stopped_at is not None)
    finally:
        if stop.stopped_at is None:
            stop.restore()
    if stop.stopped_at is None:
        end(trainer, f"Finished after {trainer.state.global_step} steps; saved {folder}")
        return
    name = signal.Signals(stop.signal).name if stop.signal else "a signal to another process"
    saved = os.path.join(folder, f"checkpoint-{stop.stopped_at}")
    end(
        trainer,
        f"Stopped by {name} after step {stop.stopped_at} of {trainer.state.max_steps}; saved {saved}. Go on from there: "
        f"{how_to_go_on}.",
    )
    stop.ignore()
    leave_processes(trainer.accelerator.num_processes)
    sys.exit(0)


def end(trainer: HoneybeeTrainer, said: str) -> None:
    """Says how it went, once, and ends the processes' work together."""
    if trainer.is_world_process_zero():
        print(said, flush=True)
    trainer.end()


def finish(trainer: HoneybeeTrainer, settings: Settings) -> None:
    """Uploads and merges, where that was asked for. One that fails keeps neither the saved model nor the other from us.

    Raises:
        SystemExit: with a sentence for each that failed.
    """
    folder, errors = settings.training.output_dir, []

    def failed(what: str, error: Exception, remedy: str) -> None:
        said = (str(error) or type(error).__name__).splitlines()[0]
        errors.append(f"error: {folder} is saved, but {what} ({type(error).__name__}: {said}); {remedy}")

    if settings.training.push_to_hub:
        try:
            push(trainer)
        except Exception as error:
            command = (
                f"python hub_upload/push.py --model {shlex.quote(folder)} --repo_id {trainer.hub_model_id} --update"
            )
            failed("not uploaded", error, f"upload it with `{command}`")
    if settings.honeybee.merge:
        try:
            print("Merged model:", merge_adapter(settings))
        except Exception as error:
            failed("not merged with its base model", error, "merge it with the same command and --resume")
    if errors:
        sys.exit("\n".join(errors))
