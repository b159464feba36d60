"""Diagnostics in a Hugging Face ``Trainer``."""

from __future__ import annotations

from functools import cache
from typing import Any

from torchgeom_optim._optional import optional_import
from torchgeom_optim.diagnostics.hook import Diagnostics

__all__ = ["huggingface_callback"]


def huggingface_callback(diagnostics: Diagnostics, *, prefix: str = "diagnostics/") -> Any:
    """A ``transformers.TrainerCallback`` that attaches diagnostics while the trainer trains, and closes them after it.

    ``Trainer(model, ..., callbacks=[huggingface_callback(Diagnostics(model, every=100))])``: the models of transformers
    return their loss, so that Diagnostics needs no criterion. The records also go into ``trainer.state.log_history``,
    and so into ``trainer_state.json``; for other trackers ``diagnostics.history.subscribe(...)``. The trainer tells its
    callbacks nothing of exceptions: after one, ``diagnostics.close()`` is yours to call.

    Newer trainers give the model the number of tokens of all accumulated batches, ``num_items_in_batch``. It belongs to
    no sample: measurements go without it, in passes of their own, and their loss is the mean over the micro-batch. With
    ``trainer.model_accepts_loss_kwargs = False`` the trainer does so too, and the Gram matrix costs no further pass.

    Args:
        diagnostics: not attached yet; if it is, it stays as it is and is left to whoever attached it.
        prefix: what stands in front of the names in the trainer's log.

    Returns:
        The callback.

    Raises:
        TypeError: ``diagnostics`` is something else.
        ImportError: transformers is not installed.
    """
    if not isinstance(diagnostics, Diagnostics):
        raise TypeError(f"diagnostics is a {type(diagnostics).__name__}: a Diagnostics is needed, not yet attached.")
    return _callback_class()(diagnostics, prefix)


@cache
def _callback_class() -> type:
    """The class, whose base is only there once transformers is imported."""
    base = optional_import("transformers", "huggingface_callback").TrainerCallback

    class DiagnosticsCallback(base):  # type: ignore[misc, valid-type]  # known at run time only
        def __init__(self, diagnostics: Diagnostics, prefix: str) -> None:
            self.diagnostics = diagnostics
            self._prefix = prefix
            self._undo: list[Any] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            if self.diagnostics.is_attached:
                return
            while hasattr(optimizer, "optimizer"):  # accelerate's wrapper has no hooks
                optimizer = optimizer.optimizer
            self.diagnostics.attach(optimizer)

            def to_log(numbers: dict[str, float], step: int) -> None:
                state.log_history.append({**{self._prefix + name: v for name, v in numbers.items()}, "step": step})

            self._undo += [self.diagnostics.close, self.diagnostics.history.subscribe(to_log)]

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            while self._undo:
                self._undo.pop(0)()

    return DiagnosticsCallback
