"""The callback in a real Lightning trainer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from torchgeom_optim.diagnostics import Diagnostics
from torchgeom_optim.diagnostics.lightning import lightning_callback

pytest.importorskip("lightning", reason="lightning is not installed")
pytestmark = pytest.mark.slow  # its import takes ten seconds


def module(fail_at: int = -1):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(3, 2)
            self.criterion = nn.CrossEntropyLoss()
            self.other = nn.Parameter(torch.zeros(1))

        def training_step(self, batch, number):
            if number == fail_at:
                raise ZeroDivisionError
            return self.criterion(self.network(batch[0]), batch[1]) + 0 * self.other.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    return Module()


def test_two_steps_are_those_that_the_optimizer_takes():
    """Lightning makes the passes inside ``optimizer.step``, and clips there."""
    import lightning.pytorch as pl

    model = module()
    seen = []

    class Seen(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):  # after the step before
            p = model.network
            if p.weight.grad is not None:
                seen.append((flat(p.weight, p.bias), flat(p.weight.grad, p.bias.grad)))

    def flat(*tensors):
        return torch.cat([t.detach().reshape(-1) for t in tensors]).clone()

    start = flat(model.network.weight, model.network.bias)
    diagnostics = Diagnostics(model.network, model.criterion, every=1, metrics="free")
    trainer(lightning_callback(diagnostics), Seen(), gradient_clip_val=0.1).fit(model, loader())
    moved = [start, *(w for w, _ in seen)]  # weights before each step
    found = diagnostics.history.column("weight_condition_number_two_step")
    assert math.isnan(found[0])
    for k in range(1, len(seen)):
        (_, g0), (_, g1), w0, w1 = seen[k - 1], seen[k], moved[k - 1], moved[k]
        expected = (g1 - g0).norm() * w0.norm() / ((w1 - w0).norm() * g0.norm())
        assert found[k] == pytest.approx(float(expected), rel=1e-3)
        assert diagnostics.history[k].values["gradient_norm"] == pytest.approx(float(g1.norm()), rel=1e-4)
    assert len(seen) >= 4


def loader():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 3, generator=generator), torch.randint(2, (24,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)


def trainer(*callbacks, logger=False, **options):
    import lightning.pytorch as pl

    return pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_records_come_and_reach_the_logger():
    from lightning.pytorch.loggers.logger import DummyLogger

    seen = []

    class Logger(DummyLogger):
        def log_metrics(self, metrics, step=None):
            seen.append((step, metrics))

    model = module()
    diagnostics = Diagnostics(model.network, model.criterion, every=2)
    plain, watched = module(), model
    trainer().fit(plain, loader())
    trainer(lightning_callback(diagnostics), logger=Logger()).fit(watched, loader())
    assert [record.step for record in diagnostics.history] == [0, 2, 4]
    assert all(math.isfinite(value) for value in diagnostics.history[-1].values.values())
    assert diagnostics.history[0].learning_rate == 0.1
    logged = [(step, metrics) for step, metrics in seen if any(name.startswith("diagnostics/") for name in metrics)]
    assert [step for step, _ in logged] == [0, 2, 4]
    assert logged[0][1]["diagnostics/loss"] == diagnostics.history[0].loss
    assert not diagnostics.is_attached
    assert hooks(watched) == 0
    assert torch.equal(plain.network.weight, watched.network.weight)  # the training did not feel it


def test_an_exception_detaches():
    model = module(fail_at=3)
    diagnostics = Diagnostics(model.network, model.criterion, every=1)
    with pytest.raises(ZeroDivisionError):
        trainer(lightning_callback(diagnostics)).fit(model, loader())
    assert not diagnostics.is_attached
    assert hooks(model) == 0
    assert [record.step for record in diagnostics.history] == [0, 1, 2]


def test_what_is_attached_stays():
    model = module()
    with Diagnostics(model.network, model.criterion, every=3).attach() as diagnostics:
        trainer(lightning_callback(diagnostics)).fit(model, loader())
        assert diagnostics.is_attached
        assert diagnostics.history[0].learning_rate is None


def test_only_diagnostics():
    with pytest.raises(TypeError, match="diagnostics is a Linear"):
        lightning_callback(nn.Linear(1, 1))
