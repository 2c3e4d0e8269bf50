# SPDX-License-Identifier: Apache-2.0
"""What a run would do, without doing it: `python training/sft.py --dry_run ...`."""

import math
from dataclasses import dataclass, replace

from transformers.trainer_utils import IntervalStrategy

from training.collator import most_crops
from training.conversations import normalize_conversation
from training.run.checkpoints import gigabytes
from training.run.plan import Plan, make_plan, state_bytes
from training.run.settings import Settings
from training.stages import parts_table

MEASURED = 64  # samples whose tokens are counted
DEVICES = 8  # over which the estimate shards, where only one process is running


@dataclass
class Tokens:
    """How long the measured samples are, in tokens.

    Args:
        mean, longest: of a sample.
        visual, learned: in a sample, on average.
        images, squares: in a sample, on average; a picture that is cut is several squares.
        samples: how many were measured.
    """

    mean: float
    longest: int
    visual: float
    learned: float
    images: float
    squares: float
    samples: int


def dry_run(settings: Settings) -> str:
    """Checks the run and describes it. Reads settings, configs, tokenizer and data, and leaves nothing behind.

    Raises:
        ValueError, OSError: what [`make_plan`] refuses.
    """
    plan, training = make_plan(settings), settings.training
    tokens = measure_tokens(plan)
    batch, devices = settings.global_batch_size, training.world_size
    vision, projector = plan.config.vision_config, plan.config.projector_config
    steps = training.max_steps
    if steps <= 0:
        steps = round(-(-len(plan.dataset) // batch) * training.num_train_epochs)
    lines = [
        f"Stage {settings.honeybee.stage}" + (f", going on from {plan.checkpoint}" if plan.checkpoint else ""),
        *(f"  {line}" for line in parts_table(plan.parameters)),
        f"  {'all':<15} {sum(n for n, _ in plan.parameters.values()):>15,} parameters, "
        f"{sum(n for _, n in plan.parameters.values()):,} trained",
        f"Image {vision.image_size} px, {plan.config.num_patches} patches -> {projector.projector_type} -> "
        f"{visual_tokens_words(plan)} visual tokens",
        *crops_lines(plan, tokens),
        f"Data: {data_line(settings, plan)}",
        f"A step: {batch} samples = {batch_words(settings)} x "
        f"{training.gradient_accumulation_steps} accumulated x {devices} "
        f"{'process' if devices == 1 else 'processes'}; about {batch * tokens.mean:,.0f} tokens, "
        f"{batch * tokens.visual:,.0f} of them visual and {batch * tokens.learned:,.0f} learned",
        f"  ({tokens.samples} samples read: {tokens.mean:,.0f} tokens on average, {tokens.longest:,} at most)",
        f"The run: {steps:,} steps, {steps * batch:,} samples, about {steps * batch * tokens.mean:,.0f} tokens",
        f"Learning rate: {learning_rate_line(settings, steps)}",
        *evaluation_lines(settings, plan, steps),
        "Memory of a device, estimated (activations roughly):",
        *memory_lines(settings, plan, tokens),
        f"Disk: {gigabytes(plan.disk_bytes)} for checkpoints and the model in {training.output_dir}",
        *not_shown_lines(settings),
        "Dry run: nothing was written, nothing was trained.",
    ]
    return "\n".join(lines)


def not_shown_lines(settings: Settings) -> list[str]:
    """What only the start of a run can show, because a dry run reads no weights."""
    own = settings.honeybee
    if settings.model.model_name_or_path:
        return []
    return [
        f"Not shown here: that {own.text_model} answers and {own.vision_model} sees in the new model as they do alone; the "
        "run's start compares them, once the weights are read"
    ]


def visual_tokens_words(plan: Plan) -> str:
    if plan.elastic is None:
        return str(plan.config.num_image_tokens)
    extra = plan.config.projector_config.num_eos_tokens
    return plan.elastic.in_words() + (f" and {extra} more" if extra else "")


def crops_lines(plan: Plan, tokens: Tokens) -> list[str]:
    """How pictures are cut, and what that makes of the largest and of those that were read; none where none is."""
    processor = plan.collator.processor
    if not plan.collator.cuts_images:
        return []
    most = most_crops(processor)
    overview = ""
    if processor.overview:
        number = processor.overview_num_query_tokens
        overview = " and an overview" + (f" of {number + processor.num_eos_tokens} visual tokens" if number else "")
    line = f"Crops: from {processor.min_crops} to {processor.max_crops} of a picture"
    line += f"{overview}, none in samples of more than {processor.max_images_cut} pictures; at most {most.num_crops} squares and "
    line += f"{plan.collator.most_tokens(largest_m(plan)):,} visual tokens a picture"
    return [line, f"  ({tokens.squares / (tokens.images or 1):.2f} squares a picture in the samples that were read)"]


def largest_m(plan: Plan) -> int | None:
    return None if plan.elastic is None else plan.elastic.numbers[-1]


def batch_words(settings: Settings) -> str:
    tokens = settings.honeybee.max_tokens_per_batch
    return f"{settings.training.train_batch_size} a device" if tokens is None else f"at most {tokens:,} tokens a device"


def data_line(settings: Settings, plan: Plan) -> str:
    if plan.mixture is None:
        return f"{settings.honeybee.dataset}, {len(plan.dataset):,} samples"
    if settings.honeybee.streaming:
        files = len(plan.mixture.sources[0].records.shards)
        return (
            f"{settings.honeybee.dataset}, a stream of {files:,} file{'s' if files > 1 else ''}, "
            f"{settings.honeybee.buffer_size:,} records shuffled together"
        )
    shares = ", ".join(f"{s.name} {w:.1%}" for s, w in zip(plan.mixture.sources, plan.mixture.weights))
    return f"a mixture of {len(plan.mixture.sources)} datasets: {shares}"


def evaluation_lines(settings: Settings, plan: Plan, steps: int) -> list[str]:
    """What is evaluated, when, and what follows from it; none where nothing is."""
    own, training = settings.honeybee, settings.training
    parts = []
    if isinstance(plan.evaluation, dict):
        names = ", ".join(f"{name} ({len(dataset):,} samples)" for name, dataset in plan.evaluation.items())
        parts.append(f"the loss on {names}")
    elif plan.evaluation is not None:
        kept = f"a share of {own.dataset} that is not trained on"
        parts.append(f"the loss on {own.eval_dataset or kept}, {len(plan.evaluation):,} samples")
    if plan.tasks:
        names = ", ".join(f"{name} ({len(asked):,} questions)" for name, asked in plan.tasks.items())
        parts.append(f"the answers to {names}")
    if not parts:
        return []
    when = "after each epoch"
    if training.eval_strategy == IntervalStrategy.STEPS:
        interval = training.eval_steps if training.eval_steps >= 1 else math.ceil(training.eval_steps * steps)
        when = f"every {interval:,} of {steps:,} steps"
    line = f"Evaluation: {', and '.join(parts)}, {when}"
    if training.load_best_model_at_end:
        line += f"; the model with the best {training.metric_for_best_model} is saved"
    if own.early_stopping_patience is not None:
        line += f"; the run stops after {own.early_stopping_patience} in a row without a better one"
    return [line]


def learning_rate_line(settings: Settings, steps: int) -> str:
    training = settings.training
    floor = (training.lr_scheduler_kwargs or {}).get("min_lr")
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    line = f"{schedule}, {training.get_warmup_steps(steps):,} steps of warm-up to {training.learning_rate:g}"
    line += f", then down to {floor:g}" if floor is not None else ""
    for part, rate in settings.learning_rates.items():
        line += f"; {part}: {rate / training.learning_rate:g} times that, {rate:g}"
    return line


def measure_tokens(plan: Plan) -> Tokens:
    """Counts the run's first samples. Those of a mixture are read with their images, so that missing files are noticed."""
    samples, numbers, sizes, images, squares = [], [], [], 0, 0
    collator = plan.collator
    for index in range(min(MEASURED, len(plan.dataset))):
        sample = plan.mixture[index] if plan.mixture is not None else plan.dataset[index]
        messages, pictures = normalize_conversation(sample)
        samples.append((messages, sample.get("chat_template") or "default"))
        numbers.append(sample.get("num_query_tokens"))
        sizes.append(collator.image_sizes(pictures))
        images += len(pictures)
        cuts = None if sizes[-1] is None else collator.processor.plan_cuts(sizes[-1])
        squares += len(pictures) if cuts is None else sum(cut.num_crops for cut in cuts)
    rows = collator.tokenize(samples, numbers, sizes)
    image_token, number = collator.processor.image_token_id, len(rows)
    learned = [sum(label != -100 for label in row["labels"]) for row in rows]
    lengths = [len(row["input_ids"]) for row in rows]
    return Tokens(
        mean=sum(lengths) / number,
        longest=max(lengths),
        visual=sum(row["input_ids"].count(image_token) for row in rows) / number,
        learned=sum(learned) / number,
        images=images / number,
        squares=squares / number,
        samples=number,
    )


def trained_vision_blocks(settings: Settings, plan: Plan) -> int:
    """Blocks of the tower whose activations backward reads: those that are trained or hold LoRA."""
    trained = settings.honeybee.train_vision_tower
    if settings.honeybee.lora_vision or trained == "all":
        return max(plan.config.vision_hidden_states)
    return trained or 0


def memory_lines(settings: Settings, plan: Plan, tokens: Tokens) -> list[str]:
    """An estimate of what a device holds, alone and with everything sharded over several.

    Weights and optimizer: see [`state_bytes`]; gradients as the trained weights. Activations of T tokens (a micro-batch;
    padded, each sample as long as the longest measured), L layers, widths D and I, a bytes a number: T * D * L * a with
    gradient checkpointing, and T * (12 D + 4 I) * a for each layer that is held at once (one with, L without), of the LLM and
    of what is trained of the tower; logits T * V * (a + 4), as if all of the tokens were learned.
    """
    training = settings.training
    sizes = state_bytes(plan.parameters, plan.config, settings)
    activations = activation_bytes(settings, plan, tokens)
    devices = training.world_size if training.world_size > 1 else DEVICES
    states = {"weights": sizes["weights"], "gradients": sizes["trained"], "optimizer": sizes["optimizer"]}
    lines = [f"  {name:<12} {gigabytes(size):>12}" for name, size in {**states, "activations": activations}.items()]
    total = sum(states.values())
    if plan.collator.cuts_images:
        most = activation_bytes(settings, plan, of_most_crops(plan, tokens))
        squares = most_crops(plan.collator.processor).num_crops
        lines.append(
            f"  {'':<12} {gigabytes(most):>12} of activations where every picture of a batch is {squares} squares"
        )
    return [
        *lines,
        f"  {'in all':<12} {gigabytes(total + activations):>12}; {gigabytes(total / devices + activations)} with "
        f"everything sharded over {devices} devices (FSDP2, ZeRO-3)",
    ]


def of_most_crops(plan: Plan, tokens: Tokens) -> Tokens:
    """The same samples as if each of their pictures were cut as far as it can be; a sample is cut off at `max_length`."""
    visual = tokens.images * plan.collator.most_tokens(largest_m(plan))
    most, longest = plan.collator.max_length or math.inf, tokens.longest - tokens.visual + visual
    squares = tokens.images * most_crops(plan.collator.processor).num_crops
    mean = min(tokens.mean - tokens.visual + visual, most)
    return replace(tokens, mean=mean, longest=min(longest, most), visual=visual, squares=squares)


def activation_bytes(settings: Settings, plan: Plan, tokens: Tokens) -> float:
    """See [`memory_lines`]."""
    training, text = settings.training, plan.config.text_config
    half = 2 if training.bf16 or training.fp16 else 4
    count, samples = settings.honeybee.max_tokens_per_batch, training.per_device_train_batch_size
    if count is None:
        count = samples * (tokens.mean if plan.collator.pack else tokens.longest)
    else:
        samples = count / tokens.mean
    squares = samples * tokens.squares
    stacks = [
        (text, count, text.num_hidden_layers),
        (plan.config.vision_config, squares * (plan.config.num_patches + 1), trained_vision_blocks(settings, plan)),
    ]
    activations = count * text.vocab_size * (half + 4)
    for config, number, layers in stacks:
        width = config.hidden_size
        layer = number * (12 * width + 4 * getattr(config, "intermediate_size", 4 * width)) * half
        held = number * width * layers * half + layer if training.gradient_checkpointing else layer * layers
        activations += held if layers else 0
    return activations
