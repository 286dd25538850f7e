"""Hidden states of each sequence's last steps, from which the trained indexer computes its queries.

They are the inputs of the query projections. They stay on the device, in a ring per sequence; the layers write them
directly, also within CUDA graphs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forecache.workers.core.sequence import TokenSequence
from forecache.workers.models.step.attention_modules import attention_modules

SPARE_LINE = 0
"""Ring line for padding rows, and for rows whose history is not needed."""


@dataclass(frozen=True)
class HiddenRows:
    """Where the packed tokens of a step are kept.

    ``rows``: int64 [n], None for all; ``lines``, ``places``: int64 [n], in ``ring``. ``layers``: layer → its number in
    the ring.
    """

    ring: Tensor
    layers: dict[int, int]
    rows: Tensor | None
    lines: Tensor
    places: Tensor

    def keep(self, layer: int, hidden: Tensor) -> None:
        """Store ``hidden`` [tokens, hidden], the input of the attention of ``layer``."""
        kept = hidden if self.rows is None else hidden[self.rows]
        self.ring[:, :, self.layers[layer]][self.lines, self.places] = kept.to(self.ring.dtype)


@dataclass
class _Kept:
    """``line`` holds the steps at positions ``first`` to ``stop`` of a sequence that had started over ``restarts``
    times."""

    line: int
    restarts: int
    first: int
    stop: int


class HiddenHistory:
    """Rings of ``steps`` steps for at most ``sequences`` sequences at a time.

    ``ring``: float16 (what recordings hold) [lines, steps, target layers, hidden]; position p is in place p % steps.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...], steps: int, sequences: int) -> None:
        self.steps = steps
        self.layers = {layer: number for number, layer in enumerate(layers)}
        shape = (sequences + 1, steps, len(layers), int(model.config.hidden_size))
        self.ring = torch.zeros(shape, dtype=torch.float16, device=model.device)
        self._free = list(range(sequences, SPARE_LINE, -1))
        self._kept: dict[str, _Kept] = {}
        modules = attention_modules(model)
        for layer in layers:
            if _keep_input not in modules[layer]._forward_pre_hooks.values():  # another history may have come before
                modules[layer].register_forward_pre_hook(_keep_input, with_kwargs=True)

    def begin(self, seq: TokenSequence, first: int, stop: int) -> tuple[int, range]:
        """Prepare a step over positions ``first`` to ``stop`` of ``seq``; returns its line, and the positions to keep.

        A step that repeats an aborted one overwrites its values.
        """
        # of a prompt only the end matters
        first = max(first, stop - self.steps, seq.prefill_target - self.steps)
        if seq.policy != "lookahead" or seq.residency.streamed or first >= stop:
            return SPARE_LINE, range(0)
        kept = self._kept.get(seq.request_id)
        if kept is None:
            kept = self._kept[seq.request_id] = _Kept(self._free.pop(), seq.restarts, first, first)
        if kept.restarts != seq.restarts or not kept.first <= first <= kept.stop:
            kept.restarts, kept.first, kept.stop = seq.restarts, first, first
        kept.stop = max(kept.stop, stop)
        kept.first = max(kept.first, kept.stop - self.steps)
        return kept.line, range(first, stop)

    def rows(self, kept: list[tuple[int, int, int]]) -> HiddenRows | None:
        """The places of the hidden states to keep. ``kept``: (packed token, line, position) of each."""
        if not kept:
            return None
        columns = torch.tensor(kept, dtype=torch.int64).T.contiguous()
        rows, lines, positions = columns.to(self.ring.device, non_blocking=True)
        return HiddenRows(self.ring, self.layers, rows, lines, positions % self.steps)

    def fixed_rows(self, lines: Tensor, positions: Tensor) -> HiddenRows:
        """Keep every packed token of a step of fixed shape: ``lines``, ``positions`` int64 [tokens]. Tokens that need
        not be kept have :data:`SPARE_LINE`."""
        return HiddenRows(self.ring, self.layers, None, lines, positions % self.steps)

    def length(self, seq: TokenSequence, position: int) -> int:
        """The number of kept steps up to ``position``, the last one begun: 1 to ``steps``."""
        kept = self._kept[seq.request_id]
        assert kept.first <= position < kept.stop, f"{seq.request_id} has no history at {position}: {kept}"
        return position + 1 - kept.first

    def last(self, seq: TokenSequence, position: int, steps: int) -> Tensor:
        """Hidden states of the last ``steps`` steps up to ``position``: float16 [steps, target layers, hidden], oldest
        first."""
        places = torch.arange(position + 1 - steps, position + 1, device=self.ring.device) % self.steps
        return self.ring[self._kept[seq.request_id].line].index_select(0, places)

    def forget(self, seq: TokenSequence) -> None:
        """``seq`` has left, or starts over; one of its steps may still run."""
        kept = self._kept.pop(seq.request_id, None)
        if kept is not None:
            # safe while a step runs: the line's next owner writes to it in a later step
            self._free.append(kept.line)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if a line is lost, or belongs to two sequences."""
        lines = sorted([*self._free, *(kept.line for kept in self._kept.values())])
        assert lines == list(range(1, len(self.ring))), f"lines {lines} of {len(self.ring)}"


@torch.compiler.disable  # type: ignore[untyped-decorator] # attention breaks compiled layers anyway
def _keep_input(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    rows: HiddenRows | None = getattr(named.get("forecache"), "hidden", None)
    if rows is not None:
        hidden = arguments[0] if arguments else named["hidden_states"]
        layer: int = module.layer_idx  # type: ignore[assignment]
        rows.keep(layer, hidden[0])
