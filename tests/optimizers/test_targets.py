"""What a network can walk to: which entries go, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.parameter_vectors import ParameterVectors
from torchgeom_optim.optimizers.structured_targets import Heads, NofM, Units
from torchgeom_optim.optimizers.targets import CutPlan, Dense, Mask, OtherWeights, Sparsity, TargetSpace


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def space(model: nn.Module, may_cut: bool = True, cut: Tensor | None = None) -> TargetSpace:
    vectors = ParameterVectors(model)
    weights = vectors.flat(vectors.values())
    allowed = torch.full((vectors.size,), may_cut)
    return TargetSpace(model, vectors, weights, weights.clone(), allowed, ~allowed if cut is None else cut)


def cut_entries(plan: CutPlan, where: TargetSpace) -> dict[str, Tensor]:
    chosen = plan.chosen(plan.per_piece(where.weights.square()), plan.gone(where.cut))
    return where.vectors.named(plan.entries(chosen))


def test_global_sparsity_takes_the_smallest_of_all_matrices():
    model = mlp()
    where = space(model)
    out = cut_entries(Sparsity(0.5).plan(where), where)
    sizes = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).abs()
    threshold = sizes.sort().values[35]
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(out[name], model.get_parameter(name).abs() <= threshold)
    assert not out["0.bias"].any()
    assert not out["2.bias"].any()


def test_sparsity_by_layer_takes_the_share_of_each():
    where = space(mlp())
    out = cut_entries(Sparsity(0.25, "layer").plan(where), where)
    assert (int(out["0.weight"].sum()), int(out["2.weight"].sum())) == (12, 6)


def test_units_go_with_their_biases():
    model = mlp()
    where = space(model)
    out = cut_entries(Units({"0": 2}).plan(where), where)
    smallest = (model[0].weight.square().sum(1) + model[0].bias.square()).topk(2, largest=False).indices
    expected = torch.zeros(6, dtype=torch.bool)
    expected[smallest] = True
    torch.testing.assert_close(out["0.bias"], expected)
    torch.testing.assert_close(out["0.weight"], expected[:, None].expand(6, 8))
    assert not out["2.weight"].any()


def test_units_of_several_modules_go_together():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    where = space(model)
    out = cut_entries(Units({("0", "1"): 0.5}).plan(where), where)
    assert int(out["1.weight"].sum()) == 2
    torch.testing.assert_close(out["1.weight"], out["0.bias"])
    torch.testing.assert_close(out["1.weight"], out["0.weight"][:, 0, 0, 0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(12, 36)
        self.output = nn.Linear(12, 12)
        self.whole = nn.MultiheadAttention(12, 3)


@pytest.mark.parametrize(
    ("target", "packed", "bias", "output"),
    [
        (Heads({("packed", "output"): 1}, num_heads=3), "packed.weight", "packed.bias", "output.weight"),
        (Heads({"whole": 1}), "whole.in_proj_weight", "whole.in_proj_bias", "whole.out_proj.weight"),
    ],
)
def test_a_head_is_its_queries_keys_values_and_outputs(target, packed, bias, output):
    where = space(Attention())
    out = cut_entries(target.plan(where), where)
    per_head = out[packed].view(3, 3, 4, 12)
    gone = per_head.flatten(2).all(2)
    assert int(gone[0].sum()) == 1
    torch.testing.assert_close(gone[1], gone[0])
    torch.testing.assert_close(gone[2], gone[0])
    torch.testing.assert_close(out[bias], gone.repeat_interleave(4, 1).flatten())
    torch.testing.assert_close(out[output], gone[0].repeat_interleave(4).expand(12, 12))
    assert int(sum(x.sum() for x in out.values())) == 12 * 12 + 12 + 12 * 4


def test_two_of_four():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    where = space(model)
    model[1].requires_grad_(False)
    where = space(model)
    out = cut_entries(NofM(2, 4).plan(where), where)["0.weight"]
    assert bool((out.view(6, 2, 4).sum(2) == 2).all())
    kept = model[0].weight.detach().abs().masked_fill(out, 0).view(12, 4).sort(1).values[:, 2:]
    torch.testing.assert_close(kept, model[0].weight.detach().abs().view(12, 4).sort(1).values[:, 2:])


def test_a_mask_is_taken_as_it_is():
    where = space(mlp())
    keep = torch.rand(6, 8) < 0.5
    out = cut_entries(Mask({"0.weight": keep}).plan(where), where)
    torch.testing.assert_close(out["0.weight"], ~keep)
    assert not out["2.weight"].any()


def test_other_weights_and_dense_lead_everything_somewhere():
    model, other = mlp(), mlp()
    where = space(model)
    plan = OtherWeights(other).plan(where)
    torch.testing.assert_close(where.vectors.named(plan.weights)["2.weight"], other[2].weight.detach())
    assert bool(plan.drawn.all())
    assert not bool(plan.fixed.any())
    torch.testing.assert_close(OtherWeights(other.state_dict()).plan(where).weights, plan.weights)
    torch.testing.assert_close(Dense().plan(where).weights, where.start)


def test_dense_units_bring_the_largest_back():
    model = mlp()
    where = space(model)
    gone = torch.zeros(6, dtype=torch.bool)
    gone[[1, 3, 4]] = True
    named = {n: torch.zeros(s, dtype=torch.bool) for n, s in where.vectors.shapes.items()}
    named["0.weight"], named["0.bias"] = gone[:, None].expand(6, 8), gone
    where = space(model, cut=where.vectors.flat(named))
    plan = Dense({"0": 2}).plan(where)
    back = where.vectors.named(plan.fixed)["0.bias"]
    size = (model[0].weight.square().sum(1) + model[0].bias.square()).masked_fill(~gone, -1)
    assert set(back.nonzero().flatten().tolist()) == set(size.topk(2).indices.tolist())
    with pytest.raises(ValueError, match=r"only 3 of its 6 are cut"):
        Dense({"0": 4}).plan(where)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda: Sparsity(1.0), r"share=1.0: must be in \(0, 1\)"),
        (lambda: Sparsity(float("nan")), "share=nan"),
        (lambda: Sparsity(0.5, "row"), "scope='row'"),
        (lambda: NofM(4, 4), r"n must be in \[1, m\)"),
        (lambda: NofM(2, 5), "multiple of m=5"),
        (lambda: Units({"nowhere": 1}), "must be the name of a module"),
        (lambda: Units({"1": 1}), "no parameter of its own"),
        (lambda: Units({"0": 7}), "it has 6"),
        (lambda: Units({"0": 1.5}), "1.5 of 0"),
        (lambda: Units({}), "no layer is named"),
        (lambda: Units({("0", "2"): 1}), "the same number"),
        (lambda: Units({"0": 1, ("0",): 1}), "name each once"),
        (lambda: Heads({"0": 1}), "must be an nn.MultiheadAttention"),
        (lambda: Heads({("0", "2"): 1}), "num_heads=None"),
        (lambda: Heads({("0", "2"): 1}, num_heads=2), "three times as many rows"),
        (lambda: Mask({"0.weight": torch.ones(2, 2)}), r"need a mask of shape \[6, 8\]"),
        (lambda: Mask({"0.weight": torch.full((6, 8), 0.5)}), "other than 0 and 1"),
        (lambda: Mask({"there": torch.ones(2)}), "must be of parameters in the groups"),
        (lambda: OtherWeights(nn.Linear(3, 2)), "need one of the same architecture"),
        (lambda: OtherWeights({n: p * float("nan") for n, p in mlp().named_parameters()}), "not finite"),
        (lambda: Dense({"0": 1}), "only 0 of its 6 are cut"),
    ],
)
def test_refused(target, message):
    with pytest.raises(ValueError, match=message):
        target().plan(space(mlp()))


def test_what_groups_do_not_allow():
    where = space(mlp(), may_cut=False)
    where = TargetSpace(
        where.model, where.vectors, where.weights, where.start, where.may_cut, torch.zeros_like(where.may_cut)
    )
    for target in (Sparsity(0.5), Units({"0": 1}), NofM(), Mask({"0.weight": torch.zeros(6, 8)})):
        with pytest.raises(ValueError, match=r"may_cut|allow"):
            target.plan(where)


def test_less_than_is_cut_already():
    model = mlp()
    where = space(model)
    plan = Sparsity(0.6).plan(where)
    cut = plan.entries(plan.chosen(plan.per_piece(where.weights.square()), plan.gone(where.cut)))
    with pytest.raises(ValueError, match=r"walk to Dense\(\) first"):
        Sparsity(0.4).plan(space(model, cut=cut))
    more = Sparsity(0.8).plan(space(model, cut=cut))
    chosen = more.chosen(torch.rand(72), more.gone(cut))
    assert bool((more.entries(chosen) | ~cut).all())
