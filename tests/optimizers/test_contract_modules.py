"""The modules that networks are made of: each parameter gets a rule or a fallback, is named, and is trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases import OPTIMIZER_CASES, OptimizerCase, train

NUM_TOKENS, WIDTH = 7, 4
every_case = pytest.mark.parametrize("case", OPTIMIZER_CASES, ids=repr)


class OwnAttention(nn.Module):
    """Attention written with linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v))


class CrossAttention(nn.Module):
    """MultiheadAttention with projections of their own, and biases for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True, kdim=3, vdim=5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x[..., :3], F.pad(x, (0, 1)))[0]


class Recurrent(nn.Module):
    """The sequence that a recurrent module returns."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Language(nn.Module):
    """Tokens to tokens; maybe with one table for both ends."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, WIDTH)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
        self.own = OwnAttention()
        self.cross = CrossAttention()
        self.lstm, self.gru = Recurrent(nn.LSTM), Recurrent(nn.GRU)
        self.norms = nn.Sequential(nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.head = nn.Linear(WIDTH, NUM_TOKENS)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.cross(self.own(self.encoder(self.embedding(tokens))))
        return self.head(self.norms(x + self.lstm(x) + self.gru(x)) * self.scale)


WITH_RULE = ("encoder.linear1.weight", "encoder.linear2.bias", "own.qkv.weight", "own.out.bias")
WITHOUT_LAYER = (
    *("encoder.self_attn.in_proj_weight", "encoder.self_attn.out_proj.weight", "cross.attention.k_proj_weight"),
    *("cross.attention.bias_k", "lstm.cell.weight_hh_l0", "gru.cell.bias_ih_l0", "norms.0.weight", "norms.1.weight"),
    *("encoder.norm1.bias", "scale"),
)


@pytest.mark.parametrize("tied", [False, True])
@every_case
def test_nothing_is_left_untrained_and_the_report_says_how(case: OptimizerCase, tied):
    model = Language(tied)
    before = copy.deepcopy(model)
    optimizer = case(model)
    rows = {row.name: row for row in optimizer.report()}
    assert set(rows) == {name for name, _ in model.named_parameters()}
    tokens = torch.randint(NUM_TOKENS, (6, 5))
    losses = train(model, optimizer, [tokens] * 8, lambda y: F.cross_entropy(y.flatten(0, 1), tokens.flatten()))
    assert losses[-1] < losses[0]
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.isfinite(p).all(), name
        assert not torch.equal(p, q), name

    rule = rows[WITH_RULE[0]].rule
    assert {rows[name].rule for name in WITH_RULE} == {rule}
    if case.whitens and case.has_statistics:
        without_layer = {*WITHOUT_LAYER, *(["embedding.weight"] if tied else [])}
        for name in without_layer:
            assert rows[name].note, name  # why, or as what it is stepped
        if not tied:
            assert rows["embedding.weight"].rule == rows["head.weight"].rule == rule
        else:
            assert "shared by layers of different types" in rows["embedding.weight"].note
