"""WhiteningSGD and Diagnostics in a Lightning training: one line each.

python -m examples.lightning_training
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.datasets import load_dataset
from torchgeom_optim import WhiteningSGD
from torchgeom_optim.diagnostics import Diagnostics, lightning_callback
from torchgeom_optim.models import mlp_thin


class Classifier(pl.LightningModule):
    """The network and the criterion are modules of their own, so that Diagnostics can see both."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp_thin(in_features=64)
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss: Tensor = self.criterion(self.network(inputs), targets)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = WhiteningSGD(self)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(argv: Sequence[str] | None = None) -> Diagnostics:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(argv)
    data = load_dataset("digits")
    loader = DataLoader(TensorDataset(data.train_inputs, data.train_targets), batch_size=64, shuffle=True)
    module = Classifier()
    diagnostics = Diagnostics(module.network, module.criterion, every=10)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            callbacks=[lightning_callback(diagnostics)],
            logger=CSVLogger(folder),  # or any logger: the records of diagnostics go there too
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
    print(diagnostics.summary())
    return diagnostics


if __name__ == "__main__":
    main()
