"""Records as TensorBoard event files."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

from torchgeom_optim._optional import optional_import

__all__ = ["TensorBoardLog"]


class TensorBoardLog:
    """Writes what a history passes on to TensorBoard; needs the tensorboard library.

    ``history.subscribe(TensorBoardLog("runs/first"))``, then ``tensorboard --logdir runs``. Every number becomes a
    scalar ``diagnostics/<metric>`` or ``diagnostics/<metric>/<layer>``; TensorBoard groups by what stands before the
    last slash. Numbers that are not finite are written too: TensorBoard marks their steps.

    Args:
        folder: where the event file goes, a folder of its own for each run; made if it does not exist. Or a
            ``torch.utils.tensorboard.SummaryWriter`` that exists, which then stays the caller's to close.
        prefix: what stands in front of every name.

    Raises:
        ImportError: tensorboard is not installed.
        TypeError: ``folder`` is neither a path nor a writer.
    """

    def __init__(self, folder: str | os.PathLike[str] | Any, *, prefix: str = "diagnostics/") -> None:
        self.prefix = prefix
        self._owned = isinstance(folder, str | os.PathLike)
        if self._owned:
            optional_import("tensorboard", "TensorBoardLog")
            from torch.utils.tensorboard import SummaryWriter  # slow, and fails without tensorboard

            self.writer: Any = SummaryWriter(os.fspath(folder))
        elif hasattr(folder, "add_scalar"):
            self.writer = folder
        else:
            raise TypeError(f"folder={folder!r}: must be a path or a SummaryWriter; 'runs/first' is a common start.")

    def __call__(self, numbers: dict[str, float], step: int) -> None:
        """Write the numbers of one step and flush them, so that a killed run keeps them.

        Args:
            numbers: name -> value.
            step: training step.
        """
        for name, value in numbers.items():
            self.writer.add_scalar(self.prefix + name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Close the event file, if it is this object's own."""
        if self._owned:
            self.writer.close()

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
