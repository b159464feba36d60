"""Diagnostics in a Lightning ``Trainer``."""

from __future__ import annotations

from functools import cache
from typing import Any

from torchgeom_optim._optional import optional_import
from torchgeom_optim.diagnostics.hook import Diagnostics

__all__ = ["lightning_callback"]


def lightning_callback(diagnostics: Diagnostics, *, log: bool = True, prefix: str = "diagnostics/") -> Any:
    """A ``lightning.pytorch.Callback`` that attaches diagnostics while the trainer fits, and closes them after it.

    ``Trainer(callbacks=[lightning_callback(Diagnostics(module.network, module.criterion, every=100))])``: the
    diagnostics look at the network and the criterion that ``training_step`` calls, both modules.

    Args:
        diagnostics: not attached yet; if it is, it stays as it is and is left to whoever attached it.
        log: pass each record on to the trainer's loggers.
        prefix: what stands in front of the names there.

    Returns:
        The callback. It attaches to the first optimizer that trains one of the parameters.

    Raises:
        TypeError: ``diagnostics`` is something else.
        ImportError: lightning is not installed.
    """
    if not isinstance(diagnostics, Diagnostics):
        raise TypeError(f"diagnostics is a {type(diagnostics).__name__}: a Diagnostics is needed, not yet attached.")
    return _callback_class()(diagnostics, log, prefix)


@cache
def _callback_class() -> type:
    """The class, whose base is only there once Lightning is imported."""
    base = optional_import("lightning.pytorch", "lightning_callback").Callback

    class DiagnosticsCallback(base):  # type: ignore[misc, valid-type]  # known at run time only
        def __init__(self, diagnostics: Diagnostics, log: bool, prefix: str) -> None:
            self.diagnostics = diagnostics
            self._log, self._prefix = log, prefix
            self._undo: list[Any] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if self.diagnostics.is_attached:
                return
            _attach_to_first(self.diagnostics, trainer.optimizers)
            self._undo.append(self.diagnostics.close)
            if self._log and trainer.loggers:

                def to_loggers(numbers: dict[str, float], step: int) -> None:
                    named = {self._prefix + name: value for name, value in numbers.items()}
                    for logger in trainer.loggers:
                        logger.log_metrics(named, step=step)

                self._undo.append(self.diagnostics.history.subscribe(to_loggers))

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self._detach()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._detach()

        def _detach(self) -> None:
            """Close first: a record that was waiting for it still reaches the loggers."""
            while self._undo:
                self._undo.pop(0)()

    return DiagnosticsCallback


def _attach_to_first(diagnostics: Diagnostics, optimizers: list[Any]) -> None:
    """Attach to the first optimizer that has parameters of the model."""
    for optimizer in optimizers[:-1]:
        try:
            diagnostics.attach(optimizer)
        except ValueError:
            continue
        return
    diagnostics.attach(optimizers[-1])
