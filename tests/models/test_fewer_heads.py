"""Attentions that have lost heads: the same outputs as with the heads set to zero, in fewer numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import tolerance
from torchgeom_optim.models import CharGPT, compact
from torchgeom_optim.models.compaction import CompactionError
from torchgeom_optim.models.fewer_heads import FewerHeadsAttention, idle_heads
from torchgeom_optim.optimizers import GeodesicSparsifier, Heads

CLOSE = tolerance(condition=100.0)


def without(attention: nn.MultiheadAttention, *heads: int, outputs: bool = True) -> nn.MultiheadAttention:
    """In float64, biases drawn, and some heads idle: by the output layer, or else by their values."""
    attention = attention.double()
    d, width = attention.head_dim, attention.embed_dim
    with torch.no_grad():
        for name, p in attention.named_parameters():
            if "bias" in name:
                p.normal_(generator=torch.Generator().manual_seed(1))
        for head in heads:
            columns = slice(head * d, (head + 1) * d)
            if outputs:
                attention.out_proj.weight[:, columns] = 0
                continue
            if attention.in_proj_weight is not None:
                attention.in_proj_weight[2 * width :][columns] = 0
            else:
                attention.v_proj_weight[columns] = 0
            if attention.in_proj_bias is not None:
                attention.in_proj_bias[2 * width :][columns] = 0
    return attention


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    ("options", "query", "key", "value"),
    [
        ({"batch_first": True}, (2, 5, 12), (2, 3, 12), (2, 3, 12)),
        ({"bias": False}, (5, 2, 12), (3, 2, 12), (3, 2, 12)),
        ({"kdim": 7, "vdim": 4}, (5, 12), (3, 7), (3, 4)),
    ],
    ids=["batch first", "without bias", "keys and values of their own, no batch"],
)
def test_the_heads_that_are_left_give_the_same(options, query, key, value, need_weights):
    attention = without(nn.MultiheadAttention(12, 4, **options), 1, 3, outputs=False).eval()
    smaller = FewerHeadsAttention(attention, torch.tensor([0, 2]))
    q, k, v = drawn(*query), drawn(*key), drawn(*value)
    batch = 2 if q.dim() == 3 else 1
    by_head = torch.rand(batch * 4, 5, 3, generator=torch.Generator().manual_seed(3)) < 0.3
    by_head[:, :, 0] = False  # something is left to look at
    padding = torch.tensor([[False, False, True], [False, True, False]])[:batch]
    padding = padding if q.dim() == 3 else padding[0]
    for masks in (
        {},
        {"attn_mask": by_head[0], "key_padding_mask": padding},
        {"attn_mask": by_head},
        {"attn_mask": torch.zeros(5, 3).double().masked_fill(by_head[0], -torch.inf)},
    ):
        wanted, all_weights = attention(q, k, v, need_weights=need_weights, average_attn_weights=False, **masks)
        found, weights = smaller(q, k, v, need_weights=need_weights, average_attn_weights=False, **masks)
        torch.testing.assert_close(found, wanted, **CLOSE)
        if need_weights:
            torch.testing.assert_close(weights, all_weights[..., [0, 2], :, :], **CLOSE)
            _, mean = smaller(q, k, v, **masks)
            torch.testing.assert_close(mean, weights.mean(-3), **CLOSE)
        else:
            assert weights is None
    with torch.no_grad():
        smaller.value.weight[0] += 1
    assert not torch.allclose(smaller(q, k, v)[0], attention(q, k, v)[0])


def test_a_transformer_whose_heads_a_path_has_cut():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)).double()
    x = drawn(6, 5, 8)
    names = [f"0.layers.{i}.self_attn" for i in range(2)]
    sparsifier = GeodesicSparsifier(
        model, target=Heads({names[0]: 3, names[1]: 0.5}), steps=2, metric="outputs", corrections=2
    )
    while not sparsifier.arrived:
        sparsifier.step(x)
    assert [int(idle_heads(model.get_submodule(name)).sum()) for name in names] == [3, 2]
    for name in names:  # exactly, queries, keys, values and biases too
        attention = model.get_submodule(name)
        rows = idle_heads(attention).repeat_interleave(2)
        assert not attention.in_proj_weight.view(3, 8, 8)[:, rows].any()
        assert not attention.in_proj_bias.view(3, 8)[:, rows].any()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    smaller, report = compact(model, x, latency_rounds=1)
    assert report.widths == {names[0]: (4, 1), names[1]: (4, 2)}
    assert report.kept == {}
    for grad in (torch.enable_grad, torch.no_grad):  # without gradients torch's layers have a way of their own
        with grad():
            torch.testing.assert_close(smaller(x), model(x), **CLOSE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # A head is 2 rows of 8 weights and a bias three times, and 2 columns of 8.
    assert report.before.parameters - report.after.parameters == 5 * (3 * (2 * 8 + 2) + 2 * 8)
    # For each of 5 positions 4 products of 2 by 8, and 2 of 2 by 5.
    assert report.before.multiply_adds - report.after.multiply_adds == 5 * 5 * (4 * 2 * 8 + 2 * 2 * 5)
    assert report.after.latency_s is not None
    smaller.train()(x).sum().backward()
    assert all(p.grad is not None for p in smaller.parameters())
    assert "heads=1 of 4" in repr(smaller)


@pytest.mark.parametrize("alone", [False, True])
def test_padded_batches_in_torchs_own_encoder(alone):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True).double()
    encoder = nn.TransformerEncoder(layer, 2)
    without(encoder.layers[1].self_attn, 0, 2)
    model = (encoder if alone else Padded(encoder)).eval()
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    x = drawn(3, 5, 8)
    for inputs in (x, {"src": x, "src_key_padding_mask": padding}):
        smaller, report = compact(model, inputs)
        assert [new for _, new in report.widths.values()] == [2]
        for grad in (torch.enable_grad, torch.no_grad):
            with grad():
                found, wanted = (m(x, src_key_padding_mask=padding) for m in (smaller, model))
                torch.testing.assert_close(found[~padding], wanted[~padding], **CLOSE)
                torch.testing.assert_close(smaller(x), model(x), **CLOSE)
    assert encoder.use_nested_tensor


class Padded(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        return self.encoder(src, src_key_padding_mask=src_key_padding_mask)


class Custom(nn.MultiheadAttention):
    pass


class Own(nn.Module):
    """An attention and, for one case, another that shares its output layer's weight."""

    def __init__(self, attention: nn.MultiheadAttention, shared: bool = False) -> None:
        super().__init__()
        self.attention, self.head = attention, nn.Linear(12, 12).double()
        if shared:
            self.head.weight = attention.out_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Own(without(Custom(12, 4), 1)), "a class of its own"),
        (lambda: Own(without(nn.MultiheadAttention(12, 4, add_zero_attn=True), 1)), "add_zero_attn"),
        (lambda: Own(without(nn.MultiheadAttention(12, 4), 1), shared=True), "shared with another module"),
    ],
)
def test_what_stays_is_named(model, reason):
    model, x = model().eval(), drawn(5, 2, 12)
    smaller, report = compact(model, x)
    assert report.widths == {}
    ((name, reasons),) = report.kept.items()
    assert name == "attention"
    ((why, count),) = reasons.items()
    assert reason in why
    assert count == 1
    torch.testing.assert_close(smaller(x), model(x), rtol=0, atol=0)
    with pytest.raises(CompactionError, match="1 units of 'attention'"):
        compact(model, x, strict=True)


def test_one_head_stays():
    model, x = Own(without(nn.MultiheadAttention(12, 4), 0, 1, 2, 3)).eval(), drawn(5, 2, 12)
    smaller, report = compact(model, x)
    assert report.widths == {"attention": (4, 1)}
    assert report.kept == {"attention": {"an attention keeps at least one head": 1}}
    torch.testing.assert_close(smaller(x), model(x), **CLOSE)


def test_an_attention_of_linear_layers_is_refused_by_name():
    torch.manual_seed(0)
    model = CharGPT(11, context=8, width=8, num_heads=2).double().eval()
    qkv = [name for name, p in model.named_modules() if isinstance(p, nn.Linear) and p.out_features == 3 * 8]
    tokens = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name in qkv:
            layer = model.get_submodule(name)
            for part in range(3):
                layer.weight[8 * part : 8 * part + 4] = 0
                layer.bias[8 * part : 8 * part + 4] = 0
    report = compact(model, tokens).report
    assert report.widths == {}
    assert {name: sum(report.kept[name].values()) for name in qkv} == dict.fromkeys(qkv, 12)


def test_masks_that_are_none():
    smaller = FewerHeadsAttention(nn.MultiheadAttention(12, 4), torch.tensor([2]))
    with pytest.raises(RuntimeError, match="Give the mask"):
        smaller(torch.ones(3, 12), torch.ones(3, 12), torch.ones(3, 12), is_causal=True)
