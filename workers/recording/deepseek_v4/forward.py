"""A training forward of DeepSeek-V4 over batches of whole sequences, with the modules and weights of transformers.

It gives the logits of `DeepseekV4ForCausalLM` without a cache, in plain PyTorch that is fast on a GPU; all experts of a
small model run at once. In addition, the Lightning Indexer can be switched off (``sparse=False`` attends to every
entry), and it has a loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM

from forecache.workers.recording.deepseek_v4.attention import (
    CsaCapture,
    Entries,
    attend,
    compress,
    index_loss,
    index_of,
    rotate,
)


@dataclass(frozen=True)
class Output:
    """The results of a forward.

    ``hidden``: [batch, tokens, hidden], the input of the language head. ``index_loss``: a scalar, if requested.
    ``expert_loads``: for each layer that routes by content, its gate's bias and the share of tokens per expert.
    """

    hidden: Tensor
    index_loss: Tensor | None
    expert_loads: list[tuple[Tensor, Tensor]]


@dataclass
class _Pass:
    """Options and collected results of one forward."""

    sparse: bool
    positions: Tensor | None
    observe: Callable[[CsaCapture], None] | None
    train_model: bool
    losses: list[Tensor] = field(default_factory=list)
    loads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    csa_layers: int = 0

    @property
    def wants_lse(self) -> bool:
        return self.positions is not None or self.observe is not None


class TrainingForward(nn.Module):
    """Uses and trains the parameters of ``model`` in place. ``compiled``: compile the pointwise parts."""

    def __init__(self, model: DeepseekV4ForCausalLM, *, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.window = int(config.sliding_window)
        self.topk = int(config.index_topk)
        self._iterations, self._eps = int(config.hc_sinkhorn_iters), float(config.hc_eps)
        wrap: Callable[..., Any] = torch.compile if compiled else lambda function: function
        self._enter, self._leave, self._experts = wrap(_enter), wrap(_leave), wrap(_experts)

    def forward(
        self,
        ids: Tensor,
        *,
        sparse: bool,
        index_positions: Tensor | None = None,
        train_model: bool = True,
        observe: Callable[[CsaCapture], None] | None = None,
    ) -> Output:
        """``ids``: int64 [batch, tokens], tokens a multiple of the sliding window.

        ``index_positions``: int64 [batch, P], the queries that the indexer's loss is computed for. ``train_model``:
        False computes gradients for the indexer only.
        """
        assert ids.shape[1] % self.window == 0, f"{ids.shape[1]} tokens are no multiple of {self.window}"
        run = _Pass(sparse, index_positions, observe, train_model)
        inner: Any = self.model.model
        with torch.set_grad_enabled(train_model and torch.is_grad_enabled()):
            embedded = inner.embed_tokens(ids)
            places = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
            rope = {
                name: tuple(
                    part[0] for part in inner.rotary_emb(embedded.float(), position_ids=places, layer_type=name)
                )
                for name in ("main", "compress")
            }
            streams = embedded.flatten(0, 1).unsqueeze(1).repeat(1, self.model.config.hc_mult, 1)
            for layer in inner.layers:
                streams = self._layer(layer, streams, ids, rope, run)
            hidden = inner.norm(_collapse(inner.hc_head, streams)).view(embedded.shape)
        loss = torch.stack(run.losses).mean() if run.losses else None
        return Output(hidden, loss, run.loads)

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(hidden)
        return logits

    def _layer(self, layer: Any, streams: Tensor, ids: Tensor, rope: Any, run: _Pass) -> Tensor:
        post, comb, x = self._mix(layer.attn_hc, layer.input_layernorm, streams)
        streams = self._spread(streams, self._attention(layer.self_attn, x, ids.shape, rope, run), post, comb)
        post, comb, x = self._mix(layer.ffn_hc, layer.post_attention_layernorm, streams)
        return self._spread(streams, self._mlp(layer.mlp, x, ids, run), post, comb)

    def _mix(self, connection: Any, norm: Any, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = connection.fn, connection.base, connection.scale, norm.weight
        mixed: tuple[Tensor, Tensor, Tensor] = self._enter(
            streams, *weights, norm.variance_epsilon, self._iterations, self._eps
        )
        return mixed

    def _spread(self, streams: Tensor, out: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        spread: Tensor = self._leave(streams, out, post, comb)
        return spread

    def _mlp(self, mlp: Any, x: Tensor, ids: Tensor, run: _Pass) -> Tensor:
        gate = mlp.gate
        with torch.autocast(x.device.type, enabled=False):
            scores = gate.score_fn(x.float() @ gate.weight.float().T)
            if mlp.is_hash:
                chosen = gate.tid2eid[ids.flatten()]
            else:
                chosen = (scores + gate.e_score_correction_bias).topk(gate.top_k, sorted=False).indices
            weights = scores.gather(1, chosen)
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
            weights = weights * gate.routed_scaling_factor
            by_expert = torch.zeros_like(scores).scatter(1, chosen, weights)
            if not mlp.is_hash:
                run.loads.append((gate.e_score_correction_bias, (by_expert > 0).float().mean(0) / gate.top_k))
        experts, shared = mlp.experts, mlp.shared_experts
        routed = self._experts(x, by_expert, experts.gate_up_proj, experts.down_proj, experts.limit)
        result: Tensor = routed + shared(x)
        return result

    def _attention(self, attention: Any, flat: Tensor, shape: torch.Size, rope: Any, run: _Pass) -> Tensor:
        x = flat.view(*shape, -1)
        cos, sin = rope[attention.rope_layer_type]
        low = attention.q_a_norm(attention.q_a_proj(x))
        q = attention.q_b_norm(attention.q_b_proj(low).unflatten(-1, (attention.num_heads, -1)))
        q = rotate(q, cos.unsqueeze(1), sin.unsqueeze(1))
        kv = rotate(attention.kv_norm(attention.kv_proj(x)), cos, sin)
        compressor = attention.compressor
        far = None
        if compressor is not None:
            entries = compress(compressor, x, cos, sin, overlap=hasattr(compressor, "indexer"))
            far = Entries(entries, compressor.compress_rate)
        index = None
        if far is not None and hasattr(compressor, "indexer"):
            index = index_of(compressor.indexer, x.detach(), low.detach(), cos, sin, trains=run.positions is not None)
            if run.sparse:
                far.index, far.topk = index, self.topk
        out, near_lse = attend(q, kv, attention.sinks, self.window, attention.scaling, far, run.wants_lse)
        if far is not None and index is not None:
            if near_lse is not None:
                capture = CsaCapture(run.csa_layers, x, *index, q, far.entries, near_lse)
                if run.observe is not None:
                    run.observe(capture)
                if run.positions is not None:
                    run.losses.append(index_loss(capture, run.positions, attention.scaling, far.ratio))
            run.csa_layers += 1
        out = rotate(out, cos.unsqueeze(1), -sin.unsqueeze(1))
        grouped = attention.o_a_proj(out.reshape(*shape, attention.o_a_proj.n_groups, -1)).flatten(2)
        result: Tensor = attention.o_b_proj(grouped).flatten(0, 1)
        return result


def _normalise(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, eps: float, iterations: int, hc_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The hyper-connection before a block: weights of its output, the mixing of the streams, its normalised input.

    ``streams``: [N, hc, hidden]. The mixing is made doubly stochastic by Sinkhorn-Knopp (DeepSeek-V4, §2.2).
    """
    with torch.autocast(streams.device.type, enabled=False):
        streams = streams.float()
        hc = streams.shape[1]
        mixes = _normalise(streams.flatten(1), eps) @ fn.float().T
        pre = (mixes[:, :hc] * scale[0] + base[:hc]).sigmoid() + hc_eps
        post = 2 * (mixes[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc]).sigmoid()
        comb = (mixes[:, 2 * hc :] * scale[2] + base[2 * hc :]).view(-1, hc, hc).softmax(2) + hc_eps
        comb = comb / (comb.sum(1, keepdim=True) + hc_eps)
        for _ in range(iterations - 1):
            comb = comb / (comb.sum(2, keepdim=True) + hc_eps)
            comb = comb / (comb.sum(1, keepdim=True) + hc_eps)
        return post, comb, _normalise((pre.unsqueeze(2) * streams).sum(1), eps) * norm.float()


def _leave(streams: Tensor, out: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    with torch.autocast(streams.device.type, enabled=False):
        mixed = (comb.unsqueeze(3) * streams.float().unsqueeze(2)).sum(1)
        return mixed + post.unsqueeze(2) * out.float().unsqueeze(1)


def _collapse(head: Any, streams: Tensor) -> Tensor:
    """Merge the streams after the last layer."""
    with torch.autocast(streams.device.type, enabled=False):
        flat = _normalise(streams.float().flatten(1), head.input_norm.eps)
        pre = (flat @ head.hc_fn.float().T * head.hc_scale.float() + head.hc_base.float()).sigmoid() + head.eps
        collapsed: Tensor = (pre.unsqueeze(2) * streams).sum(1)
        return collapsed


def _experts(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float) -> Tensor:
    """Run every expert on every token, weighted by ``weights`` [N, experts]: the fastest way for few small experts."""
    experts, doubled, _ = gate_up.shape
    gate, up = (x @ gate_up.flatten(0, 1).T).view(-1, experts, doubled).chunk(2, 2)
    hidden = nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    hidden = hidden * weights.to(hidden.dtype).unsqueeze(2)
    return hidden.flatten(1) @ down.transpose(1, 2).flatten(0, 1)
