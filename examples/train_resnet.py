"""Train torchvision's ResNet-18 on real images with WhiteningSGD, without a learning rate.

python -m examples.train_resnet                              # scikit-learn's digits, enlarged; a minute
python -m examples.train_resnet --data cifar10 --root DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18
from tqdm import tqdm

from examples.datasets import load_dataset
from torchgeom_optim import WhiteningSGD


def as_photographs(images: Tensor) -> Tensor:
    """Images of any size and number of channels as 3 x 32 x 32, which is what ResNet takes here."""
    return F.interpolate(images, (32, 32), mode="bilinear").expand(-1, 3, -1, -1)


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist", "fashion-mnist", "cifar10"), default="digits")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, help="train on the first so many only")
    options = parser.parse_args(argv)
    data = load_dataset(options.data, options.root, train_limit=options.images)
    model = resnet18(num_classes=data.num_classes)

    # was: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = WhiteningSGD(model)
    num_steps = options.epochs * -(-len(data.train_inputs) // 64)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)

    losses = []
    with tqdm(total=num_steps, unit="step") as bar:
        for _ in range(options.epochs):
            for batch in torch.randperm(len(data.train_inputs)).split(64):
                optimizer.zero_grad()
                outputs = model(as_photographs(data.train_inputs[batch]))
                loss = nn.functional.cross_entropy(outputs, data.train_targets[batch])
                loss.backward()
                optimizer.step()
                scheduler.step()
                losses.append(loss.item())
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                bar.update()

    model.eval()
    with torch.no_grad():
        answers = torch.cat([model(as_photographs(part)).argmax(1) for part in data.test_inputs.split(200)])
    accuracy = (answers == data.test_targets).float().mean().item()
    print(f"accuracy on {len(answers)} test images: {accuracy:.1%}")
    return losses


if __name__ == "__main__":
    main()
