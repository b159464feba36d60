"""Kernel machines on a network's gradients, and its gradient graph class by class.

A small convolutional network is trained for a moment on half of the images and left alone from then on. With the kernel
of its gradients a support vector machine and a ridge regression of scikit-learn learn from other images; the picture
shows, for every class, which of its weights have gradients that go together (Fig. 1 of "GradNet")::

    python -m examples.gradient_kernel                            # scikit-learn's digits, half a minute
    python -m examples.gradient_kernel --data mnist --root DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional as F

from examples.datasets import load_dataset
from torchgeom_optim.models import GradientKernel, cnn_small, draw_graphs, gradient_graphs_by_class


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare, draw.

    Args:
        argv: arguments; those of the command line by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist", "fashion-mnist"), default="digits")
    parser.add_argument("--root", type=Path, help="folder with the data sets (default: $TORCHGEOM_DATA)")
    parser.add_argument("--samples", type=int, default=500, help="to learn from, and to be scored on (default: 500)")
    parser.add_argument("--picture", type=Path, help="to write (default: output/gradient_graph_DATA.png)")
    options = parser.parse_args(argv)

    data = load_dataset(options.data, options.root)
    n = options.samples
    x, y = data.train_inputs[-n:], data.train_targets[-n:]
    test, labels = data.test_inputs[:n], data.test_targets[:n]
    half = len(data.train_inputs) // 2
    base = trained(data.train_inputs[:half], data.train_targets[:half])
    with torch.no_grad():
        right = {"the network itself": base(test).argmax(1) == labels}

    kernel = GradientKernel(base, x, metric="diagonal")
    between, to_new = kernel(x), kernel(test, x)  # [N, N] and [M, N]: all that scikit-learn needs
    scale = between.diagonal().mean()
    between, to_new = between / scale, to_new / scale
    machine = SVC(kernel="precomputed", C=10.0).fit(between, y)
    right["support vectors on its gradients"] = torch.from_numpy(machine.predict(to_new)) == labels
    ridge = KernelRidge(kernel="precomputed", alpha=0.1).fit(between, F.one_hot(y, data.num_classes))
    right["ridge regression on its gradients"] = torch.from_numpy(ridge.predict(to_new)).argmax(1) == labels
    pixels = SVC().fit(x.flatten(1), y)
    right["support vectors on the pixels"] = torch.from_numpy(pixels.predict(test.flatten(1))) == labels
    for name, hits in right.items():
        print(f"{name:36}{hits.float().mean():.4f}")

    graphs = gradient_graphs_by_class(base, test, labels, edges=200)
    path = options.picture or Path("output") / f"gradient_graph_{options.data}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_graphs(graphs, title=f"{data.title}: the 200 strongest edges between neighbouring layers").savefig(
        path, dpi=120
    )
    print(f"{path} written")


def trained(x: Tensor, y: Tensor) -> nn.Module:
    """A network after 60 steps of Adam on batches of 50.

    Args:
        x: images [N, 1, H, H].
        y: classes [N].

    Returns:
        The network, in evaluation mode.
    """
    torch.manual_seed(0)
    network = cnn_small(image_size=x.shape[-1])
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for step in range(60):
        batch = torch.arange(50 * step, 50 * step + 50) % len(x)
        optimizer.zero_grad()
        F.cross_entropy(network(x[batch]), y[batch]).backward()
        optimizer.step()
    return network.eval()


if __name__ == "__main__":
    main()
