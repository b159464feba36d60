"""Do the normalised gradients of an RBM classify better than its hidden units? Table 1 of "GradNet", on MNIST.

Linear models (softmax, cross-entropy) on the hidden probabilities q(v) of a Bernoulli RBM, and on the normalised
gradients of its log-likelihood (``RBMGradientFeatures``), for 16 and 64 hidden units and for two machines: one after
five epochs on 1,000 images ("some initialization"), one trained on the first half of the training set. Beside them a
linear model on the pixels. The paper does not say on which images the linear models are trained, nor how: here on all
60,000, by Adam with a falling rate, all alike, batches shifted by up to one pixel in each direction (the augmentation
of its Algorithm 1; ``--shift 0`` for none). MNIST's grey values count as probabilities. One seed by default.

Paper: 16 hidden units .6834 -> .9675 and .8997 -> .9734; 64 hidden units .872 -> .9822 and .9134 -> .9876.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import benchmark_parser, start, write_result
from examples.datasets import DATASETS, Dataset, load_dataset, stand_in
from torchgeom_optim.models.rbm import BernoulliRBM, RBMGradientFeatures

NAME = "do_rbm_gradients_classify_better"
PAPER = {(16, "initial"): (0.6834, 0.9675), (16, "trained"): (0.8997, 0.9734), (64, "initial"): (0.872, 0.9822),
         (64, "trained"): (0.9134, 0.9876)}  # fmt: skip
Logits = Callable[[Tensor], Tensor]


def main(argv: list[str] | None = None) -> None:
    """Train every machine and every linear model, writing the result after each."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=10, help="of every linear model (default: 10)")
    parser.add_argument("--shift", type=int, default=1, help="largest shift of a batch, in pixels (default: 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    options = start(parser, argv)
    if options.smoke:
        options.epochs, sizes = 1, (4,)
        data = stand_in("mnist")
    else:
        sizes = (16, 64)
        data = load_dataset("mnist", options.root)
    images = _probabilities(data.train_inputs), _probabilities(data.test_inputs)
    rows: list[dict[str, Any]] = []

    def record(row: dict[str, Any], begun: float) -> None:
        rows.append({**row, "cpu seconds": time.process_time() - begun})
        write_result(
            NAME,
            {"data": data.title, "epochs": options.epochs, "shift": options.shift, "rows": rows},
            options,
            seeds=options.seeds,
            rows=rows,
        )

    for seed in options.seeds:
        begun = time.process_time()
        pixels = nn.Linear(images[0].shape[1], 10)
        accuracy = _trained(pixels, list(pixels.parameters()), images, data, options, seed, lr=1e-3)
        record({"seed": seed, "features": "pixels", "accuracy": accuracy}, begun)
        for num_hidden in sizes:
            for state in ("initial", "trained"):
                begun = time.process_time()
                rbm, generator = _machine(images[0], num_hidden, state, seed)
                common = {"seed": seed, "hidden": num_hidden, "machine": state}
                base, gradient = PAPER.get((num_hidden, state), (0.0, 0.0))
                accuracy = _on_hidden(rbm, images, data, options, seed)
                record({**common, "features": "hidden units", "accuracy": accuracy, "paper": base}, begun)
                begun = time.process_time()
                half = images[0][: len(images[0]) // 2]
                features = RBMGradientFeatures(rbm, half, damping=0.1, generator=generator)
                accuracy = _on_gradients(features, images, data, options, seed)
                record({**common, "features": "gradients", "accuracy": accuracy, "paper": gradient}, begun)


def _probabilities(images: Tensor) -> Tensor:
    """Normalised images [N, 1, 28, 28] as [N, 784] in [0, 1] again."""
    kind = DATASETS["mnist"]
    return (images * kind.std[0] + kind.mean[0]).clamp_(0.0, 1.0).flatten(1)


def _machine(images: Tensor, num_hidden: int, state: str, seed: int) -> tuple[BernoulliRBM, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    seen = images[:1000] if state == "initial" else images[: len(images) // 2]
    rbm = BernoulliRBM(images.shape[1], num_hidden, mean=seen.mean(0), generator=generator)
    epochs, lr = (5, 0.1) if state == "initial" else (10, 0.3)
    return rbm.fit(seen, epochs=epochs, lr=lr, batch_size=50, generator=generator), generator


def _on_hidden(rbm: BernoulliRBM, images: tuple[Tensor, Tensor], data: Dataset, options: Any, seed: int) -> float:
    with torch.no_grad():
        hidden = rbm(images[0])
    mean, deviation = hidden.mean(0), hidden.std(0).clamp_(min=1e-3)
    head = nn.Linear(hidden.shape[1], 10)

    def logits(visible: Tensor) -> Tensor:
        with torch.no_grad():
            q = (rbm(visible) - mean) / deviation
        return head(q)

    return _trained(logits, list(head.parameters()), images, data, options, seed, lr=1e-2)


def _on_gradients(
    features: RBMGradientFeatures, images: tuple[Tensor, Tensor], data: Dataset, options: Any, seed: int
) -> float:
    # Of length about 10, whatever the number of hidden units, so that one learning rate suits all.
    scale = 10 / features(images[0][:200]).norm(dim=1).mean()
    weight = torch.zeros(10, features.num_features, requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    return _trained(
        lambda v: features.linear(v, weight) * scale + bias, [weight, bias], images, data, options, seed, lr=5e-3
    )


def _trained(
    logits: Logits,
    parameters: list[Any],
    images: tuple[Tensor, Tensor],
    data: Dataset,
    options: Any,
    seed: int,
    *,
    lr: float,
) -> float:
    """Test accuracy after training by Adam, its rate falling linearly to zero."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    steps = options.epochs * -(-len(images[0]) // 100)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(options.epochs):
        for part in torch.split(torch.randperm(len(images[0]), generator=generator), 100):
            down, right = torch.randint(-options.shift, options.shift + 1, (2,), generator=generator).tolist()
            visible = images[0][part].view(-1, 28, 28).roll((down, right), (1, 2)).flatten(1)
            loss = F.cross_entropy(logits(visible), data.train_targets[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        found = torch.cat([logits(part).argmax(1) for part in torch.split(images[1], 1000)])
    return float((found == data.test_targets).double().mean())


if __name__ == "__main__":
    main()
