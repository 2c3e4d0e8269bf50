# SPDX-License-Identifier: Apache-2.0
"""What a run is going to do, worked out and checked before a weight is read."""

from dataclasses import dataclass
from functools import partial

import datasets
import torch
from peft import LoraConfig

from evaluation.prompts import Question
from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration
from training.collator import HoneybeeDataCollator
from training.conversations import check_dataset, image_root, load_conversations
from training.elastic import ElasticDraw, elastic_draw
from training.recipe.config import Recipe, load_recipe
from training.recipe.mixture import Mixture
from training.recipe.sources import open_mixture, open_streamed
from training.run.arguments import HoneybeeArguments
from training.run.checkpoints import check_disk, check_output_dir, find_checkpoint, identity_of
from training.run.checks import check_images, check_model_files, check_number, check_settings, check_weights
from training.run.evaluation import check_evaluation, open_evaluation, read_tasks
from training.run.loading import DTYPES, load_config_and_processor
from training.run.lora import lora_config, parameter_counts_with
from training.run.settings import Settings
from training.stages import parameter_counts, set_trained, trains_language_model
from training.trainer.elastic_rows import ElasticRows
from training.trainer.engines import whole_models
from training.trainer.token_batches import TokenBatches, token_batches


@dataclass
class Plan:
    """What a run is going to do.

    Args:
        identity: see [`identity_of`].
        checkpoint: to resume from, or None.
        dataset: what the trainer reads: conversations, or the draws of `mixture`.
        mixture: what is mixed, or None for a dataset.
        batches: of equal tokens, where `max_tokens_per_batch` asks for them, or None.
        evaluation: what is evaluated while training: a dataset, or several by name; or None.
        collator: makes batches of it, with the model's processor.
        config: of the model.
        lora: where LoRA goes, or None.
        parameters: part of the model -> (all, trained) parameters, LoRA's among them.
        disk_bytes: what it will write.
        tasks: benchmark -> what of it is asked while training.
        elastic: draws the M of each sample, or None.
        rows: the rows of `dataset` that do so, where there is no mixture.
    """

    identity: dict
    checkpoint: str | None
    dataset: datasets.Dataset
    mixture: Mixture | None
    batches: TokenBatches | None
    evaluation: datasets.Dataset | dict[str, datasets.Dataset] | None
    collator: HoneybeeDataCollator
    config: HoneybeeConfig
    lora: LoraConfig | None
    parameters: dict[str, tuple[int, int]]
    disk_bytes: int
    tasks: dict[str, list[Question]]
    elastic: ElasticDraw | None
    rows: ElasticRows | None


@whole_models()
def make_plan(settings: Settings) -> Plan:
    """Checks everything, the quick things first.

    Raises:
        ValueError, OSError: with the value, the limit and the remedy.
    """
    own, training, model = settings.honeybee, settings.training, settings.model
    check_settings(settings)
    check_output_dir(training.output_dir)
    recipe = load_recipe(own.mixture, own.mixture_settings) if own.mixture is not None else None
    check_evaluation(settings, recipe)
    identity = identity_of(settings, recipe)
    checkpoint = find_checkpoint(identity, settings)

    config, processor = load_config_and_processor(settings)
    check_model_files(settings, config, processor)
    with torch.device("meta"):
        skeleton = HoneybeeForConditionalGeneration(config)
    lora = lora_config(settings, skeleton)
    if model.model_name_or_path:
        check_weights(model.model_name_or_path, skeleton)
    parameters = count_parameters(skeleton, own, lora)
    disk_bytes = bytes_to_write(settings, parameters, config)
    tasks = read_tasks(settings)

    collator = HoneybeeDataCollator(processor, max_length=training.max_length, pack=own.batching == "packed")
    elastic = elastic_draw(own.elastic, config.projector_config.elastic_num_query_tokens)
    dataset, mixture = open_data(settings, recipe, collator, elastic)
    dataset, evaluation = open_evaluation(settings, dataset, mixture, collator)
    check_number(dataset, settings)
    rows = None
    if elastic is not None and mixture is None:
        rows = ElasticRows(dataset, elastic, settings.data_seed, own.dataset)
        dataset = rows.as_dataset()
    batches = batches_by_tokens(settings, dataset, mixture, collator, rows)
    return Plan(
        identity,
        checkpoint,
        dataset,
        mixture,
        batches,
        evaluation,
        collator,
        config,
        lora,
        parameters,
        disk_bytes,
        tasks,
        elastic,
        rows,
    )


def count_parameters(
    skeleton: HoneybeeForConditionalGeneration, own: HoneybeeArguments, lora: LoraConfig | None
) -> dict[str, tuple[int, int]]:
    """[`parameter_counts`] of the model as it will be trained.

    Raises:
        ValueError: LoRA cannot be put into it, or the tower has fewer blocks.
    """
    if lora is not None:
        return parameter_counts_with(lora, skeleton, own.lora_vision)
    set_trained(skeleton, own.stage, own.train_vision_tower)
    return parameter_counts(skeleton)


def open_data(
    settings: Settings, recipe: Recipe | None, collator: HoneybeeDataCollator, elastic: ElasticDraw | None
) -> tuple[datasets.Dataset, Mixture | None]:
    """What the trainer reads, and the mixture behind it, which draws by `elastic`; tells the collator where images are.

    Raises:
        ValueError, FileNotFoundError: samples that cannot be trained on. What of a mixture does not fit into `max_length`
            is the mixture's to skip and count.
    """
    own, needs_images = settings.honeybee, not trains_language_model(settings.honeybee.stage)
    training = settings.training
    num_samples = training.max_steps * settings.global_batch_size
    # The first process fills the caches, the others read them.
    with training.main_process_first(desc="opening the data"):
        if own.streaming:
            mixture = open_streamed(
                own.dataset,
                own.dataset_split,
                own.buffer_size,
                num_samples,
                settings.data_seed,
                collator.check_length,
                elastic,
            )
        elif recipe is None:
            dataset = load_conversations(own.dataset, own.dataset_split)
            collator.image_root = image_root(own.dataset)
            # In some epoch a sample draws the largest M.
            most = None if elastic is None else elastic.numbers[-1]
            fits = partial(collator.check_length, num_query_tokens=most)
            check_dataset(dataset, collator.image_root, needs_images, fits)
            return dataset, None
        else:
            path = own.mixture if isinstance(own.mixture, str) else "mixture"
            mixture = open_mixture(recipe, num_samples, path, collator.check_length, elastic)
        if needs_images:
            check_images(mixture)
        return mixture.as_dataset(), mixture


def batches_by_tokens(
    settings: Settings,
    dataset: datasets.Dataset,
    mixture: Mixture | None,
    collator: HoneybeeDataCollator,
    rows: ElasticRows | None,
) -> TokenBatches | None:
    """Batches of at most `max_tokens_per_batch`, and tells the settings how many of them make a step.

    Raises:
        ValueError: the samples of a step do not fit.
    """
    step_size, tokens = settings.global_batch_size, settings.honeybee.max_tokens_per_batch
    if tokens is None:
        return None
    processes = settings.training.world_size
    batches = token_batches(dataset, mixture, collator, step_size, tokens, processes, settings.data_seed, rows)
    settings.accumulate(batches.batches_per_step // processes)
    return batches


def bytes_to_write(settings: Settings, parameters: dict[str, tuple[int, int]], config: HoneybeeConfig) -> int:
    """Bytes of the checkpoints and of the model, for which there is space.

    Raises:
        ValueError: there is not.
    """
    sizes = state_bytes(parameters, config, settings)
    merged = sum(total for total, _ in parameters.values()) * bytes_of(settings.model.dtype, config)
    return check_disk(
        settings.training,
        model_bytes=sizes["trained"] if settings.model.use_peft else sizes["weights"],
        optimizer_bytes=sizes["optimizer"],
        extra_bytes=merged if settings.honeybee.merge else 0,
    )


def bytes_of(dtype: str | None, config: HoneybeeConfig) -> int:
    """Bytes of a weight as the model is loaded; a new one has its language model's dtype."""
    dtype = DTYPES[dtype]
    if dtype in (None, "auto"):
        dtype = config.dtype or torch.float32
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return dtype.itemsize


def state_bytes(parameters: dict[str, tuple[int, int]], config: HoneybeeConfig, settings: Settings) -> dict[str, int]:
    """Bytes in memory and in a checkpoint: of all `weights`, of the `trained` ones among them, and of the `optimizer`.

    Weights: 4 bytes where trained under mixed precision, else those of their dtype, half a byte where quantized to 4
    bits. AdamW: two float32 numbers for each trained weight (8-bit optimizers: two bytes; Adafactor: none).

    Args:
        parameters: part of the model -> (all, trained).
    """
    training, model = settings.training, settings.model
    size = bytes_of(model.dtype, config)
    total, trained = map(sum, zip(*parameters.values()))
    trained_bytes = trained * (4 if training.bf16 or training.fp16 else size)
    quantized = 0
    if model.load_in_4bit or model.load_in_8bit:
        all_here, trained_here = parameters["language_model"]
        quantized = all_here - trained_here
    frozen_bytes = (total - trained - quantized) * size + quantized * (0.5 if model.load_in_4bit else 1)
    optimizer = training.optim.value
    return {
        "weights": int(trained_bytes + frozen_bytes),
        "trained": trained_bytes,
        "optimizer": trained * (2 if "8bit" in optimizer else 0 if "adafactor" in optimizer else 8),
    }
