"""Gram matrices from the pass that a loop makes, which does not feel it."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.geometry.oracles_gram import (
    BY_NAME,
    RaisesInBackward,
    assert_grams_close,
    assert_same_state,
    expected_grams,
    expected_input_gram,
    state_of,
)
from tests.zoo import ZOO, Case
from torchgeom_optim.geometry.gram import per_sample_gram
from torchgeom_optim.geometry.gram_recorder import GramRecorder


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


def test_layers_carry_hooks_only_for_passes_that_are_recorded():
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3), torch.arange(5) % 2
    with GramRecorder(model) as recorder:
        for recorder.enabled in (False, True, False, True):
            F.cross_entropy(model(x), y).backward()
            assert [len(layer._forward_hooks) for layer in model] == [recorder.enabled, 0, recorder.enabled]
            if recorder.enabled:
                expected = per_sample_gram(model, F.cross_entropy, x, y, reduction="mean")
                torch.testing.assert_close(recorder.result().weights, expected.weights)


@pytest.mark.parametrize("is_first", [True, False])
def test_hooks_stay_where_a_part_of_the_model_is_compiled(is_first: bool):
    """Code that is compiled does not notice hooks that are set later."""
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3), torch.arange(5) % 2
    expected = per_sample_gram(model, F.cross_entropy, x, y, reduction="mean").weights
    if is_first:
        model[1].compile(backend="eager")
    with GramRecorder(model) as recorder:
        if not is_first:
            model[1].compile(backend="eager")
        for recorder.enabled in (False, True):
            F.cross_entropy(model(x), y).backward()
            assert all(layer._forward_hooks for layer in model)
        torch.testing.assert_close(recorder.result().weights, expected)
    assert not any(layer._forward_hooks for layer in model)


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
