# SPDX-License-Identifier: Apache-2.0
"""The report of a run of the lab: `report.md`, its pictures, and every result in `results.jsonl`."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch

from lab.claims import MARGIN, MIN_SEEDS, Setting, elastic_gap, judge
from lab.experiment import Experiment, Task
from lab.looks import map_of_tokens
from lab.loop import write_text
from lab.plan import Preset, best_rate, is_at_the_edge
from lab.projectors import CANDIDATES, make_projector, projector_config
from lab.results import DRAWS, Cell, Estimate, Results, arrays, estimate
from lab.scenes import GROUPS
from lab.ways import PLAIN

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

LOOKED_AT = ("c-abs", "d-abs", "resampler", "pool-mlp")
SHOWN_TOKENS = 4
LOST, KEPT = 0.25, 0.75  # shares of what a projector has above `blind`
TEXT = """\
# Which projector, at which M, at what cost

{scope}

Accuracy is the mean over {kinds} kinds of questions about held-out images; [in brackets] its 95 % interval, a bootstrap of
{draws} draws over seeds and, within a seed, over images. {seeds} With so few seeds an interval is a rough one, and each claim is
judged alone: of twenty true ones, one is expected to look otherwise.

## Claims

{claims}

A verdict is about these data and these parts. *Better* is supported where the whole interval is above {margin}, a difference
that counts, and not supported where it is below 0. *Equal* and *no worse* are supported or not where the whole interval is on
one side of the limit that the figure names. All else is undecided.

## Who, at what cost, how well

After {steps} steps with {batch} images each. CPU time is that of training on one core, without evaluation.

{table}

![by kind of question](kinds.png)

![by steps](steps.png)

![by CPU time](cpu_time.png)
{longer}{curve}{elastic}
## Controls

{ceiling}{controls}

`blind` sees the same tokens for every image: what it gets right can be guessed. `shuffled` is a C-Abstractor whose tokens
come from images drawn by chance: it must lose everything. `placeless` is an MLP on patches whose positions were taken away:
it must lose `where`, which asks for the cell of a digit, and keep the content. (Who knows the content still guesses better what
is in a cell.) A check is about the share that is left of what the projector without the fault has above `blind`. Passed: the
interval is below {lost} where something must be lost, above {kept} where it must be kept; failed: it lies on the other side;
undecided: on both.

## Where they look

{looks}

## Learning rates

Chosen by the loss on validation images, {rate_tower}, after {search_steps} steps, for each projector at each M and width; where
the best value was at the edge, the grid grew. Other seeds and towers use the same.

{rates}
"""


def _table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _passes(found: Estimate, low: float, high: float) -> str:
    if low < found.low and found.high < high:
        return "passed"
    return "**failed**" if found.high <= low or found.low >= high else "undecided"


def _images(tasks: list[Task]) -> dict:
    """By (tower, seed) and kind, the image of each test row."""
    found = {}
    for task in tasks:
        rows, by_kind = task.rows("test", 1), defaultdict(list)
        for image, kind in zip(rows.images.tolist(), rows.kinds):
            by_kind[kind].append(image)
        found[task.tower, task.seed] = {kind: np.array(images) for kind, images in by_kind.items()}
    return found


class Report:
    """
    Args:
        folder: of the report; what experiments wrote is in `runs` there.
        records: of all experiments.
        searched: validation loss by variant and learning rate.
    """

    def __init__(
        self, folder: str, records: list[dict], searched: dict, preset: Preset, tasks: list[Task], patches: int
    ):
        self.folder, self.records, self.searched = folder, records, searched
        self.preset, self.tasks = preset, tasks
        sets = {(task.tower, task.seed): task.images for task in tasks}
        self.results = Results(records, _images(tasks), sets)
        self.setting = Setting(preset, patches)
        known = set(self.results.kinds)
        self.groups = {group: list(kinds) for group, kinds in GROUPS.items() if known >= set(kinds)}
        self.names = list(dict.fromkeys(variant.projector for variant in searched))

    def accuracy(self, cell: Cell, step: int | None = None, kinds=None) -> Estimate:
        answers = self.results.at_step(cell, step or self.setting.end)
        return self._share(answers, kinds)

    def _share(self, answers: dict, kinds=None) -> Estimate:
        """Of right answers: from 0 to 1, also where a widened interval is not."""
        return estimate(self.results.draws(answers, kinds).clip(0, 1))

    def write(self, scope: str) -> str:
        """Writes everything; returns the path of the text."""
        self.plot_over("steps.png", "steps", lambda record, point: point["step"])
        self.plot_over(
            "cpu_time.png", "CPU seconds of training, on one core", lambda record, point: point["cpu_seconds"]
        )
        self.plot_kinds()
        fewer = len(self.results.seeds) < MIN_SEEDS
        text = TEXT.format(
            scope=scope,
            kinds=len(self.results.kinds),
            draws=DRAWS,
            seeds=f"Seeds: {', '.join(map(str, self.results.seeds))}."
            + (f" With fewer than {MIN_SEEDS} every claim is undecided." if fewer else ""),
            claims=self.claims(),
            steps=self.setting.end,
            batch=Experiment.batch_size,
            table=self.comparison(),
            longer=self.longer(),
            curve=self.curve(),
            elastic="".join(self.elastic(name) for name in self.preset.elastic if name in self.names),
            ceiling=self.ceiling(),
            controls=self.controls(),
            margin=MARGIN,
            lost=LOST,
            kept=KEPT,
            looks=self.looks(),
            rate_tower=f"{self.tasks[0].tower}, seed {self.tasks[0].seed}",
            search_steps=self.preset.search_steps,
            rates=self.rates(),
        )
        for name, content in (("results.jsonl", self._lines()), ("report.md", text)):
            path = os.path.join(self.folder, name)
            write_text(path, content)
        return path

    def _lines(self) -> str:
        return "".join(json.dumps(record) + "\n" for record in self.records)

    def claims(self) -> str:
        rows = [
            [judged.claim.text, judged.claim.figure, judged.found, f"**{judged.verdict}**"]
            for judged in judge(self.results, self.setting)
        ]
        return _table(["claim", "figure", "found", "verdict"], rows) if rows else "None that this run can judge."

    def comparison(self) -> str:
        cells = [cell for cell in self.results.cells if CANDIDATES[cell.projector].control is None]
        order = {cell: (cell.num_tokens, cell.width, self.names.index(cell.projector)) for cell in cells}
        rows = []
        for cell in sorted(cells, key=order.get):
            records = self.results.cells[cell].values()
            seconds = np.mean(list(self.results.seconds(cell, self.setting.end).values()))
            width = (
                f"{cell.width} ({next(iter(records))['hidden_size']})" if CANDIDATES[cell.projector].has_width else ""
            )
            parameters = next(iter(records))["parameters"]
            towers = ", ".join(sorted({record["tower"] for record in records}))
            figures = [self.accuracy(cell), *(self.accuracy(cell, kinds=kinds) for kinds in self.groups.values())]
            name = [cell.projector, cell.num_tokens, width, towers]
            rows.append([*name, f"{parameters:,}", f"{seconds:.0f}", *figures])
        head = ["projector", "M", "hidden size", "towers", "parameters", "CPU s", "all", *self.groups]
        return _table(head, rows)

    def longer(self) -> str:
        names = [name for name in self.preset.long if name in self.names]
        if not names:
            return ""
        return f"\nBeyond {self.setting.end} steps: {', '.join(names)} with {self.preset.towers[0]} alone.\n"

    def curve(self) -> str:
        if not self.preset.curve:
            return ""
        figure, axis = pyplot.subplots(figsize=(6, 4))
        for name in self.names:
            cells = sorted(
                (cell for cell in self.results.cells if cell.projector == name and cell.width == "default"),
                key=lambda cell: cell.num_tokens,
            )
            # On the first tower, so that all points of a line are of the same images.
            found = [self._first_tower(cell) for cell in cells]
            _line(axis, [cell.num_tokens for cell in cells], found, name, self._color(name))
        _scale_by_tokens(axis, sorted({cell.num_tokens for cell in self.results.cells}))
        self._finish(figure, axis, "visual tokens M", "tokens.png")
        return f"\n![by M, {self.preset.towers[0]}](tokens.png)\n"

    def elastic(self, name: str) -> str:
        """One projector that is trained for several M, beside those that are trained for one."""
        numbers, end, answers = self.preset.numbers, self.setting.end, self.results.at
        elastic, main = self.setting.elastic(name), self.setting.main(name)
        lines = {
            f"its own M alone, {end} steps": [answers(Cell(name, number), number, end) for number in numbers],
            f"{main.num_tokens} alone, {end} steps": [answers(main, number, end) for number in numbers],
            f"all of them (elastic), {end} steps": [answers(elastic, number, end) for number in numbers],
            f"all of them (elastic), {2 * end} steps": [answers(elastic, number, 2 * end) for number in numbers],
        }
        found = {line: list(map(self._share, row)) for line, row in lines.items()}
        figure, axis = pyplot.subplots(figsize=(6, 4))
        for color, (line, row) in enumerate(found.items()):
            _line(axis, numbers, row, line, f"C{color}")
        _scale_by_tokens(axis, numbers)
        self._finish(figure, axis, "visual tokens M when it is used", f"elastic-{name}.png")
        gaps = {
            f"elastic minus its own M alone, {step} steps": [
                estimate(elastic_gap(self.results, self.setting, name, [number], step)) for number in numbers
            ]
            for step in (end, 2 * end)
        }
        table = _table(["trained for", *map(str, numbers)], [[line, *row] for line, row in {**found, **gaps}.items()])
        return (
            f"\n## Elastic: one {name} for several M\n\nEach image of a batch drew its M where nothing else is said. A model that "
            f"is trained for one M has its own learning rate, and so has the elastic one.\n\n{table}\n\n"
            f"![elastic {name}](elastic-{name}.png)\n{self.ways(name)}"
        )

    def ways(self, name: str) -> str:
        """What an elastic projector loses against those for one M, by the way in which it learned."""
        numbers, end, rows = self.preset.numbers, self.setting.end, []

        def gap(way: str, some: Sequence[int], step: int) -> Estimate:
            return estimate(elastic_gap(self.results, self.setting, name, some, step, way))

        for way in (PLAIN, *self.preset.ways):
            cell = self.setting.elastic(name, way)
            if cell in self.results.cells:
                seconds = np.mean(list(self.results.seconds(cell, end).values()))
                after = [gap(way, [number], end) for number in numbers]
                between = gap(way, numbers[1:-1], end) if len(numbers) > 2 else ""
                later = [gap(way, some, 2 * end) for some in (numbers[:1], numbers[-1:], numbers)]
                rows.append([way, f"{seconds:.0f}", *after, between, *later])
        if len(rows) < 2:
            return ""
        head = ["way of learning", "CPU s", *(f"M = {number}" for number in numbers), "between the ends"]
        head += [f"{2 * end} steps: M = {numbers[0]}", f"M = {numbers[-1]}", "all"]
        return (
            f"\nElastic minus its own M alone, after {end} and {2 * end} steps, by the way of learning, all with the learning "
            f"rate of the first; CPU time is that of {end} steps:\n\n{_table(head, rows)}\n"
        )

    def _first_tower(self, cell: Cell) -> Estimate:
        answers = self.results.at_step(cell, self.setting.end)
        return self._share({unit: right for unit, right in answers.items() if unit[0] == self.preset.towers[0]})

    def ceiling(self) -> str:
        """What the language model answers from perfect tokens."""
        rows = []
        for num_tokens in sorted({cell.num_tokens for cell in self.results.cells}):
            found = {
                (task.tower, task.seed): task.ceiling(num_tokens)
                for task in self.tasks
                if task.tower == self.preset.towers[0]
            }
            if None in found.values():
                return ""
            answers = {unit: arrays(right) for unit, right in found.items()}
            kinds = [None, *self.groups.values()]
            rows.append([num_tokens, *(self._share(answers, each) for each in kinds)])
        return (
            "What the language model answers where the tokens are symbols, in which every digit and its cell are named:\n\n"
            + _table(["M", "all", *self.groups], rows)
            + "\n\n"
        )

    def controls(self) -> str:
        rows = [
            [
                cell.projector,
                cell.num_tokens,
                *(self.accuracy(cell, kinds=kinds) for kinds in self.groups.values()),
                *(f"{self.accuracy(cell, kinds=[kind]).mean:.2f}" for kind in self.results.kinds),
            ]
            for cell in self.results.cells
            if CANDIDATES[cell.projector].control is not None
        ]
        if not rows:
            return "Not run."
        where, content = ["where"], self.groups.get("content")
        checks = [
            ["`shuffled` loses everything that `c-abs` knows", self.kept("shuffled", "c-abs"), -np.inf, LOST],
            ["`placeless` loses `where`", self.kept("placeless", "mlp", where), -np.inf, LOST],
            ["`placeless` keeps the content", self.kept("placeless", "mlp", content), KEPT, np.inf],
        ]
        checks = [[text, found, _passes(found, low, high)] for text, found, low, high in checks if found is not None]
        head = ["control", "M", *self.groups, *self.results.kinds]
        return "\n\n".join((_table(head, rows), _table(["check", "share that is left", ""], checks)))

    def kept(self, fault: str, whole: str, kinds: list[str] | None = None) -> Estimate | None:
        """What a planted fault leaves of the accuracy that its projector has above `blind`: 0 is nothing, 1 is all. None where
        this run lacks one of them, or a kind."""
        cells = [self.setting.main(name) for name in (fault, whole, "blind")]
        if not self.results.cells.keys() >= set(cells) or not set(self.results.kinds) >= set(kinds or ()):
            return None
        fault, whole, blind = (self.results.at_step(cell, self.setting.end) for cell in cells)
        with np.errstate(divide="ignore", invalid="ignore"):  # where a projector has learned nothing
            kept = self.results.difference(fault, blind, kinds) / self.results.difference(whole, blind, kinds)
        return estimate(kept)

    def rates(self) -> str:
        rows = []
        for variant, found in self.searched.items():
            tried = ", ".join(f"{rate:g}: {found[rate]:.3f}" for rate in sorted(found))
            edge = f", at the edge of {len(found)} values" if is_at_the_edge(found) else ""
            width = "elastic" if variant.trained_at else variant.hidden_size or "default"
            about = [variant.projector, variant.num_tokens, width]
            rows.append([*about, f"{best_rate(found):g}{edge}", tried])
        return _table(["projector", "M", "hidden size", "chosen", "validation loss by learning rate"], rows)

    def plot_over(self, file: str, title: str, place) -> None:
        figure, axis = pyplot.subplots(figsize=(6, 4))
        for name in self.names:
            cell = self.setting.main(name)
            steps = self.preset.points + self.preset.long_points * (name in self.preset.long)
            records = self.results.cells[cell].values()
            places = [
                np.mean([place(record, p) for record in records for p in record["points"] if p["step"] == step])
                for step in steps
            ]
            _line(axis, places, [self.accuracy(cell, step) for step in steps], str(cell), self._color(name))
        self._finish(figure, axis, title, file)

    def plot_kinds(self) -> None:
        kinds = self.results.kinds
        figure, axis = pyplot.subplots(figsize=(9, 4))
        width = 0.8 / len(self.names)
        for index, name in enumerate(self.names):
            cell = self.setting.main(name)
            found = [self.accuracy(cell, kinds=[kind]) for kind in kinds]
            means = np.array([each.mean for each in found])
            errors = np.abs([[each.low for each in found], [each.high for each in found]] - means)
            places = np.arange(len(kinds)) + index * width
            axis.bar(places, means, width, yerr=errors, label=str(cell), color=self._color(name), error_kw={"lw": 0.8})
        axis.set_xticks(np.arange(len(kinds)) + 0.4 - width / 2, kinds)
        self._finish(figure, axis, "", "kinds.png")

    def looks(self) -> str:
        names = [name for name in LOOKED_AT if name in self.names]
        if not names:
            return "None of the projectors that are looked into was run."
        task = self.tasks[0]
        image, picture = task.picture()
        features = task.features("test")[image : image + 1].float()
        tokens = np.linspace(0, self.preset.num_tokens - 1, SHOWN_TOKENS).astype(int).tolist()
        figure, axes = pyplot.subplots(
            len(names), SHOWN_TOKENS, figsize=(2 * SHOWN_TOKENS, 2.1 * len(names)), squeeze=False
        )
        for row, name in zip(axes, names):
            maps = map_of_tokens(self._trained(name, task), features, tokens)
            for axis, token, each in zip(row, tokens, maps):
                axis.imshow(picture, cmap="gray", extent=(0, 1, 1, 0))
                axis.imshow(each, cmap="inferno", alpha=0.6, extent=(0, 1, 1, 0), vmin=0, vmax=1)
                axis.set_title(f"{name}, token {token}", fontsize=8)
                axis.set_axis_off()
        figure.tight_layout()
        figure.savefig(os.path.join(self.folder, "looks.png"), dpi=80)
        pyplot.close(figure)
        return (
            f"![where they look](looks.png)\n\nOne test image, {task.tower}, seed {task.seed}; brighter patches count for more."
            " d-abs: the points that a query samples, by weight; resampler: what a query attends to (both mean over layers and"
            " heads); others: the norm of the gradient of the token's norm. Each at the end of its run."
        )

    def _trained(self, name: str, task: Task) -> torch.nn.Module:
        cell = self.setting.main(name)
        record = self.results.cells[cell][task.tower, task.seed]
        projector = make_projector(name, projector_config(name, *task.configs(), cell.num_tokens, None))
        path = os.path.join(self.folder, "runs", record["name"] + ".pt")
        projector.load_state_dict(torch.load(path, weights_only=True))
        return projector

    def _color(self, name: str) -> str:
        return f"C{self.names.index(name)}"

    def _finish(self, figure, axis, title: str, file: str) -> None:
        axis.set_xlabel(title)
        axis.set_ylabel("accuracy")
        axis.set_ylim(0, 1)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        figure.tight_layout()
        figure.savefig(os.path.join(self.folder, file), dpi=90)
        pyplot.close(figure)


def _scale_by_tokens(axis, numbers: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(numbers)
    axis.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())


def _line(axis, places: list, found: list[Estimate], label: str, color: str) -> None:
    axis.plot(places, [each.mean for each in found], marker="o", markersize=3, label=label, color=color)
    axis.fill_between(
        places, [each.low for each in found], [each.high for each in found], alpha=0.15, color=color, lw=0
    )
