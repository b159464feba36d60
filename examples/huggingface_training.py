"""A small GPT-2, built from a configuration, trained by the Hugging Face Trainer with WhiteningSGD and Diagnostics.

    python -m examples.huggingface_training

The text is that of Python's own documentation strings; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from examples.datasets import documentation_text, random_windows
from torchgeom_optim import WhiteningSGD
from torchgeom_optim.diagnostics import Diagnostics, huggingface_callback


class Windows(Dataset[dict[str, Tensor]]):
    """Pieces of a text, as the Trainer wants them."""

    def __init__(self, count: int, context: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens, _ = random_windows(documentation_text(), count, context, generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[number], "labels": self.tokens[number]}


def main(argv: Sequence[str] | None = None) -> Diagnostics:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_head=4,
        n_embd=64,
        n_positions=64,
        vocab_size=128,
        bos_token_id=0,
        eos_token_id=0,
        # With dropout, Diagnostics would need each sample's own masks, which GPT-2's positions do not tell.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    optimizer = WhiteningSGD(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.steps)
    diagnostics = Diagnostics(model, every=20)  # the model returns its loss: no criterion is needed
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=16,
                max_grad_norm=0.0,  # steps are bounded by WhiteningSGD itself
                logging_steps=20,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
            ),
            train_dataset=Windows(2000, context=48),
            optimizers=(optimizer, scheduler),
            callbacks=[huggingface_callback(diagnostics)],
        )
        trainer.model_accepts_loss_kwargs = False  # the model averages over its own batch
        trainer.train()
    print(diagnostics.summary())
    return diagnostics


if __name__ == "__main__":
    main()
