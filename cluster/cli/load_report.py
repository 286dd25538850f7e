"""What the load tool saw, summed up: a table, JSON, and plots."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from forecache.cluster.cli.load_test import Answered
from forecache.indexer.training.plots import PlotError

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Slo:
    """What a good answer is: its first token, and its tokens on the mean, within so many seconds."""

    first_token_s: float
    inter_token_s: float

    def met(self, answer: Answered) -> bool:
        gaps = answer.gaps_s
        slow = gaps and sum(gaps) / len(gaps) > self.inter_token_s
        return answer.ok and bool(answer.token_s) and answer.first_token_s <= self.first_token_s and not slow


@dataclass(frozen=True)
class Summary:
    """Rates are per second of the whole run; times in seconds, by percentile; ratios 0 to 1."""

    duration_s: float
    requests: int
    answered: int
    refused: int
    failed: int
    requests_per_s: float
    output_tokens_per_s: float
    input_tokens_per_s: float
    goodput_per_s: float
    slo_met: float
    time_to_first_token_s: dict[str, float]
    inter_token_s: dict[str, float]
    end_to_end_s: dict[str, float]
    refusal_s: dict[str, float]
    keep_ratio: float
    prefix_hit_ratio: float


def summarize(answers: Sequence[Answered], slo: Slo) -> Summary:
    """Of all requests of a run; with none answered, times are empty."""
    good = [answer for answer in answers if answer.ok]
    refused = [answer for answer in answers if answer.status in (429, 503)]
    start = min((answer.due_s for answer in answers), default=0.0)
    duration_s = max(max((answer.end_s for answer in answers), default=0.0) - start, 1e-9)
    met = sum(slo.met(answer) for answer in answers)
    prompt = sum(answer.prompt_tokens for answer in good)
    return Summary(
        duration_s=duration_s,
        requests=len(answers),
        answered=len(good),
        refused=len(refused),
        failed=len(answers) - len(good) - len(refused),
        requests_per_s=len(good) / duration_s,
        output_tokens_per_s=sum(answer.completion_tokens for answer in good) / duration_s,
        input_tokens_per_s=prompt / duration_s,
        goodput_per_s=met / duration_s,
        slo_met=met / len(answers) if answers else 0.0,
        time_to_first_token_s=percentiles([answer.first_token_s for answer in good if answer.token_s]),
        inter_token_s=percentiles([gap for answer in good for gap in answer.gaps_s]),
        end_to_end_s=percentiles([answer.end_s - answer.due_s for answer in good]),
        refusal_s=percentiles([answer.end_s - answer.due_s for answer in refused]),
        keep_ratio=sum(answer.keep_ratio for answer in good) / len(good) if good else math.nan,
        prefix_hit_ratio=sum(answer.cached_tokens for answer in good) / prompt if prompt else math.nan,
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def table(summary: Summary, title: str) -> Table:
    drawn = Table(title=title, show_header=False)
    drawn.add_row("requests: answered / refused / failed", f"{summary.answered} / {summary.refused} / {summary.failed}")
    drawn.add_row("requests/s", f"{summary.requests_per_s:.2f}")
    drawn.add_row("tokens/s: output / input", f"{summary.output_tokens_per_s:.1f} / {summary.input_tokens_per_s:.1f}")
    drawn.add_row("goodput, requests/s (share of all)", f"{summary.goodput_per_s:.2f} ({summary.slo_met:.0%})")
    for name, label in (
        ("time_to_first_token_s", "time to first token"),
        ("inter_token_s", "between tokens"),
        ("end_to_end_s", "end to end"),
        ("refusal_s", "refused after"),
    ):
        values = getattr(summary, name)
        if values:
            drawn.add_row(f"{label}, ms: {' / '.join(values)}", " / ".join(f"{1e3 * v:.1f}" for v in values.values()))
    drawn.add_row("keep ratio", f"{summary.keep_ratio:.3f}")
    drawn.add_row("prompt tokens found in the cache", f"{summary.prefix_hit_ratio:.1%}")
    return drawn


def as_json(summary: Summary, settings: dict[str, Any], answers: Sequence[Answered]) -> dict[str, Any]:
    """All there is to keep of a run; times of requests are from its start."""
    start = min((answer.due_s for answer in answers), default=0.0)
    requests = [
        {
            "due_s": answer.due_s - start,
            "end_s": answer.end_s - start,
            "turn": answer.turn,
            "status": answer.status,
            "error": answer.error,
            "prompt_tokens": answer.prompt_tokens,
            "cached_tokens": answer.cached_tokens,
            "completion_tokens": answer.completion_tokens,
            "keep_ratio": answer.keep_ratio,
            "token_s": [at - start for at in answer.token_s],
        }
        for answer in answers
    ]
    # JSON has no NaN
    figures = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(summary).items()}
    return {"settings": settings, "summary": figures, "requests": requests}


def plot(path: Path, answers: Sequence[Answered], slo: Slo) -> None:
    """First tokens, gaps between tokens as cumulative shares, and requests over time.

    Raises:
        PlotError: matplotlib is not there.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("no plots are drawn without matplotlib; run: pip install 'forecache[train]'") from error
    canvas = Figure(figsize=(13.5, 3.6), layout="constrained")
    FigureCanvasAgg(canvas)
    first, gaps, course = canvas.subplots(1, 3)
    good = [answer for answer in answers if answer.ok]
    series = (
        (first, "time to first token, s", [a.first_token_s for a in good if a.token_s], slo.first_token_s),
        (gaps, "between tokens, s", [gap for a in good for gap in a.gaps_s], slo.inter_token_s),
    )
    for axes, label, values, limit in series:
        ordered = np.sort(np.array(values))
        axes.step(ordered, np.arange(1, len(ordered) + 1) / max(len(ordered), 1), where="post")
        axes.axvline(limit, color="tab:red", linestyle="--", label="SLO")
        axes.set(xlabel=label, ylabel="share", ylim=(0, 1.02))
        axes.legend()
    start = min((answer.due_s for answer in answers), default=0.0)
    for name, color, chosen in (
        ("answered", "tab:blue", good),
        ("not answered", "tab:red", [a for a in answers if not a.ok]),
    ):
        points = [(a.due_s - start, a.end_s - a.due_s) for a in chosen]
        course.scatter([x for x, _ in points], [y for _, y in points], s=8, color=color, label=name)
    course.set(xlabel="due after, s", ylabel="end to end, s")
    course.legend()
    for axes in (first, gaps, course):
        axes.grid(alpha=0.3)
    canvas.savefig(path, dpi=120)
