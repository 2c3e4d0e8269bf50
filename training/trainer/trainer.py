# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer, its head applied where a label is learned, and its speed in the log."""

import math
import time
from contextlib import contextmanager, nullcontext

import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch.utils.data import DataLoader, Sampler
from trl import SFTTrainer

from training.trainer.benchmarks import Benchmarks
from training.trainer.engines import (
    WholeCopy,
    check_saves_whole_models,
    gather_head_before_use,
    gather_projector_at_once,
    saved_as_one_process,
    shards_weights,
    untie_originals,
)
from training.trainer.interruption import protect_workers
from training.trainer.learning_rates import split_groups
from training.trainer.length_grouping import LengthGroupedSampler
from training.trainer.token_batches import TokenBatches


def learned_only(inputs: dict) -> dict:
    """The inputs for TRL's head, (1, learned) `shift_labels` and where to take hidden states for them; unchanged where
    nothing is learned."""
    next_labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    learned = next_labels != -100
    if not learned.any():
        return inputs
    return {**inputs, "states_to_keep": learned, "shift_labels": next_labels[learned][None]}


def learned_of_first(inputs: dict, samples: int) -> dict:
    """The inputs with labels for that many samples and none for those behind them, padded or packed (see [`count_batch`])."""
    labels, positions = inputs["labels"], inputs.get("position_ids")
    if positions is None:
        sample = torch.arange(len(labels), device=labels.device)[:, None]
    else:
        sample = (positions == 0).cumsum(dim=1) - 1
    return {**inputs, "labels": labels.masked_fill(sample >= samples, -100)}


def count_batch(inputs: dict[str, torch.Tensor], image_token_id: int) -> torch.Tensor:
    """Counts a batch: samples, tokens without padding, tokens with it, and visual tokens, (4,) int64.

    A sample is a row, or in a packed row what begins at a `position_ids` of 0.
    """
    input_ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    padded = torch.tensor(input_ids.numel(), device=input_ids.device)
    samples = torch.tensor(len(input_ids), device=input_ids.device) if positions is None else (positions == 0).sum()
    tokens = padded if mask is None else mask.sum()
    return torch.stack([samples, tokens, padded, (input_ids == image_token_id).sum()])


def with_protected_workers(loader: DataLoader) -> DataLoader:
    # accelerate reads batches from the one inside, and makes another of the outer one's settings to skip batches.
    for each in (loader, getattr(loader, "base_dataloader", None)):
        if each is not None:
            protect_workers(each)
    return loader


class HoneybeeTrainer(SFTTrainer):
    """TRL scores hidden states without ever holding all logits, but on anything without Triton it scores every
    position, and most of a row (images, questions, padding) is never learned. Here it gets the others only. The loss
    is the same.

    Each line of the log says, for all processes together since the line before: `samples_per_second`,
    `tokens_per_second` (without padding), `padding_share` and `visual_tokens_per_step`. Where parts of the model have learning
    rates of their own, it has them as `learning_rate_vision` and `learning_rate_projector`.

    Evaluated is the loss alone, without logits: the mean over all learned tokens of a dataset, whatever shares a batch or
    a process; and then benchmarks. It changes nothing in the training around it.

    Args:
        sampler: the order in which samples are read, or `TokenBatches` of them; None for the library's own order, which is
            random.
        learning_rates: of parts of the model that have another one than `args.learning_rate`: "vision", "projector".
        benchmarks: what the model is asked at each evaluation. The other arguments are SFTTrainer's.
    """

    def __init__(
        self,
        *args,
        sampler: Sampler | TokenBatches | None = None,
        learning_rates: dict[str, float] | None = None,
        benchmarks: Benchmarks | None = None,
        **kwargs,
    ):
        self.sampler, self.learning_rates = sampler, learning_rates or {}
        self.benchmarks, self._whole_copy = benchmarks, None
        if isinstance(sampler, (LengthGroupedSampler, TokenBatches)):
            sampler.epoch = lambda: int(self.state.epoch or 0)
        self._counts = self._counted_since = None
        super().__init__(*args, **kwargs)
        # The model declines it, because a count of labels made before it masks placeholders would be wrong. Our collator
        # masks them itself, so that accumulation steps can weigh by their tokens. (Sequence parallelism counts alone.)
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        self.model_accepts_loss_kwargs = not getattr(parallelism, "sp_enabled", False)
        check_saves_whole_models(self.accelerator.state)
        if benchmarks is not None and shards_weights(self.accelerator.state):
            self._whole_copy = WholeCopy(self.model)
        gather_head_before_use(self.model)
        projector = self.model.config.projector_config
        if projector.elastic_num_query_tokens or projector.overview_num_query_tokens:
            gather_projector_at_once(self.model, self.accelerator.state)
        if self.is_fsdp_enabled:
            untie_originals(self.model)
        if isinstance(self.model, PeftModel):
            # peft writes its card before the adapter, which a card that fails would lose; hub_upload/push.py writes ours.
            self.model.create_or_update_model_card = lambda folder: None

    def _get_train_sampler(self, *args, **kwargs) -> Sampler | None:
        return super()._get_train_sampler(*args, **kwargs) if self.sampler is None else self.sampler

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.sampler, TokenBatches):
            return with_protected_workers(super().get_train_dataloader())
        args = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # As `accelerator.prepare` does, but that no batch is filled up to the number of samples of the others.
        state = self.accelerator
        prepared = prepare_data_loader(
            loader, state.device, state.num_processes, state.process_index, put_on_device=True, even_batches=False
        )
        return with_protected_workers(prepared)

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        return with_protected_workers(super().get_eval_dataloader(*args, **kwargs))

    def create_optimizer(self, *args, **kwargs):
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.learning_rates:
            self._part_of_group = split_groups(optimizer, self.model, self.learning_rates)
        return optimizer

    def training_step(self, model, inputs, *args, **kwargs):
        if self.learning_rates:
            # Now, because the schedule's step is before the log, whose own rate is that of the step, too.
            self._rates = dict(zip(self._part_of_group, self.get_learning_rates()))
        counts = count_batch(inputs, self.processing_class.image_token_id)
        # On the batch's device, and read when the log is written: reading would wait for the device.
        self._counts = counts if self._counts is None else self._counts + counts
        if self._counted_since is None:
            self._counted_since = time.perf_counter(), self.state.global_step
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        # Every process writes a line at the same time, as the trainer itself relies on.
        if "loss" in logs and self._counts is not None:
            start, first_step = self._counted_since
            samples, tokens, padded, visual = self.accelerator.reduce(self._counts.to(self.args.device), "sum").tolist()
            seconds = time.perf_counter() - start
            logs |= {
                "samples_per_second": round(samples / seconds, 3),
                "tokens_per_second": round(tokens / seconds, 1),
                "padding_share": round(1 - tokens / padded, 4),
                "visual_tokens_per_step": round(visual / max(1, self.state.global_step - first_step), 1),
            }
            self._counts = self._counted_since = None
            logs |= {f"learning_rate_{part}": self._rates[part] for part in self.learning_rates}
        super().log(logs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # These read logits of all positions; and a batch split along its tokens brings its own labels.
        reads_all = return_outputs or self.label_smoother is not None or self.compute_loss_func is not None
        if not reads_all and "shift_labels" not in inputs:
            inputs = learned_only(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, *args, **kwargs):
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:
            # accelerate fills the last batches of all processes with samples from the start, which count once.
            number = state.active_dataloader.total_batch_size // self.accelerator.num_processes
            inputs = learned_of_first(inputs, state.remainder - number * self.accelerator.process_index)
        loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
        learned = (inputs["labels"][:, 1:] != -100).sum().item()
        # Without a label in it, a smoothed loss is 0 / 0.
        self._evaluated.append((loss.item() * learned if learned else 0.0, learned))
        return loss, *rest

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        # For each of several datasets the library calls this again, with its name.
        if eval_dataset is None and self.benchmarks is not None:
            metrics = {**metrics, **self._ask_benchmarks()}
        return metrics

    def _ask_benchmarks(self) -> dict[str, float]:
        # As the library's evaluation: the next step of training turns both back.
        self.model_wrapped.eval()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()
        show_progress = self.is_local_process_zero() and not self.args.disable_tqdm
        with self._beside_training(), self._answering() as model, self.accelerator.autocast():
            metrics = self.benchmarks.metrics(model, self.accelerator, show_progress)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextmanager
    def _answering(self):
        """The model to generate with, as a Honeybee."""
        whole = nullcontext(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)
        if self._whole_copy is not None:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
            whole = self._whole_copy.filled(self.model, dtype, self.args.device)
        # Compiled parts would be compiled anew for a cache, and for each length of an answer.
        with torch.compiler.set_stance("force_eager"), whole as model:
            yield model

    @contextmanager
    def _beside_training(self):
        """What runs inside takes no random numbers from training, and no time from its speed in the log."""
        start = time.perf_counter()
        # The data loader draws seeds for its workers from the numbers that training goes on with.
        with torch.random.fork_rng(devices=[]):
            yield
        if self._counted_since is not None:
            began, step = self._counted_since
            self._counted_since = began + time.perf_counter() - start, step

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._evaluated = []
        with self._beside_training():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # The library's is a mean over batches, however many tokens they have.
        sums = torch.tensor([math.fsum(column) for column in zip(*self._evaluated)], device=self.args.device)
        loss, learned = self.accelerator.reduce(sums, "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(learned, 1)
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with saved_as_one_process(self.model, state_dict):
            super()._save(output_dir, state_dict)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes none: TRL's tells how to ask a text model. `hub_upload/push.py` writes ours."""

    def end(self) -> None:
        """Leaves the other processes, once all is saved, and lets go of what only training needs."""
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()
