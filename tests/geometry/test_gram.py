import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.oracles import per_sample_gradients, tolerance
from tests.zoo import ZOO, Attention, Case, Recurrent, Transformer, resnet18_narrow
from torchgeom_optim.geometry.gram import per_sample_gram
from torchgeom_optim.geometry.gram_accumulator import layer_of
from torchgeom_optim.geometry.gram_recorder import GramRecorder
from torchgeom_optim.geometry.jacobian import Jacobian

BY_NAME = {case.name: case for case in ZOO}


def gram_of(rows: Tensor) -> Tensor:
    rows = rows.reshape(len(rows), -1)
    return rows @ rows.T


def expected_grams(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    gradients = per_sample_gradients(model, F.cross_entropy, inputs, targets)
    return {name: gram_of(rows) for name, rows in gradients.items()}


def expected_input_gram(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    rows = []
    for i in range(len(inputs)):
        x = inputs[i : i + 1].clone().requires_grad_()
        rows.append(torch.autograd.grad(F.cross_entropy(model(x), targets[i : i + 1]), x)[0])
    return gram_of(torch.cat(rows))


def assert_grams_close(actual: dict[str, Tensor], expected: dict[str, Tensor], condition: float = 100.0) -> None:
    assert actual.keys() == expected.keys()
    for name, gram in expected.items():
        # An inner product of nearly orthogonal gradients is known relative to the gradients' lengths.
        scale = gram.diagonal().max().clamp_min(torch.finfo(gram.dtype).tiny)
        torch.testing.assert_close(actual[name] / scale, gram / scale, **tolerance(gram.dtype, condition), msg=name)


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


@pytest.mark.parametrize("case", ZOO, ids=repr)
@pytest.mark.parametrize(("reduction", "loss_scale"), [("mean", 1.0), ("sum", 1.0), ("mean", 1024.0)])
def test_recorder_takes_the_same_from_the_users_pass(case: Case, reduction: str, loss_scale: float):
    model, (inputs, targets) = case.model(), case.batch()
    inputs.requires_grad_(case.num_tokens is None)
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    with GramRecorder(model, reduction=reduction, per_parameter=True, of_inputs=case.num_tokens is None) as recorder:
        loss = loss_fn(model(inputs), targets)
        (loss * loss_scale).backward()
        result = recorder.result(loss_scale=loss_scale, loss=loss, loss_fn=loss_fn, targets=targets)
    expected = expected_grams(model, inputs.detach(), targets)
    assert_grams_close(result.parameters, expected)
    assert_grams_close({"all": result.weights}, {"all": sum(expected.values())})
    if case.num_tokens is None:
        expected_inputs = expected_input_gram(model, inputs.detach(), targets)
        assert_grams_close({"inputs": result.inputs}, {"inputs": expected_inputs})


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


def state_of(model: nn.Module) -> list[object]:
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    values = [value.clone() for value in model.state_dict().values()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    return [grads, values, hooks, flags, [m.training for m in model.modules()], torch.get_rng_state()]


def assert_same_state(before: list[object], after: list[object]) -> None:
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


class RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("in backward")


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


@pytest.mark.parametrize("name", ["resnet18_narrow", "cnn", "transformer", "tied_embedding", "lstm"])
def test_training_does_not_feel_the_recorder(name: str):
    case = BY_NAME[name]
    runs = []
    for is_recorded in (False, True):
        model = case.model().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(3)
        losses = []
        recorder = GramRecorder(model) if is_recorded else None
        for step in range(4):
            inputs, targets = case.batch(4, seed=step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            if recorder is not None and case.by_rule:
                assert recorder.result().weights.isfinite().all()
            optimizer.step()
            losses.append(loss.detach())
        if recorder is not None:
            recorder.close()
            recorder.close()
        runs.append((torch.stack(losses), state_of(model)))
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=0, atol=0)
    assert_same_state(runs[0][1], runs[1][1])


def test_no_hook_is_left_after_an_exception_in_the_loop():
    case = BY_NAME["mlp"]
    model, (inputs, targets) = case.model(), case.batch()
    before = state_of(model)
    with pytest.raises(ArithmeticError), GramRecorder(model):
        F.cross_entropy(RaisesInBackward.apply(model(inputs)), targets).backward()
    assert_same_state(before, state_of(model))


def test_a_dropped_recorder_takes_its_hooks_along_and_copies_carry_inert_ones():
    case = BY_NAME["mlp"]
    model, (inputs, targets) = case.model(), case.batch()
    recorder = GramRecorder(model)
    F.cross_entropy(model(inputs), targets).backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        F.cross_entropy(twin(inputs), targets).backward()
    result = recorder.result()
    assert_grams_close({"": result.weights}, {"": sum(expected_grams(model, inputs, targets).values())})
    hooks = state_of(model)[2]
    del recorder
    assert sum(hooks) > sum(state_of(model)[2]) == 0


def test_no_graph_is_kept_alive():
    import gc
    import weakref

    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(4, 3)
    gc.collect()
    gc.disable()
    try:
        seen = []
        model[1].register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
        per_sample_gram(model, nn.MSELoss(), x, x)
        recorder = GramRecorder(model)
        model(x).sum().backward()
        recorder.result()
        model(x).sum()
        recorder.close()
        assert [ref() for ref in seen] == [None] * len(seen)
    finally:
        gc.enable()


def test_activation_checkpointing():
    case = BY_NAME["cnn"]
    model, (inputs, targets) = case.model(), case.batch()
    expected = sum(expected_grams(model, inputs, targets).values())

    class Checkpointed(nn.Module):
        def __init__(self, use_reentrant: bool) -> None:
            super().__init__()
            self.body = model
            self.use_reentrant = use_reentrant

        def forward(self, x: Tensor) -> Tensor:
            middle = checkpoint(self.body[:6], x, use_reentrant=self.use_reentrant)
            return self.body[6:](middle)

    result = per_sample_gram(Checkpointed(False), nn.CrossEntropyLoss(), inputs, targets)
    assert_grams_close({"": result.weights}, {"": expected})
    with GramRecorder(Checkpointed(False)) as recorder:
        F.cross_entropy(recorder._model(inputs), targets).backward()
        assert_grams_close({"": recorder.result().weights}, {"": expected})
    with GramRecorder(Checkpointed(True)) as recorder:
        F.cross_entropy(recorder._model(inputs.requires_grad_()), targets).backward()
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            recorder.result()


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


def test_recorder_refuses_passes_that_it_cannot_take_apart():
    case = BY_NAME["mlp"]
    model, (inputs, targets) = case.model(), case.batch()
    with GramRecorder(model) as recorder:
        model(inputs)
        with pytest.raises(RuntimeError, match="no backward pass"):
            recorder.result()
        (model(inputs).sum() + model(inputs).square().sum()).backward()
        with pytest.raises(RuntimeError, match="several forward passes"):
            recorder.result()
        loss = model(inputs).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="two backward passes"):
            recorder.result()
        loss = (model(inputs) @ model[4].weight).square().mean()
        loss.backward()
        with pytest.raises(RuntimeError, match=r"4.weight.*outside"):
            recorder.result(loss=loss)
        with torch.no_grad():
            model(inputs)
        recorder.enabled = False
        model(inputs)
        recorder.enabled = True
        F.cross_entropy(model(inputs), targets).backward()
        assert_grams_close({"": recorder.result().weights}, {"": sum(expected_grams(model, inputs, targets).values())})


def test_overwritten_inputs_are_refused():
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.fc(x)
            x.zero_()
            return y

    with pytest.raises(RuntimeError, match="modified in place"):
        per_sample_gram(Overwrites(), nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 3))


def test_a_model_of_fixed_batch_size_is_refused():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.view(4, 3))

    with pytest.raises(RuntimeError, match="any number of samples"):
        per_sample_gram(Fixed(), nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 3))


@pytest.mark.parametrize("length", [3, 4])
def test_time_first_is_noticed_at_every_length(length: int):
    """With as many steps as samples, shapes alone do not tell."""
    model = Recurrent(nn.GRU, False).double()
    model.head_of_steps = nn.Linear(5, 5).double()
    plain = model.forward

    def forward(x: Tensor) -> Tensor:
        outputs, _ = model.rnn(x.transpose(0, 1))
        return model.head(torch.tanh(model.head_of_steps(outputs)).mean(0))

    assert plain is not forward
    model.forward = forward
    inputs, targets = torch.randn(4, length, 4).double(), torch.tensor([0, 1, 2, 0])
    result = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets, per_parameter=True)
    assert result.routes["head_of_steps.weight"] in ("vmap", "loop")
    assert result.routes["head.weight"] == "rule"
    assert_grams_close(result.parameters, expected_grams(model, inputs, targets))


def test_narrow_resnet_has_the_full_one_s_layers():
    assert sum(isinstance(m, nn.Conv2d) for m in resnet18_narrow().modules()) == 20


class MovesRows(nn.Module):
    """A model that computes with its samples in another order and puts them back, unless the loss is to."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        if self.how == "permutes the input":
            return self.head(torch.tanh(self.norm(self.first(x[order]))))[order.argsort()]
        hidden = torch.tanh(self.first(x))
        if self.how == "flips":
            return self.head(self.norm(hidden.flip(0)).flip(0))
        if self.how == "rolls":
            return self.head(self.norm(hidden.roll(1, 0)).roll(-1, 0))
        if self.how == "swaps halves":
            return self.head(self.norm(torch.cat([hidden[1:], hidden[:1]]))).roll(1, 0)
        if self.how == "stacks rows":
            return self.head(self.norm(torch.stack([hidden[i] for i in order.tolist()])))[order.argsort()]
        if self.how == "scatters":
            back = torch.zeros_like(hidden).index_copy(0, order, self.norm(hidden[order]))
            return self.head(back)
        return self.head(self.norm(hidden[order]))[order.argsort()]


MOVES = ["flips", "sorts and unsorts", "permutes the input", "rolls", "swaps halves", "stacks rows", "scatters"]


@pytest.mark.parametrize("how", MOVES)
@pytest.mark.parametrize("num_samples", [2, 5])
def test_models_that_move_rows(how: str, num_samples: int):
    model, loss_fn = MovesRows(how).double(), nn.CrossEntropyLoss()
    inputs = torch.randn(num_samples, 5, dtype=torch.float64)
    inputs[:, 0] = torch.tensor([0.3, -1.0, 2.0, 0.1, -3.0], dtype=torch.float64)[:num_samples]
    targets = torch.tensor([0, 2, 1, 0, 1])[:num_samples]
    expected = expected_grams(model, inputs, targets)
    own = per_sample_gram(model, loss_fn, inputs, targets, per_parameter=True, of_inputs=True)
    assert_grams_close(own.parameters, expected)
    assert_grams_close({"": own.inputs}, {"": expected_input_gram(model, inputs, targets)})
    with GramRecorder(model, per_parameter=True) as recorder:
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        recorded = recorder.result(loss=loss, loss_fn=loss_fn, targets=targets)
    assert_grams_close(recorded.parameters, expected)
    rows = []
    for x in inputs:
        for output in model(x[None])[0]:
            grads = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    jacobian = Jacobian(model, inputs)
    assert_grams_close({"": jacobian.gram()}, {"": gram_of(torch.stack(rows))})


def test_inputs_in_another_order_that_nobody_restores_are_refused():
    model = MovesRows("").double()
    forward = model.forward
    model.forward = lambda x: forward(x.flip(0))
    inputs, targets = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="differ from those of its samples alone"):
        per_sample_gram(model, nn.CrossEntropyLoss(reduction="none"), inputs, targets)


class PicksEntries(nn.Module):
    """Looks up, flips, rolls and slices along other axes than the samples'."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc(x))
        x = x.flip(1).roll(1, -2)[:, torch.tensor([2, 0, 1])]
        x = torch.cat([x[:, :1], x[..., 1:, :]], 1).sort(-1)[0]
        return self.head(
            x[torch.arange(len(x)), torch.full((len(x),), 1)] + x.gather(1, torch.zeros_like(x).long())[:, 0]
        )


def test_moves_along_other_axes_stay_on_the_fast_route():
    model, inputs, targets = PicksEntries().double(), torch.randn(5, 3, 4).double(), torch.tensor([0, 2, 1, 0, 1])

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs.log_softmax(1)[[4, 3, 2, 1, 0], targets.flip(0)].flip(0)

    result = per_sample_gram(model, loss_fn, inputs, targets, per_parameter=True)
    assert set(result.routes.values()) == {"rule"}
    assert_grams_close(result.parameters, expected_grams(model, inputs, targets))


class Counts(nn.Module):
    """Counts its calls and keeps a log of them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)
        self.calls = 0
        self.log: list[int] = []
        self.nested: dict[str, list[int]] = {"shapes": []}
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(len(x))
        self.nested["shapes"].append(len(x))
        self.steps += 1
        return self.fc(x) * (1 + 0.01 * self.calls)


def test_the_recorder_s_look_at_another_batch_size_is_not_felt():
    runs = []
    for is_recorded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.3), Counts()).double()
        log, seen = model[2].log, []
        for module in model.modules():
            module.register_forward_hook(lambda *_, seen=seen: seen.append("after"))
            module.register_forward_pre_hook(lambda *_, seen=seen: seen.append("before"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = GramRecorder(model) if is_recorded else None
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(4 + step, 4, dtype=torch.float64)
            F.cross_entropy(model(x), torch.zeros(4 + step, dtype=torch.long)).backward()
            if recorder is not None:
                assert recorder.result().weights.isfinite().all()
            optimizer.step()
        if recorder is not None:
            recorder.close()
        assert model[2].log is log
        counts = [model[2].calls, int(model[2].steps), log, model[2].nested["shapes"]]
        assert counts == [3, 3, [4, 5, 6], [4, 5, 6]]
        assert seen.count("before") == seen.count("after") == 3 * len(list(model.modules()))
        runs.append(state_of(model))
    assert_same_state(*runs)


def test_a_hook_that_the_model_needs_is_called():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[0].register_forward_pre_hook(lambda module, args: (args[0].flatten(1),))
    inputs, targets = torch.randn(4, 3, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    result = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets, per_parameter=True)
    assert set(result.routes.values()) == {"rule"}
    assert_grams_close(result.parameters, expected_grams(model, inputs, targets))


@pytest.mark.parametrize("case", ZOO, ids=repr)
def test_a_layers_matrix_is_the_sum_of_its_parameters_matrices(case):
    model, (inputs, targets) = case.model(), case.batch()
    expected = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets, per_parameter=True)
    with GramRecorder(model, per_layer=True) as recorder:
        nn.CrossEntropyLoss()(model(inputs), targets).backward()
        recorded = recorder.result(loss_fn=nn.CrossEntropyLoss(), targets=targets)
    alone = per_sample_gram(model, nn.CrossEntropyLoss(), inputs, targets, per_layer=True)
    for result in (recorded, alone):
        assert result.parameters is None
        assert list(result.layers) == list(dict.fromkeys(layer_of(name) for name in expected.parameters))
        for layer, found in result.layers.items():
            own = [part for name, part in expected.parameters.items() if layer_of(name) == layer]
            torch.testing.assert_close(found, sum(own), **tolerance(condition=1e3))
        torch.testing.assert_close(result.weights, expected.weights, **tolerance(condition=1e3))
    assert [layer_of(name) for name in ("0.weight", "body.2.bias", "scale")] == ["0", "body.2", "scale"]
