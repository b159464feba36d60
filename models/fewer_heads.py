"""Attention that has lost heads: what is left of an ``nn.MultiheadAttention``, which cannot be that itself any more."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FewerHeadsAttention", "idle_heads", "why_heads_must_stay"]


class FewerHeadsAttention(nn.Module):
    """An ``nn.MultiheadAttention`` without some of its heads, called in the same way.

        sum_h softmax(Q_h K_h' / sqrt(d) + mask) V_h O_h' + b,      h over the heads that are left

    That class takes as many values per head as divide its width by its number of heads, so that one with fewer heads of
    the same size is none. Attention weights, where they are asked for, are of the heads that are left; their average
    is over these.

    Args:
        attention: the original, whose parameters are copied.
        heads: which of its heads stay, ascending, at least one.

    Attributes:
        num_heads: that are left.
        head_dim: values of each, d.
        batch_first: as in the original.
    """

    # What torch's encoder layers look at before they take a way of their own, which is not for this class.
    _qkv_same_embed_dim = False
    in_proj_bias = None
    in_proj_weight = None

    def __init__(self, attention: nn.MultiheadAttention, heads: Tensor) -> None:
        super().__init__()
        self.embed_dim, self.head_dim = attention.embed_dim, attention.head_dim
        self.num_heads, self.batch_first, self.dropout = len(heads), attention.batch_first, attention.dropout
        self._of_all = heads.tolist(), attention.num_heads
        rows = (heads[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()
        weights, biases = _projections(attention)
        self.query, self.key, self.value = (
            _linear(weight[rows.to(weight.device)], None if bias is None else bias[rows.to(bias.device)])
            for weight, bias in zip(weights, biases, strict=True)
        )
        output = attention.out_proj
        self.out_proj = _linear(output.weight[:, rows.to(output.weight.device)], output.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention`` has it; masks for each head are those of all its heads."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True: it only says what attn_mask is, which must be there. Give the mask.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._by_head(self.query(query)), self._by_head(self.key(key)), self._by_head(self.value(value))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.mT * self.head_dim**-0.5
            looks = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = looks @ v
            weights = looks.mean(1) if average_attn_weights else looks
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return output[0], None if weights is None else weights[0]
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def extra_repr(self) -> str:
        """Numbers for ``repr``."""
        return f"heads={self.num_heads} of {self._of_all[1]}, head_dim={self.head_dim}"

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as what is added to the scores, for [B, heads, L, S]."""
        total: Tensor | None = None
        if attn_mask is not None:
            total = _added(attn_mask, q)
            if total.dim() == 3:
                heads, num_heads = self._of_all
                total = total.reshape(-1, num_heads, *total.shape[1:])[:, heads]
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q)[:, None, None]
            total = padding if total is None else total + padding
        return total


def idle_heads(attention: nn.MultiheadAttention) -> Tensor:
    """Heads that add nothing: their values are zero, or the output layer multiplies them by zero.

    Args:
        attention: any.

    Returns:
        [heads], bool, on the CPU.
    """
    (*_, values), (*_, bias) = _projections(attention)
    nonzero = values.detach().ne(0).any(1)
    nonzero = nonzero if bias is None else nonzero | bias.detach().ne(0)
    used = attention.out_proj.weight.detach().ne(0).any(0)
    shape = (attention.num_heads, attention.head_dim)
    return ~(nonzero & used).view(shape).any(1).cpu()


def why_heads_must_stay(attention: nn.MultiheadAttention, shared: bool) -> str | None:
    """What keeps an attention from losing heads.

    Args:
        attention: any.
        shared: whether another module has one of its parameters too.

    Returns:
        The reason; None if nothing does.
    """
    if type(attention) is not nn.MultiheadAttention:
        return f"{type(attention).__name__} is a class of its own, whose forward is not known"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "keys that it adds itself (add_bias_kv, add_zero_attn) are not followed"
    if attention._forward_hooks or attention._forward_pre_hooks:
        return "hooks on it expect the attention that it is"
    return "its parameters are shared with another module" if shared else None


def _projections(attention: nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights [heads d, inputs] and biases of queries, keys and values."""
    weights: list[Tensor]
    if attention.in_proj_weight is not None:
        weights = [*attention.in_proj_weight.chunk(3)]
    else:
        weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    bias = attention.in_proj_bias
    return weights, [None] * 3 if bias is None else list(bias.chunk(3))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with copies of these; they can be trained where the originals could."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask, True where nothing is to be looked at, as zeros and minus infinity."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)
