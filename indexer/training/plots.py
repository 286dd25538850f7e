"""Learning curves and comparisons as PNG. Needs matplotlib, which the extra `train` installs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forecache.indexer.training.evaluate import SCORERS, Figure
from forecache.indexer.training.train_state import Epoch

FIGURES = {
    "coverage": "event mass covered",
    "retrieval_coverage": "the same, retrieval heads",
    "recall": "golden chunks kept",
    "answer_kept": "answers kept",
}


class PlotError(RuntimeError):
    """matplotlib is not installed."""


def _figure(columns: int) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise PlotError("plots need matplotlib; run: pip install 'forecache[train]'") from error
    canvas = Canvas(figsize=(4.5 * columns, 3.6), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas, canvas.subplots(1, columns, squeeze=False)[0]


def plot_curve(path: Path, curve: Sequence[Epoch]) -> None:
    """Loss, and recall and coverage of the held-out documents, by epoch."""
    canvas, (left, right) = _figure(2)
    epochs = [entry.epoch for entry in curve]
    left.plot(epochs, [entry.train_loss for entry in curve], label="training")
    left.plot(epochs, [entry.loss for entry in curve], label="held out")
    left.set(xlabel="epoch", ylabel="loss")
    for name in ("coverage", "retrieval_coverage", "recall"):
        right.plot(epochs, [getattr(entry, name) for entry in curve], label=FIGURES[name])
    right.set(xlabel="epoch", ylabel="share, held out, 10 % budget")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    canvas.savefig(path, dpi=120)


def plot_figures(path: Path, figures: Sequence[Figure], *, lead: int) -> None:
    """Each measure over the budget, one line for each scorer, at one lead."""
    canvas, columns = _figure(len(FIGURES))
    chosen = [figure for figure in figures if (figure.task, figure.text, figure.lead) == ("all", "all", lead)]
    for axes, (name, title) in zip(columns, FIGURES.items(), strict=True):
        for scorer in SCORERS:
            points = sorted((f.budget, getattr(f, name)) for f in chosen if f.scorer == scorer)
            points = [point for point in points if point[1] is not None]
            if points:
                style = "-" if scorer == "trained" else "--"
                axes.plot([100 * x for x, _ in points], [y for _, y in points], style, marker="o", label=scorer)
        axes.set(xlabel="budget, % of chunks", title=f"{title}, {lead} steps ahead", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    canvas.legend(*columns[0].get_legend_handles_labels(), fontsize="small", loc="outside right center")
    canvas.savefig(path, dpi=120)
