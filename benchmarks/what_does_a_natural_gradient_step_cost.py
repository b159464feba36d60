"""What does a training step cost with the members of BlockNaturalGradient, and with peers, against torch.optim.SGD?

lenet at batch 64 and mlp_wide (784-1000-1000-10) at batch 128: forward pass, backward pass and optimizer step on fresh
batches, interleaved. A turn is ten steps, so that what happens every tenth step (inverses, eigenbases) is in it once.
Ratios are medians over rounds of the ratio within a round. "arithmetic" is the count of multiplications of a step, by
the formulas below, in units of SGD's: what the ratio would be if only products of matrices cost time.

Asked for: with factors every step and inverses every ten, at most 1.6 on lenet; on mlp_wide at most 9 if the gradient
is multiplied by dense inverses, 5 where it is the product that was captured, 3 for a one-sided form; diagonal
and unit metrics at most 1.25. Peers are measured where they are installed (``pip install torchgeom-optim[peers]``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import benchmark_parser, start, time_interleaved, timing_rows, training_step, write_result
from torchgeom_optim.models.reference import lenet, mlp_wide
from torchgeom_optim.optimizers import BlockNaturalGradient

NAME = "what_does_a_natural_gradient_step_cost"
LR, INTERVAL = 1e-4, 10
JOBS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...], int]] = {
    "lenet": (lenet, 64, (3, 32, 32), 12),
    "mlp_wide": (mlp_wide, 128, (784,), 8),
}
DENSE = "kfac, gradient through dense inverses"
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]
NaturalGradient = BlockNaturalGradient


def main(argv: list[str] | None = None) -> None:
    """Time every case and write the result."""
    options = start(benchmark_parser(__doc__), argv)
    rows, jobs = [], {}
    for name, (network, batch, shape, rounds) in JOBS.items():
        torch.manual_seed(0)
        model = network()
        optimizers = {**_ours(), **({} if options.smoke else _peers())}
        if options.smoke:
            optimizers = {key: optimizers[key] for key in ("SGD", "kfac", DENSE)}
        steps, failed = {}, {}
        for key, make in optimizers.items():
            try:
                steps[key] = training_step(model, make)
                for number in range(2):
                    steps[key](_batch(number, batch, shape))
            except Exception as error:  # a peer that does not run here is part of the answer
                failed[key] = f"{type(error).__name__}: {error}"[:300]
                steps.pop(key, None)
        timing = time_interleaved(
            steps,
            baseline="SGD",
            rounds=1 if options.smoke else rounds,
            make_batch=lambda number, batch=batch, shape=shape: _batch(number, batch, shape),
            calls_per_round=1 if options.smoke else INTERVAL,
            warmup_rounds=1,
        )
        arithmetic = _arithmetic(model, batch, shape)
        jobs[f"{name}, batch {batch}"] = {"timing": timing, "arithmetic": arithmetic, "does not run": failed}
        for row in timing_rows(timing, network=name):
            rows.append({**row, "arithmetic": arithmetic.get(str(row["candidate"]), "")})
        for key, error in failed.items():
            print(f"{name}: {key} does not run: {error}")
        write_result(NAME, jobs, options, seeds=[0])
    write_result(NAME, jobs, options, seeds=[0], rows=rows)


def _ours() -> dict[str, Optimizer]:
    def member(*args: Any, **kwargs: Any) -> Optimizer:
        return lambda model: NaturalGradient(model, LR, *args, **kwargs)

    return {
        "SGD": lambda model: torch.optim.SGD(model.parameters(), LR, momentum=0.9),
        "Adam": lambda model: torch.optim.Adam(model.parameters(), LR),
        "RMSprop (torch)": lambda model: torch.optim.RMSprop(model.parameters(), LR),
        "rmsprop": lambda model: NaturalGradient.rmsprop(model, LR),
        "normalized_sgd": lambda model: NaturalGradient.normalized_sgd(model, LR),
        "fan_in": lambda model: NaturalGradient.fan_in(model, LR),
        "diagonal, layers": member("diagonal", "layer"),
        "diagonal, weights": member("diagonal", "weight"),
        "quasi_diagonal, units": member("quasi_diagonal", "unit"),
        "whitening, units": member("whitening", "unit"),
        "fisher_diagonal, layers": member("fisher_diagonal", "layer"),
        "kfac": lambda model: NaturalGradient.kfac(model, LR),
        DENSE: lambda model: NaturalGradient.kfac(_without_products(model), LR),
        "kronecker, units (one-sided)": member("kronecker", "unit"),
    }


def _peers() -> dict[str, Optimizer]:
    """Where they are installed; their own defaults but for the interval."""
    peers: dict[str, Optimizer] = {}
    if importlib.util.find_spec("singd"):
        from singd.optim.optimizer import SINGD

        settings: dict[str, Any] = {"lr": LR, "T": 1, "warn_unsupported": False}
        peers["SINGD, dense, every 10"] = lambda model: SINGD(model, **{**settings, "T": INTERVAL})
        peers["SINGD, diagonal, every step"] = lambda model: SINGD(
            model, **settings, structures=("diagonal", "diagonal")
        )
    if importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        peers["SOAP (pytorch_optimizer), every 10"] = lambda model: pytorch_optimizer.SOAP(
            model.parameters(), lr=LR, precondition_frequency=INTERVAL
        )
    if importlib.util.find_spec("heavyball"):
        import heavyball

        heavyball.utils.compile_mode = None  # as everything else here: compiled by no one
        peers["SOAP (HeavyBall), every 10"] = lambda model: heavyball.SOAP(
            model.parameters(), lr=LR, precondition_frequency=INTERVAL, use_precond_schedule=False
        )
    if importlib.util.find_spec("kfac"):
        peers["K-FAC (kfac-pytorch), every 10"] = _kfac_pytorch
    return peers


def _kfac_pytorch(model: nn.Module) -> torch.optim.Optimizer:
    from kfac.preconditioner import KFACPreconditioner

    sgd = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    preconditioner = KFACPreconditioner(model, factor_update_steps=1, inv_update_steps=INTERVAL)
    sgd.register_step_pre_hook(lambda *_: preconditioner.step())
    return sgd


def _without_products(model: nn.Module) -> nn.Module:
    """Gradients in memory of their own, as gradient clipping or accumulation would leave them."""
    for p in model.parameters():
        p.register_hook(lambda grad: grad.clone())
    return model


def _batch(number: int, size: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, *shape, generator=generator), torch.randint(10, (size,), generator=generator)


def _arithmetic(model: nn.Module, batch: int, shape: tuple[int, ...]) -> dict[str, float]:
    """Multiplications of a step in units of SGD's; a layer of q inputs (with the 1) and m outputs sees n patches.

    Its passes: 3 n q m (the first layer's: 2). Factors: n (q^2 + m^2), of convolutions over the positions that are
    looked at, about max(256, 2 q) in a batch. Inverses: (q^3 + m^3) / 2, every tenth step. The gradient: q m (q + m),
    or n (q^2 + m^2 + q m) as a product. One-sided without the m^2 and m^3.
    """
    total = dict.fromkeys(("SGD", "kfac", DENSE, "kronecker, units (one-sided)"), 0.0)
    positions: dict[nn.Module, int] = {}
    handles = [
        module.register_forward_hook(lambda module, _, y: positions.__setitem__(module, y[0, 0].numel()))
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    model(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    for number, (module, count) in enumerate(positions.items()):
        weight = next(module.parameters())
        m, q = len(weight), weight[0].numel() + 1
        n = batch * count
        passes = (2 if number == 0 else 3) * n * q * m
        looked_at = n if count == 1 else min(n, 1.5 * max(256, 2 * q))
        factors_in, factors_out = looked_at * q**2, looked_at * m**2
        inverse_in, inverse_out = q**3 / 2 / INTERVAL, m**3 / 2 / INTERVAL
        dense, dense_in = q * m * (q + m), q * q * m
        product, product_in = n * (q**2 + m**2 + q * m), n * (q**2 + q * m)
        if count > 1:
            product, product_in = dense, dense_in
        total["SGD"] += passes
        total["kfac"] += passes + factors_in + factors_out + inverse_in + inverse_out + min(product, dense)
        total[DENSE] += passes + factors_in + factors_out + inverse_in + inverse_out + dense
        total["kronecker, units (one-sided)"] += passes + factors_in + inverse_in + min(product_in, dense_in)
    return {key: value / total["SGD"] for key, value in total.items()}


if __name__ == "__main__":
    main()
