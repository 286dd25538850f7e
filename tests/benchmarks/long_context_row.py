"""A row of `bench_long_context.py`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measurement; what makes no sense for a row is empty. GB are 10^9 bytes.

    - ``kv``: whether the prompt's K/V were computed, or one synthetic chunk stands for all of them.
    - ``tokens_per_s``, and ``p20_ms`` to ``p80_ms`` of its steps: over the time in which all requests decode.
      ``floor_ms`` of a step: weights + resident K/V over ``copy_gb_per_s`` (read and written).
    - ``settled_tokens_per_s``: over the part of it in which each is past its first window, whose boundaries are denser.
      All of turnover and recall is of that part: ``turns`` are predictions, fewer than ``windows``, those that passed,
      when the indexer is too slow (``predict_p50_ms``, from question to answer); ``turnover`` is the share of chunks
      brought in by scores that a turn recalled, ``turnover_per_window`` the same for each window that passed;
      ``stall_s`` is time the engine waited for copies; ``loss_to_recall`` is of tokens per second, against turnover 0.
    - ``copy_share``: device time of all that only moves K/V, over the time of the prefill steps it was seen in; it may
      run in parallel to the rest.
    - ``ttft``: time to first token; ``floor_s``, of a resumed session: its bytes over ``host_copy_gb_per_s``.
    """

    row: str
    shape: str
    context: int
    concurrency: int
    kv: str
    keep_ratio: float
    window_steps: int
    settings: str
    kept_ratio: float | None = None
    turnover_asked: float | None = None
    turnover: float | None = None
    turnover_per_window: float | None = None
    turns: int | None = None
    windows: float | None = None
    predict_p50_ms: float | None = None
    late_windows: int | None = None
    recalled_chunks: int | None = None
    recall_gb_per_s: float | None = None
    stall_s: float | None = None
    steps: int | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    floor_ms: float | None = None
    over_floor: float | None = None
    tokens_per_s: float | None = None
    settled_tokens_per_s: float | None = None
    loss_to_recall: float | None = None
    cached_tokens: int | None = None
    prefilled_tokens: int | None = None
    prefill_tokens_per_s: float | None = None
    tflop_per_s: float | None = None
    copy_share: float | None = None
    ttft_p20_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p80_s: float | None = None
    floor_s: float | None = None
    fill_s: float | None = None
    copy_gb_per_s: float | None = None
    host_copy_gb_per_s: float | None = None
    weight_bytes: int | None = None
    resident_bytes: int | None = None
    hot_bytes: int | None = None
    arena_bytes: int | None = None
    gpu_peak_bytes: int | None = None
    start_s: float | None = None
    note: str = ""
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    date: str = ""
