"""What does the Gram matrix of all per-sample gradients cost, in forward + backward passes of the same network?

``per_sample_gram`` makes a pass of its own, which computes no weight gradients; ``GramRecorder`` rides on the training
loop's forward and backward pass, whose time is part of its figure. Beside them, on the same fresh batches and in turns:
torch.func's vmap(grad), Opacus, BackPACK (per-sample gradients, then their products) and nngeometry's Gram matrix.
Asked for: at most 1.4 on mlp2 (batch 128), 1.3 on cnn3 (batch 64), 1.8 on resnet18 (batch 32, frozen batch norm), the
last with at most 200 MiB of extra memory.

Inputs are drawn from a normal distribution in the shapes of MNIST and CIFAR-10. Memory: every candidate runs in a fresh
process, which first makes two plain passes; "extra MiB" is by how much two calls of the candidate raise the process's
largest resident size beyond theirs. A peer that is missing or refuses the network is named with its reason.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from benchmarks.harness import benchmark_parser, extra_memory, start, time_interleaved, timing_rows, write_result
from torchgeom_optim.geometry.gram import per_sample_gram
from torchgeom_optim.geometry.gram_recorder import GramRecorder
from torchgeom_optim.models.reference import reference_network

NAME = "what_does_the_gram_matrix_cost"
BASELINE = "forward + backward"
# network: batch size, sample shape, rounds, calls per round
CASES = {
    "mlp2": (128, (1, 28, 28), 11, 5),
    "cnn3": (64, (3, 32, 32), 15, 1),
    "resnet18": (32, (3, 32, 32), 3, 1),
}
Batch = tuple[Tensor, Tensor]
GramOf = Callable[[Batch], "Tensor | None"]


def main(argv: list[str] | None = None) -> None:
    """Time every network and write the result."""
    options = start(benchmark_parser(__doc__), argv)
    warnings.simplefilter("ignore")  # of peers, about torch's hooks
    cases = {"mlp2": (8, (1, 28, 28), 1, 1)} if options.smoke else CASES
    numbers: dict[str, Any] = {}
    rows: list[dict[str, object]] = []
    for network, (batch_size, shape, rounds, calls) in cases.items():
        model = _model(network)
        grams: dict[str, GramOf] = {}
        remarks: dict[str, str] = {}
        reference = _by_loop(model, _batch(0, batch_size, shape))
        errors: dict[str, float] = {}
        for name, build in CANDIDATES.items():
            try:
                grams[name] = build(copy.deepcopy(model))
                found = grams[name](_batch(0, batch_size, shape))
            except Exception as error:  # whatever a peer raises is its answer
                grams.pop(name, None)
                remarks[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            else:
                if found is not None:
                    errors[name] = float((found.double() - reference).norm() / reference.norm())
        timing = time_interleaved(
            grams,
            baseline=BASELINE,
            rounds=rounds,
            calls_per_round=calls,
            make_batch=lambda number, size=batch_size, shape=shape: _batch(number, size, shape),
            warmup_rounds=1 if network == "resnet18" else 2,
        )
        measured = ["per_sample_gram"] if options.smoke else list(grams)
        warm = partial(_warm, network, batch_size, shape)
        memory = {
            name: extra_memory(
                warm, partial(_twice, candidate=name, batch_size=batch_size, shape=shape), threads=options.threads
            )
            for name in measured
        }
        numbers[f"{network}, batch {batch_size}"] = {
            "timing": timing, "extra MiB": memory, "relative error": errors, "refused": remarks
        }  # fmt: skip
        for row in timing_rows(timing, network=network, batch=batch_size):
            name = str(row["candidate"])
            rows.append({**row, "extra MiB": memory.get(name, ""), "relative error": errors.get(name, "")})
        rows += [
            {"network": network, "batch": batch_size, "candidate": name, "quartiles": remark[:40]}
            for name, remark in remarks.items()
        ]
    write_result(NAME, numbers, options, seeds=[0], rows=rows)


def _model(network: str) -> nn.Module:
    torch.manual_seed(0)
    return reference_network(network).eval()  # batch norm frozen; the others do not notice


def _batch(number: int, size: int, shape: tuple[int, ...]) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(size, *shape, generator=generator)
    return x, torch.randint(10, (size,), generator=generator)


def _by_loop(model: nn.Module, batch: Batch) -> Tensor:
    """The answer in float64, one sample after the other."""
    model, x, y = copy.deepcopy(model).double(), batch[0].double(), batch[1]
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    stacked = torch.stack(rows)
    return stacked @ stacked.T


def _products(gradients: list[Tensor]) -> Tensor:
    total: Tensor | None = None
    for rows in gradients:
        share = rows.flatten(1) @ rows.flatten(1).T
        total = share if total is None else total + share
    assert total is not None
    return total


def _plain(model: nn.Module) -> GramOf:
    def step(batch: Batch) -> None:
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()

    return step


def _ours(model: nn.Module) -> GramOf:
    loss_fn = nn.CrossEntropyLoss()
    return lambda batch: per_sample_gram(model, loss_fn, *batch).weights


def _recorder(model: nn.Module) -> GramOf:
    recorder = GramRecorder(model, reduction="mean")

    def step(batch: Batch) -> Tensor:
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        return recorder.result().weights

    return step


def _vmap(model: nn.Module) -> GramOf:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = functional_call(model, (parameters, buffers), (x.unsqueeze(0),))
        return F.cross_entropy(output, y.unsqueeze(0))

    gradients = vmap(grad(loss), (None, 0, 0))
    return lambda batch: _products(list(gradients(parameters, *batch).values()))


def _opacus(model: nn.Module) -> GramOf:
    from opacus import GradSampleModule

    # It only looks at layers in training mode; of batch norm, which would notice, it refuses all.
    wrapped = GradSampleModule(model.train(), loss_reduction="sum")

    def gram(batch: Batch) -> Tensor:
        F.cross_entropy(wrapped(batch[0]), batch[1], reduction="sum").backward()
        result = _products([p.grad_sample for p in model.parameters()])
        wrapped.zero_grad(set_to_none=True)
        return result

    return gram


def _backpack(model: nn.Module) -> GramOf:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    has_branches = any(hasattr(module, "downsample") for module in model.modules())
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    extended = extend(model, use_converter=True) if has_branches else extend(model)
    loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))

    def gram(batch: Batch) -> Tensor:
        extended.zero_grad()
        with backpack(BatchGrad()):
            loss_fn(extended(batch[0]), batch[1]).backward()
        result = _products([p.grad_batch for p in extended.parameters()])
        for p in extended.parameters():
            del p.grad_batch
        return result

    return gram


def _nngeometry(model: nn.Module) -> GramOf:
    from nngeometry.gram import GramMatrix
    from torch.utils.data import DataLoader, TensorDataset

    def function(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none").unsqueeze(1)

    def gram(batch: Batch) -> Tensor:
        loader = DataLoader(TensorDataset(*batch), batch_size=len(batch[0]))
        found: Tensor = GramMatrix(model, loader, function=function).data
        return found.reshape(len(batch[0]), len(batch[0]))

    return gram


CANDIDATES: dict[str, Callable[[nn.Module], GramOf]] = {
    BASELINE: _plain,
    "per_sample_gram": _ours,
    "forward + backward with GramRecorder": _recorder,
    "torch.func vmap(grad), then Gram": _vmap,
    "Opacus, then Gram": _opacus,
    "BackPACK, then Gram": _backpack,
    "nngeometry GramMatrix": _nngeometry,
}


def _warm(network: str, batch_size: int, shape: tuple[int, ...]) -> nn.Module:
    model = _model(network)
    step = _plain(model)
    for number in range(2):
        step(_batch(number, batch_size, shape))
    return model


def _twice(model: nn.Module, candidate: str, batch_size: int, shape: tuple[int, ...]) -> None:
    gram = CANDIDATES[candidate](model)
    for number in range(2, 4):
        gram(_batch(number, batch_size, shape))


if __name__ == "__main__":
    main()
