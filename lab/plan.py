# SPDX-License-Identifier: Apache-2.0
"""What a run of the lab trains: its presets, the choice of learning rates, and the list of experiments."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from lab.experiment import Experiment, Task
from lab.projectors import CANDIDATES, matched_width, number_of_parameters, projector_config
from lab.ways import PLAIN, WAYS

RATES = (1e-3, 2.5e-3, 6e-3, 1.5e-2, 4e-2)
RATE_STEP = 2.5  # by which the grid grows where the best value is at its edge
MAX_RATES = 9
MATCHED_TO = "c-abs"  # whose number of parameters the matched widths have
USED_ELSEWHERE = "c-abs"  # at other M than its own, since none of its weights has a shape that depends on M
WIDE_MLP = "pool-mlp"  # which is an MLP on each patch, of any width, where M = N


@dataclass(frozen=True)
class Preset:
    """
    Args:
        towers: by name. All but the main comparison is run on the first alone.
        seeds: how many.
        own_stand_ins: stand-ins and scenes of its own for each seed; otherwise all have those of the first.
        points: steps at which a run is evaluated. The last is the length of the comparison, the one before it "early".
        long: who goes on after that, on the first tower, to `long_points`.
        search_steps: length of a run that a learning rate is chosen by; on the first tower with the first seed.
        num_tokens: M of the main comparison.
        curve: other M.
        every_patch: who is also run with M = N.
        matched: run everyone with as many parameters as the C-Abstractor, too.
        elastic: who is also trained for all of these M at once, for the steps of the comparison and for twice as many.
        ways: of learning them, beside the plain one, whose learning rate they take; those that the projector can.
        controls: run the controls.
        left_out: projectors that are run only where they are asked for, and controls that are not run.
        images: how many to train on, to choose learning rates on and to test on.
        tower_steps, language_model_steps: how long stand-ins are trained.
    """

    towers: tuple[str, ...] = ("clip", "siglip")
    seeds: int = 3
    own_stand_ins: bool = True
    points: tuple[int, ...] = (60, 120, 240, 360)
    long: tuple[str, ...] = ("c-abs", "resampler")
    long_points: tuple[int, ...] = (720, 1080)
    search_steps: int = 160
    num_tokens: int = 16
    curve: tuple[int, ...] = (4, 36)
    every_patch: tuple[str, ...] = ("c-abs",)
    matched: bool = True
    elastic: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()
    controls: bool = True
    left_out: tuple[str, ...] = ()
    images: tuple[int, ...] = (5000, 200, 300)
    tower_steps: int = 400
    language_model_steps: int = 1500

    def __post_init__(self):
        """
        Raises:
            ValueError: settings that cannot be run, with the value.
        """
        steps = self.points + self.long_points * bool(self.long)
        if len(self.points) < 2 or list(steps) != sorted(set(steps)) or steps[0] < 1:
            raise ValueError(
                f"points and long_points are {list(steps)}; at least two points, all ascending, are needed"
            )
        for number in self.numbers:
            if number < 1 or math.isqrt(number) ** 2 != number:
                root = max(1, math.isqrt(max(number, 0)))
                raise ValueError(f"M = {number} is not a square; use {root**2} or {(root + 1) ** 2}")
        if len(set(self.numbers)) < len(self.numbers):
            raise ValueError(f"num_tokens={self.num_tokens} and curve={list(self.curve)} name an M twice; take one out")
        if len(self.images) != 3 or min(*self.images, self.seeds, self.search_steps) < 1:
            raise ValueError(
                f"images={list(self.images)}, seeds={self.seeds}, search_steps={self.search_steps}: three numbers of images "
                "(train, validation, test) are needed, and everything above 0"
            )

    @property
    def numbers(self) -> tuple[int, ...]:
        """All M that are compared, ascending."""
        return tuple(sorted((self.num_tokens, *self.curve)))


PRESETS = {
    "full": Preset(),
    "quick": Preset(
        towers=("clip",),
        own_stand_ins=False,
        points=(60, 120, 200),
        long=(),
        search_steps=80,
        curve=(),
        every_patch=(),
        matched=False,
        left_out=("mlp", "placeless"),
        images=(3000, 100, 150),
        tower_steps=300,
        language_model_steps=900,
    ),
    "elastic": Preset(
        towers=("clip",),
        long=(),
        curve=(4, 9, 25, 36),
        every_patch=(),
        matched=False,
        elastic=("c-abs",),
        ways=tuple(way for way in WAYS if way != PLAIN),
        controls=False,
        left_out=("linear", "mlp", "pool-mlp", "resampler", "d-abs"),
    ),
    "smoke": Preset(
        towers=("clip",),
        seeds=2,
        own_stand_ins=False,
        points=(2, 4),
        long_points=(6,),
        search_steps=2,
        curve=(4,),
        every_patch=(),
        elastic=("c-abs", "d-abs"),
        ways=("a scale and a shift for each M", "the largest M teaches"),
        images=(64, 12, 12),
        tower_steps=4,
        language_model_steps=4,
    ),
}


@dataclass(frozen=True)
class Variant:
    """What is trained, apart from data and learning rate. `hidden_size` None: the default width; `trained_at`: the M of an
    elastic one."""

    projector: str
    num_tokens: int
    hidden_size: int | None = None
    trained_at: tuple[int, ...] = ()


def tokens_of(name: str, num_tokens: int, num_patches: int) -> int:
    return num_patches if CANDIDATES[name].per_patch else num_tokens


def variants_of(names: list[str], preset: Preset, task: Task) -> list[Variant]:
    """Each projector at the main M; then the curve, the ends of it, and as many parameters as the C-Abstractor has.

    Raises:
        ValueError: an M that is not below the number of patches.
    """
    configs, num_patches = task.configs(), task.num_patches
    if max(preset.num_tokens, *preset.curve, 0) >= num_patches:
        raise ValueError(
            f"M of num_tokens={preset.num_tokens} and curve={list(preset.curve)} must be below the number of patches, "
            f"{num_patches}; use fewer tokens"
        )
    variants = [Variant(name, tokens_of(name, preset.num_tokens, num_patches)) for name in names]
    variants += [
        Variant(name, num_tokens)
        for name in names
        if not CANDIDATES[name].per_patch
        for num_tokens in preset.curve + (num_patches,) * (name in preset.every_patch)
    ]
    variants += [
        Variant(name, preset.num_tokens, trained_at=preset.numbers) for name in names if name in preset.elastic
    ]
    if preset.matched and MATCHED_TO in names:
        config = projector_config(MATCHED_TO, *configs, preset.num_tokens, None)
        target = number_of_parameters(MATCHED_TO, config)
        wide = [(name, preset.num_tokens) for name in names if CANDIDATES[name].has_width and name != MATCHED_TO]
        wide += [(WIDE_MLP, num_patches)] * (WIDE_MLP in names)
        variants += [
            Variant(name, num_tokens, matched_width(name, *configs, num_tokens, target)) for name, num_tokens in wide
        ]
    return variants


def rate_search(
    variants: list[Variant], preset: Preset, task: Task, run_all: Callable[[list[Experiment]], list[dict]]
) -> dict[Variant, dict[float, float]]:
    """By variant, loss on validation images by learning rate. (Loss, because many accuracies are alike after short runs.) The
    grid grows until the best value is inside, or it has `MAX_RATES` values: the report says so then."""
    found = {variant: {} for variant in variants}
    wanted = [(variant, rate) for variant in variants for rate in RATES]
    while wanted:
        trials = [_experiment(variant, task, rate, (preset.search_steps,), "validation") for variant, rate in wanted]
        for (variant, rate), record in zip(wanted, run_all(trials)):
            loss = record["points"][-1]["loss"]
            found[variant][rate] = loss if math.isfinite(loss) else math.inf
        wanted = [(variant, rate) for variant in variants for rate in _beyond_the_edge(found[variant])]
    return found


def _experiment(
    variant: Variant, task: Task, rate: float, points: tuple[int, ...], split: str = "test", **settings
) -> Experiment:
    return Experiment(
        variant.projector,
        task,
        variant.num_tokens,
        rate,
        points,
        hidden_size=variant.hidden_size,
        split=split,
        trained_at=variant.trained_at,
        **settings,
    )


def best_rate(losses: dict[float, float]) -> float:
    """The one with the least loss; of several, the one nearest to the middle."""
    middle = math.sqrt(min(losses) * max(losses))
    return min(losses, key=lambda rate: (losses[rate], abs(math.log(rate / middle))))


def is_at_the_edge(losses: dict[float, float]) -> bool:
    """Whether a value outside might be better than the best."""
    return best_rate(losses) in (min(losses), max(losses))


def _beyond_the_edge(losses: dict[float, float]) -> list[float]:
    if not is_at_the_edge(losses) or len(losses) >= MAX_RATES:
        return []
    low, high = min(losses), max(losses)
    return [float(f"{high * RATE_STEP if best_rate(losses) == high else low / RATE_STEP:.2g}")]


def experiments(rates: dict[Variant, float], preset: Preset, tasks: list[Task], num_patches: int) -> list[Experiment]:
    """Everything on the tasks with the first tower; on the others the main comparison, without those whose M is N. What
    takes long comes first."""
    planned = []
    for task in tasks:
        on_first = task.tower == preset.towers[0]
        for variant, rate in rates.items():
            name, default = variant.projector, variant.hidden_size is None and not variant.trained_at
            is_main = default and variant.num_tokens == tokens_of(name, preset.num_tokens, num_patches)
            if on_first:
                points = preset.points + preset.long_points * (is_main and name in preset.long)
                points += (2 * points[-1],) * bool(variant.trained_at)
                used_at = preset.curve * (is_main and name in (USED_ELSEWHERE, *preset.elastic))
                planned.append(_experiment(variant, task, rate, points, elsewhere=used_at))
                planned += [
                    _experiment(variant, task, rate, points, way=way)
                    for way in preset.ways * bool(variant.trained_at)
                    if CANDIDATES[name].scaled or not WAYS[way].scaled
                ]
            elif is_main and not CANDIDATES[name].per_patch:
                planned.append(_experiment(variant, task, rate, preset.points))
        for name, candidate in CANDIDATES.items():
            if on_first and preset.controls and candidate.control and name not in preset.left_out:
                num_tokens = tokens_of(name, preset.num_tokens, num_patches)
                rate = rates.get(Variant(candidate.control, num_tokens))
                if rate is not None:
                    planned.append(_experiment(Variant(name, num_tokens), task, rate, preset.points))
    return sorted(planned, key=lambda each: -each.points[-1] * (50 + each.num_tokens))
