"""Finds a model's retrieval heads: those that attend to the answer in the prompt while the model writes it."""

import datetime
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from forecache.indexer.records.manifest import CalibrationRecord, RetrievalHead, RetrievalManifest
from forecache.indexer.records.scores import EVENT_SHARE
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.evaluation import corpus
from forecache.workers.evaluation.tasks import RetrievalTask, TaskKind, make_task
from forecache.workers.models.dense.probe import expected_geometry

ATTENTION = "forecache_calibrate"
HEADS = 8
"""Retrieval heads of a manifest."""
SEED = 0
SHALLOWEST, DEEPEST = 0.05, 0.9
"""Range of depths of the answers, which excludes the attention sink and recent tokens."""


class AnswerMass:
    """An attention function for transformers: SDPA that also records what the last queries attend to.

    For the last ``answer_tokens`` positions and every query head, ``mass[layer]``, float32 [heads, answer_tokens], is
    the attention mass on the key positions ``answer_keys``. Batch size 1, no padding.
    """

    def __init__(self) -> None:
        self.answer_tokens = 0
        self.answer_keys = range(0)
        self.mass: dict[int, torch.Tensor] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """``query`` [1, heads, tokens, head_dim], ``key`` and ``value`` [1, kv_heads, tokens, head_dim]."""
        _, heads, tokens, head_dim = query.shape
        kv_heads = key.shape[1]
        scale = head_dim**-0.5 if scaling is None else scaling
        queries = query[0, :, -self.answer_tokens :].float().reshape(kv_heads, -1, head_dim)
        logits = (queries @ key[0].float().transpose(1, 2) * scale).view(heads, self.answer_tokens, tokens)
        future = torch.ones(self.answer_tokens, tokens, dtype=torch.bool, device=key.device)
        logits.masked_fill_(future.triu(tokens - self.answer_tokens + 1), -torch.inf)
        keys = slice(self.answer_keys.start, self.answer_keys.stop)
        self.mass[cast(int, module.layer_idx)] = logits.softmax(2)[:, :, keys].sum(2).cpu()
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def calibration_tasks(
    tokenizer: PreTrainedTokenizerBase, *, documents: int, min_tokens: int, max_tokens: int, seed: int
) -> list[RetrievalTask]:
    """Tasks of all kinds in turn, in both kinds of prose, with uniformly random lengths and depths."""
    rng = random.Random(seed)
    kinds = get_args(TaskKind)
    prose: list[corpus.Kind] = ["topics", "docstrings"]
    return [
        make_task(
            kinds[number % len(kinds)],
            tokenizer,
            tokens=rng.randint(min_tokens, max_tokens),
            depth=rng.uniform(SHALLOWEST, DEEPEST),
            seed=rng.getrandbits(32),
            prose=prose[number // len(kinds) % len(prose)],
        )
        for number in range(documents)
    ]


def answer_mass(model: Any, recorder: AnswerMass, task: RetrievalTask, chunk_tokens: int) -> torch.Tensor:
    """Attention mass of every query head on the answer's chunks, for each token of the answer.

    Returns float32 [layers, heads, answer_tokens]. ``model``: a causal model with ``recorder`` as its attention. It
    reads the correct answer, so its own reply does not matter.
    """
    tokens = [*task.prompt_token_ids, *task.reply_prefix_token_ids, *task.answer_token_ids[:-1]]
    chunks = task.answer_chunks(chunk_tokens)
    recorder.answer_tokens = len(task.answer_token_ids)
    recorder.answer_keys = range(chunks.start * chunk_tokens, chunks.stop * chunk_tokens)
    recorder.mass.clear()
    with torch.inference_mode():
        model.base_model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(recorder.mass) != list(range(layers)):
        raise UnsupportedModelError(
            f"only {len(recorder.mass)} of {layers} layers use transformers' attention interface: calibration "
            "needs one attention call per layer"
        )
    return torch.stack([recorder.mass[layer] for layer in range(layers)])


def calibrate(
    model_path: Path,
    *,
    documents: int = 96,
    min_tokens: int = 2048,
    max_tokens: int = 7168,
    chunk_tokens: int = 64,
    model_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RetrievalManifest:
    """Rank a model's heads by their mean attention on the answer's chunks, and keep the best :data:`HEADS`.

    ``model_path``: local Hugging Face directory. Each document costs one forward pass, after which
    ``progress(done, documents)`` is called. Raises :class:`UnsupportedModelError` for a model whose attention does not
    use transformers' attention interface.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    recorder = AnswerMass()
    AttentionInterface.register(ATTENTION, recorder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto", attn_implementation=ATTENTION)
    model.eval()
    config = model.config.get_text_config()
    geometry = expected_geometry(config)
    max_tokens = min(max_tokens, config.max_position_embeddings - 256)

    total = torch.zeros(config.num_hidden_layers, config.num_attention_heads)
    events = 0
    tasks = calibration_tasks(tokenizer, documents=documents, min_tokens=min_tokens, max_tokens=max_tokens, seed=SEED)
    for done, task in enumerate(tasks, start=1):
        mass = answer_mass(model, recorder, task, chunk_tokens)
        total += mass.mean(2)
        events += int((mass[:, :, 0] >= EVENT_SHARE).sum())
        if progress is not None:
            progress(done, documents)
    score = total / documents
    best = score.flatten().argsort(descending=True)[:HEADS].tolist()
    return RetrievalManifest(
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        attention_heads=config.num_attention_heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        model_name=model_name or model_path.name,
        heads=tuple(
            RetrievalHead(layer=layer, head=head, score=round(float(score[layer, head]), 4))
            for layer, head in (divmod(index, config.num_attention_heads) for index in best)
        ),
        calibration=CalibrationRecord(
            documents=documents,
            tasks=get_args(TaskKind),
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            chunk_tokens=chunk_tokens,
            seed=SEED,
            events=round(events / documents, 2),
            torch_version=torch.__version__,
            transformers_version=transformers.__version__,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        ),
    )
