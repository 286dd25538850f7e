"""Queries of the Memory Indexer from hidden states: a trainable copy of the model's query projection."""

import torch
from torch import Tensor, nn


class QueryProjection(nn.Module):
    """Queries of some heads from the hidden states of their layers, computed like the model's own.

    ``q = RoPE(norm(W x + b), position)``: the projection, RMSNorm over the head if the model has it, and rotary
    embedding (Su et al., arXiv 2104.09864) of the first ``2 · len(inverse_frequencies)`` dimensions, in the layout of
    Llama, which pairs dimension i with i + rotated/2. ``layer_of_head``: for each head, the index of its layer among
    the target layers. ``weight``: [heads, head_dim, hidden]; ``bias``, ``norm``: [heads, head_dim].
    """

    inverse_frequencies: Tensor
    layer_of_head: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        inverse_frequencies: Tensor,
        layer_of_head: tuple[int, ...],
        *,
        rope_scaling: float,
        norm: Tensor | None = None,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(bias.clone())
        self.norm = None if norm is None else nn.Parameter(norm.clone())
        self.norm_eps = norm_eps
        self.rope_scaling = rope_scaling
        self.register_buffer("inverse_frequencies", inverse_frequencies.clone())
        self.register_buffer("layer_of_head", torch.tensor(layer_of_head), persistent=False)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """``hidden`` [steps, target layers, hidden], ``positions`` [steps] → float32 [steps, heads, head_dim]."""
        of_heads = hidden.float().index_select(1, self.layer_of_head)
        q = torch.einsum("shi,hdi->shd", of_heads, self.weight) + self.bias
        if self.norm is not None:
            assert self.norm_eps is not None
            q = q * torch.rsqrt(q.square().mean(2, keepdim=True) + self.norm_eps) * self.norm
        return rotate(q, positions, self.inverse_frequencies, self.rope_scaling)


def rotate(q: Tensor, positions: Tensor, inverse_frequencies: Tensor, scaling: float) -> Tensor:
    """Rotary embedding of ``q`` [steps, heads, head_dim] at ``positions`` [steps]."""
    half = len(inverse_frequencies)
    angles = positions.to(inverse_frequencies.dtype).outer(inverse_frequencies).unsqueeze(1)
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    one, two, rest = q[..., :half], q[..., half : 2 * half], q[..., 2 * half :]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], -1)
