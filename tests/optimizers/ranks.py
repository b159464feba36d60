"""What the processes of test_distributed.py do: each scenario in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from tests.cases import OPTIMIZER_CASES, OptimizerCase, mean_loss, small_batches, small_net, train
from tests.processes import WORLD_SIZE

NUM_STEPS = 3
CASES = {case.name: case for case in OPTIMIZER_CASES}
Parallel = Callable[[nn.Module], nn.Module]


class TokenNet(nn.Module):
    """An embedding, tied linear layers without bias, and a single output unit: fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(self.embed(tokens)))))).mean(1)


class Branches(nn.Module):
    """A layer that only inputs with a positive first entry go through."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, chosen = self.always(x), x[:, 0] > 0
        if bool(chosen.any()):
            y = y.index_add(0, chosen.nonzero()[:, 0], self.sometimes(y[chosen]))
        return y


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The same network in every process."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return build().double()


def net() -> nn.Module:
    return small_net(dtype=torch.float64)


def batches(number: int = NUM_STEPS) -> list[Tensor]:
    return small_batches(number, dtype=torch.float64)


def token_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(7, (6, 3), generator=generator) for _ in range(NUM_STEPS)]


def branch_batches() -> list[Tensor]:
    """In the first batch no sample of the second half takes the branch, then none of the first, then nobody."""
    x = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64).abs()
    x[0, 4:, 0] *= -1
    x[1, :4, 0] *= -1
    x[2, :, 0] *= -1
    return list(x)


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and not isinstance(model, TokenNet):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_columns(model: nn.Module) -> nn.Module:
    """Sharded along the inputs of units where their number can be divided, else along the units."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    place = lambda p: Shard(1 if p.dim() > 1 and p.shape[1] % WORLD_SIZE == 0 else 0)  # noqa: E731
    return fully_shard(model, mesh=mesh, shard_placement_fn=place)


PARALLEL = {"ddp": ddp, "fsdp": fsdp}


def my_part(xs: Iterable[Tensor]) -> list[Tensor]:
    return [x.chunk(WORLD_SIZE)[distributed.get_rank()] for x in xs]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Complete ones, with their names in the plain model."""
    found = {}
    for name, p in model.named_parameters():
        value = p.detach()
        found[name.removeprefix("module.")] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
    return found


# -- scenarios -----------------------------------------------------------------------------------------------------


def halves(case: OptimizerCase, parallel: Parallel) -> dict[str, Tensor]:
    model = parallel(net())
    train(model, case(model), my_part(batches()))
    return parameters_of(model)


def tokens(case: OptimizerCase, parallel: Parallel) -> dict[str, Tensor]:
    model = parallel(seeded(TokenNet))
    train(model, case(model), my_part(token_batches()))
    return parameters_of(model)


def far_from_zero() -> nn.Module:
    """Outputs whose mean is ten thousand times their spread, in single precision."""
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.fill_(1e4)
    return model


def spreads(case: OptimizerCase, parts: list[Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Of the outputs, as the optimizer saw them in each step."""
    optimizer, found = case(model), {}
    for step, x in enumerate(parts):
        train(model, optimizer, [x], lambda y: (y - 1e4).sin().mean())
        found[f"step {step}"] = next(iter(optimizer.state.values()))["spread_sq"].clone()
    return found


def far_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 4, generator=generator) for _ in range(NUM_STEPS)]


def gaps(case: OptimizerCase, parts: list[Tensor], parallel: Parallel = lambda model: model) -> dict[str, Tensor]:
    """In the second batch an input has missing values, which fill outputs with infinity; what is seen in the third."""
    model = parallel(nn.Sequential(far_from_zero(), nn.Hardtanh(0.0, 2e4)))
    optimizer = case(model)
    for step, x in enumerate(parts):
        x = torch.where(x == parts[1][0, 0], 3e38, x) if step == 1 and in_first_process() else x
        train(model, optimizer, [x], lambda y: (y - 1e4).sin().mean())
    return {**parameters_of(model), "spread_sq": next(iter(optimizer.state.values()))["spread_sq"].clone()}


def in_first_process() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def unequal(case: OptimizerCase, parallel: Parallel) -> dict[str, Tensor]:
    """5 and 3 samples; a loss that is weighted so that the mean over processes is that over samples."""
    model, rank = parallel(net()), distributed.get_rank()
    parts = [x[:5] if rank == 0 else x[5:] for x in batches()]
    train(model, case(model), parts, lambda y: mean_loss(y) * len(y) / (8 / WORLD_SIZE))
    return parameters_of(model)


def accumulated(case: OptimizerCase, parallel: Parallel) -> dict[str, Tensor]:
    """Each process in two passes; the gradients of the first are not yet averaged."""
    model = parallel(net())
    optimizer = case(model)
    for x in my_part(batches()):
        optimizer.zero_grad()
        if isinstance(model, DistributedDataParallel):
            with model.no_sync():
                (mean_loss(model(x[:2])) / 2).backward()
        else:
            model.set_requires_gradient_sync(False)
            (mean_loss(model(x[:2])) / 2).backward()
            model.set_requires_gradient_sync(True)
        (mean_loss(model(x[2:])) / 2).backward()
        optimizer.step()
    return parameters_of(model)


def averaged_twice(case: OptimizerCase, parallel: Parallel) -> dict[str, Tensor]:
    """The same, the gradients of each pass averaged at once; and a step before that is skipped."""
    model = parallel(net())
    optimizer = case(model)
    for x in my_part(batches()):
        mean_loss(model(100 * x)).backward()
        model.zero_grad()
        for part in (x[:2], x[2:]):
            (mean_loss(model(part)) / 2).backward()
        optimizer.step()
        model.zero_grad()
    return parameters_of(model)


def scaled(case: OptimizerCase, parallel: Parallel) -> dict[str, Tensor]:
    """With a GradScaler; in the second step one process has an infinite input, and all of them skip it."""
    model = parallel(net())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer = case(model, **({"loss_scale": scaler.get_scale} if case.sees_output_grads else {}))
    for step, x in enumerate(my_part([batches()[0], *batches()])):
        if step == 0 and distributed.get_rank() == 1:
            x = torch.full_like(x, torch.inf)
        optimizer.zero_grad()
        scaler.scale(mean_loss(model(x))).backward()
        scaler.step(optimizer)
        scaler.update()
    return parameters_of(model)


def branches(case: OptimizerCase) -> dict[str, Tensor]:
    model = DistributedDataParallel(seeded(Branches), find_unused_parameters=True)
    train(model, case(model), my_part(branch_batches()))
    return parameters_of(model)


def sits_out(case: OptimizerCase, parallel: Parallel, parts: list[Tensor]) -> dict[str, Tensor]:
    """The layer that only the first process calls gets no gradient in the first step, then as every other."""
    model = parallel(seeded(Branches))
    optimizer = case(model)
    for step, x in enumerate(parts):
        optimizer.zero_grad()
        mean_loss(model(x)).backward()
        for name, p in model.named_parameters():
            p.grad = None if step == 0 and "sometimes" in name else p.grad
        optimizer.step()
    return parameters_of(model)


def resumed(case: OptimizerCase, parallel: Parallel) -> dict[str, Tensor]:
    """A checkpoint after the first step, taken up by another optimizer on the same model."""
    model = parallel(net())
    optimizer = case(model)
    parts = my_part(batches())
    train(model, optimizer, parts[:1])
    other = case(model, lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.zero_grad()
    train(model, other, parts[1:])
    return parameters_of(model)


def alone(case: OptimizerCase) -> dict[str, Tensor]:
    """In a group of one, each trains a model of its own."""
    groups = [distributed.new_group([rank]) for rank in range(WORLD_SIZE)]
    model, rank = net(), distributed.get_rank()
    train(model, case(model, process_group=groups[rank]), batches()[: 1 + rank])
    return parameters_of(model)


def refused(what: str, case: OptimizerCase) -> str:
    model = net()
    if what == "tensor parallel":
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        model = parallelize_module(model, init_device_mesh("cpu", (WORLD_SIZE,)), {"head": ColwiseParallel()})
    elif what == "flattened":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif what == "different models":
        model = nn.Sequential(nn.Linear(4, 3 + distributed.get_rank())).double()
        x = torch.ones(2, 4, dtype=torch.float64)
        return error_of(lambda: train(model, case(model), [x]))
    return error_of(lambda: case(model))


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def scenarios() -> Iterable[tuple[str, Callable[[], Any]]]:
    for kind, parallel in PARALLEL.items():
        for name, case in CASES.items() if kind == "ddp" else [(name, CASES[name]) for name in FSDP_CASES]:
            yield f"halves {kind} {name}", lambda case=case, parallel=parallel: halves(case, parallel)
        for name in TOKEN_CASES:
            yield f"tokens {kind} {name}", lambda name=name, parallel=parallel: tokens(CASES[name], parallel)
        for name in PASS_CASES:
            for scenario in (unequal, accumulated, averaged_twice, scaled, resumed):
                yield (
                    f"{scenario.__name__} {kind} {name}",
                    lambda s=scenario, name=name, parallel=parallel: s(CASES[name], parallel),
                )
    for name in COLUMN_CASES:
        yield f"halves columns {name}", lambda name=name: halves(CASES[name], by_columns)
    yield "tokens columns", lambda: tokens(CASES["trust_region"], by_columns)
    for name in FAR_CASES:
        yield (
            f"far {name}",
            lambda name=name: spreads(CASES[name], my_part(far_batches()), DistributedDataParallel(far_from_zero())),
        )
        yield f"gaps {name}", lambda name=name: gaps(CASES[name], my_part(far_batches()), ddp)
    for name in BRANCH_CASES:
        yield f"branches {name}", lambda name=name: branches(CASES[name])
    for name in FAR_CASES:
        parallel = lambda model: DistributedDataParallel(model, find_unused_parameters=True)  # noqa: E731
        yield (
            f"sits out {name}",
            lambda name=name, parallel=parallel: sits_out(CASES[name], parallel, my_part(branch_batches()[:2])),
        )
    case = CASES["whitening"]
    yield "alone", lambda: alone(case)
    for what in ("tensor parallel", "flattened", "different models"):
        yield f"refused {what}", lambda what=what: refused(what, case)


TOKEN_CASES = ("trust_region", "whitening_momentum", "second_order", "natural_kronecker", "natural_diagonal")
PASS_CASES = ("trust_region_lr", "second_order", "natural_kronecker_unit")
# Sharded models take long to build: one case of each way to a step.
FSDP_CASES = (
    *("trust_region_lr", "whitening_momentum", "second_order", "fan_in", "sgd"),
    *("natural_kronecker", "natural_whitening", "natural_quasi_diagonal", "natural_rmsprop", "natural_normalized_sgd"),
)
COLUMN_CASES = ("trust_region_lr", "second_order", "natural_kronecker", "natural_scale_free_whitening")
FAR_CASES = ("trust_region", "natural_scale_free_whitening")
MEASURE_ON_A_FEW = ("trust_region", "trust_region_lr")
BRANCH_CASES = ("trust_region", "whitening", "second_order", "natural_kronecker", "natural_kronecker_unit")
