"""What PyTorch asks of its own optimizers, put the way it does: one OptimizerInfo per class, and bodies that go by it.

Bodies run on bare parameters, as there, and on the same ones as the layer of a model. What PyTorch asks beyond this is
in the other contract tests: closures, schedulers in detail, hooks of a step, weights-only files, copies, GradScaler.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tests.cases import OPTIMIZER_CASES, OptimizerCase, assert_same_parameters, mean_loss, tensors_of
from tests.oracles import tolerance

common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="needs expecttest, of the extra 'dev'")

CLASSES = {case.optimizer: case for case in reversed(OPTIMIZER_CASES)}


def error_inputs(case: OptimizerCase) -> list[Any]:
    """PyTorch's own, and what the case refuses."""
    inputs = common.get_error_inputs_for_all_optims("cpu", torch.float32)
    for error_input in inputs:
        if error_input.error_regex == "Tensor lr must be 1-element":
            error_input.error_regex = "lr .*need one element"
    for kwargs, error, message in (*case.refuses, *case.refuses_once):
        described = common.OptimizerInput(params=None, kwargs=kwargs, desc=message)
        inputs.append(common.ErrorOptimizerInput(described, error_type=error, error_regex=message))
    return inputs


INFOS = [
    common.OptimizerInfo(
        optimizer,
        optim_inputs_func=lambda device, dtype=None, optimizer=optimizer: [
            common.OptimizerInput(params=None, kwargs=dict(case.kwargs), desc=case.name)
            for case in OPTIMIZER_CASES
            if case.optimizer is optimizer
        ],
        optim_error_inputs_func=lambda device, dtype, case=case: error_inputs(case),
        scheduler_inputs=(
            [lambda o: StepLR(o, gamma=0.9, step_size=10)],
            [lambda o: LinearLR(o, 0.4, total_iters=4), lambda o: ExponentialLR(o, 0.99)],
            [lambda o: ExponentialLR(o, 0.99), lambda o: ReduceLROnPlateau(o)],
        ),
        supported_impls=("foreach",),
        not_og_supported_flags=("foreach", "maximize"),
    )
    for optimizer, case in CLASSES.items()
]
INPUTS = [(info, given) for info in INFOS for given in info.optim_inputs_func("cpu")]
every_input = pytest.mark.parametrize(("info", "given"), INPUTS, ids=lambda value: getattr(value, "desc", ""))
owned_or_bare = pytest.mark.parametrize("owned", [True, False], ids=["owned", "bare"])


class Problem:
    """A layer y = W x + b, a loss, and an optimizer that has its parameters or the layer itself."""

    def __init__(self, info: Any, kwargs: dict[str, Any], *, owned: bool, contiguous: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        weight, bias = (torch.randn(*shape, 2, generator=generator)[..., 0] for shape in ((10, 5), (10,)))
        self.layer = nn.Linear(5, 10)
        self.layer.weight = nn.Parameter(weight.contiguous() if contiguous else weight)
        self.layer.bias = nn.Parameter(bias.contiguous() if contiguous else bias)
        self.x = torch.randn(4, 5, generator=generator)
        self.optimizer: torch.optim.Optimizer = info.optim_cls(self.groups(), **kwargs, **self.model(owned))

    def groups(self) -> list[Any]:
        return list(self.layer.parameters())

    def model(self, owned: bool) -> dict[str, Any]:
        return {"model": self.layer} if owned else {}

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = mean_loss(self.layer(self.x))
        loss.backward()
        return loss

    def train(self, number: int) -> list[float]:
        return [float(self.optimizer.step(self.closure)) for _ in range(number)]


class ProblemOfTwoGroups(Problem):
    """With a learning rate of its own for the bias."""

    def groups(self) -> list[Any]:
        return [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "lr": 1e-4}]


ERRORS = [(info, given) for info in INFOS for given in info.optim_error_inputs_func("cpu", torch.float32)]


@pytest.mark.parametrize(
    ("info", "given"),
    ERRORS,
    ids=[f"{info.optim_cls.__name__}-{given.optimizer_error_input.desc}" for info, given in ERRORS],
)
def test_errors(info, given):
    params = given.optimizer_error_input.params
    params = [nn.Parameter(torch.randn(2, 2))] if params is None else params
    build = lambda: info.optim_cls(params, **given.optimizer_error_input.kwargs)  # noqa: E731
    if issubclass(given.error_type, Warning):
        with pytest.warns(given.error_type, match=given.error_regex):
            build()
    else:
        with pytest.raises(given.error_type, match=given.error_regex):
            build()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("contiguous", [True, False])
@owned_or_bare
@every_input
def test_goes_right_direction(info, given, owned, contiguous, maximize):
    problem = Problem(info, {**given.kwargs, "maximize": maximize}, owned=owned, contiguous=contiguous)
    assert "lr" in repr(problem.optimizer)
    losses = problem.train(10)
    assert (losses[-1] > losses[0]) == maximize
    assert losses[-1] != losses[0]


@owned_or_bare
@every_input
def test_param_groups_with_schedulers_go_right_direction(info, given, owned):
    for makers in info.scheduler_inputs:
        problem = ProblemOfTwoGroups(info, given.kwargs, owned=owned)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of two schedulers, about the first steps
            schedulers = [make(problem.optimizer) for make in makers]
            losses = []
            for _ in range(10):
                losses += problem.train(1)
                for scheduler in schedulers:
                    scheduler.step(*([losses[-1]] if isinstance(scheduler, ReduceLROnPlateau) else []))
        assert losses[-1] < losses[0]


@owned_or_bare
@every_input
def test_a_tensor_learning_rate_is_a_learning_rate(info, given, owned):
    number, tensor = (
        Problem(info, {**given.kwargs, "lr": lr}, owned=owned) for lr in (0.01, torch.tensor(0.01, dtype=torch.float64))
    )
    torch.testing.assert_close(tensor.train(5), number.train(5), **tolerance(torch.float32))
    assert_same_parameters(tensor.layer, number.layer, **tolerance(torch.float32))
    assert isinstance(tensor.optimizer.param_groups[0]["lr"], Tensor)


@every_input
def test_complex_parameters_are_pairs_of_real_ones(info, given):
    generator = torch.Generator().manual_seed(0)
    complexes = [nn.Parameter(torch.randn(s, dtype=torch.complex64, generator=generator)) for s in ((10, 5), (10,))]
    reals = [nn.Parameter(torch.view_as_real(p).detach().clone()) for p in complexes]
    optimizers = [info.optim_cls(params, **given.kwargs) for params in (complexes, reals)]
    for _ in range(3):
        for p, q in zip(complexes, reals, strict=True):
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            q.grad = torch.view_as_real(p.grad)
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(complexes, reals, strict=True):
            torch.testing.assert_close(torch.view_as_real(p), q, **tolerance(torch.float32))


@owned_or_bare
@every_input
def test_foreach_is_the_loop(info, given, owned):
    assert "foreach" in info.supported_impls
    loop, foreach = (Problem(info, {**given.kwargs, "foreach": value}, owned=owned) for value in (False, True))
    torch.testing.assert_close(foreach.train(5), loop.train(5), **tolerance(torch.float32))
    assert_same_parameters(foreach.layer, loop.layer, **tolerance(torch.float32))
    torch.testing.assert_close(
        tensors_of(foreach.optimizer.state_dict()["state"]),
        tensors_of(loop.optimizer.state_dict()["state"]),
        **tolerance(torch.float32),
    )


@pytest.mark.parametrize("gradients", [None, 0.0])
@owned_or_bare
@every_input
def test_no_gradients_and_zero_gradients_move_nothing(info, given, owned, gradients):
    problem = Problem(info, {**given.kwargs, "weight_decay": 0.0}, owned=owned)
    before = copy.deepcopy(problem.layer)
    for _ in range(3):
        problem.optimizer.zero_grad()
        if gradients is not None:
            (gradients * mean_loss(problem.layer(problem.x))).backward()
        problem.optimizer.step()
    assert_same_parameters(problem.layer, before)


@owned_or_bare
@every_input
def test_state_dicts_are_deterministic(info, given, owned):
    one, two = (Problem(info, given.kwargs, owned=owned) for _ in range(2))
    one.train(3)
    two.layer.load_state_dict(one.layer.state_dict())
    two.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    for problem in (one, two):
        problem.train(3)
    states = [problem.optimizer.state_dict() for problem in (one, two)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    torch.testing.assert_close(states[1]["state"], states[0]["state"], rtol=0, atol=0)


@every_input
def test_checkpoints_without_flags_that_came_later(info, given):
    problem = Problem(info, given.kwargs, owned=True)
    problem.train(2)
    old = copy.deepcopy(problem.optimizer.state_dict())
    for group, flag in itertools.product(old["param_groups"], info.not_og_supported_flags):
        del group[flag]
    problem.optimizer.load_state_dict(old)
    assert problem.optimizer.param_groups[0]["maximize"] is False
    problem.train(2)


@every_input
def test_hooks_of_state_dicts(info, given):
    """Hooks may change what is saved, and make of an unknown format one that is known."""
    problem, called = Problem(info, given.kwargs, owned=True), list[str]()
    problem.train(2)
    optimizer = problem.optimizer

    def unwrap(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        called.append("before loading")
        return state_dict["wrapped"]

    handles = [
        optimizer.register_state_dict_pre_hook(lambda _: called.append("before saving")),
        optimizer.register_state_dict_post_hook(lambda _, state_dict: {"wrapped": state_dict}),
        optimizer.register_load_state_dict_pre_hook(unwrap),
        optimizer.register_load_state_dict_post_hook(lambda _: called.append("after loading")),
    ]
    given_back = optimizer.state_dict()
    assert list(given_back) == ["wrapped"]
    before = tensors_of(given_back)
    optimizer.load_state_dict(given_back)
    assert called == ["before saving", "before loading", "after loading"]
    torch.testing.assert_close(tensors_of(optimizer.state_dict()), before, rtol=0, atol=0)
    for handle in handles:
        handle.remove()
    assert "state" in optimizer.state_dict()
    optimizer.load_state_dict(optimizer.state_dict())  # the hooks are gone
    assert called[-2:] == ["after loading", "before saving"]


@every_input
def test_hooks_of_all_optimizers(info, given):
    called: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: called.append("before")),
        register_optimizer_step_post_hook(lambda *_: called.append("after")),
    ]
    try:
        Problem(info, given.kwargs, owned=True).train(1)
    finally:
        for handle in handles:
            handle.remove()
    assert called == ["before", "after"]


@every_input
def test_a_deep_copy_has_all_public_attributes(info, given):
    optimizer = Problem(info, given.kwargs, owned=True).optimizer
    public: Callable[[Any], set[str]] = lambda o: {key for key in vars(o) if not key.startswith("_")}  # noqa: E731
    assert public(copy.deepcopy(optimizer)) == public(optimizer)
