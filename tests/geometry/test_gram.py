import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.geometry.oracles_gram import (
    BY_NAME,
    RaisesInBackward,
    assert_grams_close,
    assert_same_state,
    expected_grams,
    expected_input_gram,
    gram_of,
    state_of,
)
from tests.oracles import tolerance
from tests.zoo import ZOO, Attention, Case, Transformer, resnet18_narrow
from torchgeom_optim.geometry.gram import per_sample_gram
from torchgeom_optim.geometry.gram_recorder import GramRecorder


@pytest.mark.parametrize("num_samples", [1, 3, 4])
@pytest.mark.parametrize("case", ZOO, ids=repr)
def test_equals_a_loop_of_autograd(case: Case, num_samples: int):
    model, (inputs, targets) = case.model(), case.batch(num_samples)
    has_input_gram = case.num_tokens is None
    result = per_sample_gram(
        model, nn.CrossEntropyLoss(), inputs, targets, per_parameter=True, of_inputs=has_input_gram
    )
    expected = expected_grams(model, inputs, targets)
    assert_grams_close(result.parameters, expected)
    assert_grams_close({"all": result.weights}, {"all": sum(expected.values())})
    if has_input_gram:
        assert_grams_close({"inputs": result.inputs}, {"inputs": expected_input_gram(model, inputs, targets)})
    else:
        assert result.inputs is None
    assert result.routes.keys() == expected.keys()
    if case.by_rule:
        assert set(result.routes.values()) == {"rule"}
    else:
        assert set(result.routes.values()) > {"rule"}


@pytest.mark.parametrize("forget", ["cross terms of the uses", "1/N", "a sample's order"])
def test_the_comparison_can_fail(forget: str):
    case = BY_NAME["used_twice"]
    model, (inputs, targets) = case.model(), case.batch()
    expected = expected_grams(model, inputs, targets)
    wrong = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets, per_parameter=True).parameters
    if forget == "1/N":
        wrong = per_sample_gram(
            model, nn.CrossEntropyLoss(), inputs, targets, per_parameter=True, reduction="sum"
        ).parameters
    elif forget == "a sample's order":
        wrong = {name: gram.flip(0) for name, gram in wrong.items()}
    else:
        untied = copy.deepcopy(model)
        second = copy.deepcopy(untied.inner)
        calls = iter([untied.inner, second])
        untied.forward = lambda x: untied.head(
            torch.tanh(next(calls)(torch.tanh(next(calls)(untied.conv(torch.tanh(untied.conv(x))).flatten(1)))))
        )
        halves = []
        for layer in (untied.inner, second):
            calls = iter([untied.inner, second] * 4)
            rows = []
            for i in range(len(inputs)):
                loss = F.cross_entropy(untied(inputs[i : i + 1]), targets[i : i + 1])
                rows.append(torch.autograd.grad(loss, layer.weight)[0])
            halves.append(gram_of(torch.stack(rows)))
        wrong["inner.weight"] = halves[0] + halves[1]
    with pytest.raises(AssertionError):
        assert_grams_close(wrong, expected)


def test_full_resnet18_from_torchvision():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is an extra")
    model = torchvision.models.resnet18(num_classes=3).double().eval()
    inputs, targets = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 2, 1])
    result = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets, per_parameter=True)
    assert set(result.routes.values()) == {"rule"}
    assert result.statistics == "frozen"
    assert_grams_close(result.parameters, expected_grams(model, inputs, targets), condition=1e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_accumulated_in_float32(dtype: torch.dtype):
    case = BY_NAME["mlp"]
    model, (inputs, targets) = case.model(), case.batch(16)
    exact = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets)
    model.to(dtype)
    result = per_sample_gram(model, nn.CrossEntropyLoss(), inputs.to(dtype), targets, of_inputs=True)
    assert result.weights.dtype == result.inputs.dtype == torch.float32
    error = (result.weights.double() - exact.weights).norm() / exact.weights.norm()
    assert error < 50 * torch.finfo(dtype).eps


def test_under_autocast():
    case = BY_NAME["functional_use"]
    model, (inputs, targets) = case.model().float(), case.batch()
    exact = per_sample_gram(model, nn.CrossEntropyLoss(), inputs.float(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        result = per_sample_gram(model, nn.CrossEntropyLoss(), inputs.float(), targets)
    assert result.routes == exact.routes
    error = (result.weights - exact.weights).norm() / exact.weights.norm()
    assert error < 10 * torch.finfo(torch.bfloat16).eps


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Embedding(5, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": torch.tanh(self.first(x)) * self.scale + self.second(tokens)}


@pytest.mark.parametrize("as_dict", [False, True])
def test_several_inputs_and_losses_per_sample(as_dict: bool):
    model = TwoInputs().double()
    x, tokens, target = torch.randn(4, 3).double(), torch.tensor([1, 0, 1, 4]), torch.randn(4, 4).double()

    def losses(outputs: dict[str, Tensor], target: Tensor) -> Tensor:
        return (outputs["logits"] - target).square()  # [N, 4]: further axes are summed

    inputs = {"tokens": tokens, "x": x} if as_dict else (x, tokens)
    result = per_sample_gram(model, losses, inputs, target, of_inputs=True)
    rows, input_rows = [], []
    for i in range(4):
        one = x[i : i + 1].clone().requires_grad_()
        loss = losses(model(one, tokens[i : i + 1]), target[i : i + 1]).sum()
        *grads, input_grad = torch.autograd.grad(loss, [*model.parameters(), one])
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
        input_rows.append(input_grad)
    assert_grams_close({"all": result.weights}, {"all": gram_of(torch.stack(rows))})
    assert_grams_close({"all": result.inputs}, {"all": gram_of(torch.cat(input_rows))})
    assert result.routes == {"first.weight": "rule", "first.bias": "rule", "second.weight": "rule", "scale": "vmap"}


def contributions(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Each sample's share of the gradient of the summed loss: one copy of the linear layer for every sample."""
    hidden = inputs @ model[0].weight.T + model[0].bias
    hidden.retain_grad()
    F.cross_entropy(model[1:](hidden), targets, reduction="sum").backward()
    weight = torch.einsum("nj,ni->nji", hidden.grad, inputs).flatten(1)
    model.zero_grad()
    return gram_of(torch.cat([weight, hidden.grad], 1))


@pytest.mark.parametrize("freeze", [False, True])
def test_batch_statistics(freeze: bool):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(6, 4).double(), torch.randint(3, (6,))
    model(inputs)
    result = per_sample_gram(
        model, nn.CrossEntropyLoss(), inputs, targets, per_parameter=True, freeze_statistics=freeze
    )
    assert model.training
    assert result.statistics == ("frozen" if freeze else "batch")
    if freeze:
        assert_grams_close(result.parameters, expected_grams(copy.deepcopy(model).eval(), inputs, targets))
    else:
        # The contributions add up to the batch gradient.
        loss = F.cross_entropy(model(inputs), targets, reduction="sum")
        for name, grad in zip(result.parameters, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            torch.testing.assert_close(result.parameters[name].sum(), grad.square().sum(), **tolerance(condition=100))
        both = result.parameters["0.weight"] + result.parameters["0.bias"]
        assert_grams_close({"0": both}, {"0": contributions(copy.deepcopy(model), inputs, targets)})


def test_random_draws_are_the_same_for_all_parameters():
    """With dropout the loop runs through the one pass: checked against autograd on that very pass."""
    model, case = Transformer().double().train(), BY_NAME["transformer"]
    inputs, targets = case.batch()
    torch.manual_seed(5)
    result = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets, per_parameter=True)
    assert set(result.routes.values()) == {"rule", "loop"}
    torch.manual_seed(5)
    losses = F.cross_entropy(model(inputs), targets, reduction="none")
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    expected = {name: gram_of(torch.stack([row[k] for row in rows])) for k, name in enumerate(result.parameters)}
    assert_grams_close(result.parameters, expected)


def test_frozen_parameters_are_left_out_and_unused_ones_named():
    case = BY_NAME["frozen"]
    model, (inputs, targets) = case.model(), case.batch()
    model.unused = nn.Linear(2, 2)
    result = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets, per_parameter=True)
    assert result.routes == {
        "first.bias": "rule", "second.weight": "rule", "head.weight": "rule", "head.bias": "rule",
        "unused.weight": "unused", "unused.bias": "unused",
    }  # fmt: skip
    assert not result.parameters["unused.weight"].any()


def test_nothing_trainable_gives_zero():
    model = nn.Linear(3, 2).requires_grad_(False)
    result = per_sample_gram(model, nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 2), of_inputs=True)
    torch.testing.assert_close(result.weights, torch.zeros(4, 4))
    assert result.inputs.diagonal().min() > 0


@given(
    st.sampled_from(["mlp", "sequence_mlp", "cnn1d", "tied_embedding", "attention"]),
    st.integers(2, 6),
    st.integers(0, 10**6),
    st.floats(1e-3, 1e3),
)
def test_symmetric_semidefinite_and_equivariant(name: str, num_samples: int, seed: int, factor: float):
    case = BY_NAME[name]
    model, (inputs, targets) = case.model(), case.batch(num_samples, seed)
    gram = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets).weights
    torch.testing.assert_close(gram, gram.T)
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert eigenvalues[0] >= -tolerance(condition=num_samples)["atol"] * eigenvalues[-1]
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    permuted = per_sample_gram(model, nn.CrossEntropyLoss(), inputs[order], targets[order]).weights
    assert_grams_close({"": permuted}, {"": gram[order][:, order]})
    scaled = per_sample_gram(
        model, lambda outputs, y: factor * F.cross_entropy(outputs, y), inputs, targets, reduction="mean"
    ).weights
    assert_grams_close({"": scaled}, {"": factor**2 * gram})


@pytest.mark.parametrize("fail", [None, "forward", "loss", "backward"])
@pytest.mark.parametrize("name", ["resnet18_narrow", "transformer", "lstm"])
def test_own_pass_leaves_no_trace(name: str, fail: str | None):
    case = BY_NAME[name]
    model, (inputs, targets) = case.model(), case.batch()
    model.train()
    F.cross_entropy(model(inputs), targets).backward()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if fail == "loss":
            raise ArithmeticError("in loss")
        return F.cross_entropy(RaisesInBackward.apply(outputs) if fail == "backward" else outputs, targets)

    if fail == "forward":
        model.register_forward_hook(lambda *_: (_ for _ in ()).throw(ArithmeticError("in forward")))
    before = state_of(model)
    if fail is None:
        with torch.no_grad():
            per_sample_gram(model, loss_fn, inputs, targets, reduction="mean", freeze_statistics=True)
            assert not torch.is_grad_enabled()
    else:
        with pytest.raises(ArithmeticError, match=fail):
            per_sample_gram(model, loss_fn, inputs, targets, reduction="mean", freeze_statistics=True)
    assert_same_state(before, state_of(model))
    assert not inputs.requires_grad


def test_a_compiled_model_is_evaluated_uncompiled():
    case = BY_NAME["mlp"]
    model, (inputs, targets) = case.model(), case.batch()
    compiled = torch.compile(model, backend="eager")
    compiled(inputs)
    result = per_sample_gram(compiled, nn.CrossEntropyLoss(), inputs, targets)
    assert_grams_close({"": result.weights}, {"": sum(expected_grams(model, inputs, targets).values())})


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, x, y: per_sample_gram(m, F.cross_entropy, x, y), ValueError, "reduction='mean' or 'sum'"),
        (lambda m, x, y: per_sample_gram(m, nn.CrossEntropyLoss(), x, y[:3]), ValueError, "same number of samples"),
        (lambda m, x, y: per_sample_gram(m, nn.CrossEntropyLoss(), [x, 3], y), TypeError, "holds a int"),
        (lambda m, x, y: per_sample_gram(m, lambda o: o.flatten(), x), ValueError, "one loss per sample"),
        (
            lambda m, x, y: per_sample_gram(nn.Embedding(3, 3), nn.CrossEntropyLoss(), y, y, of_inputs=True),
            ValueError,
            "floating point inputs",
        ),
        (lambda m, x, y: GramRecorder(m, reduction="none"), ValueError, "'mean' or 'sum'"),
        (lambda m, x, y: GramRecorder(m).result(loss_scale=float("nan")), ValueError, "loss_scale=nan"),
        (lambda m, x, y: GramRecorder(m).result(), RuntimeError, "no forward pass"),
    ],
)
def test_bad_input(call, error, match):
    case = BY_NAME["mlp"]
    with pytest.raises(error, match=match):
        call(case.model(), *case.batch())


def test_parameters_without_a_rule_need_what_they_need():
    case = BY_NAME["attention"]
    (inputs, targets) = case.batch()
    model = nn.Sequential(nn.BatchNorm1d(4), Attention()).double()
    with pytest.raises(ValueError, match="freeze_statistics=True"):
        per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets)
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]).double())
    with pytest.raises(ValueError, match="no layer rule"):
        per_sample_gram(Attention().double(), loss_fn, inputs, torch.tensor([0, 1, 2, 1]))
    model = case.model()
    with GramRecorder(model) as recorder:
        F.cross_entropy(model(inputs), targets).backward()
        with pytest.raises(RuntimeError, match=r"attention.in_proj_bias.*loss_fn"):
            recorder.result()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        with pytest.raises(RuntimeError, match=r"before optimizer.step"):
            recorder.result(loss_fn=nn.CrossEntropyLoss(), targets=targets)


def test_narrow_resnet_has_the_full_one_s_layers():
    assert sum(isinstance(m, nn.Conv2d) for m in resnet18_narrow().modules()) == 20
