"""The example of the gradient kernel runs, and its kernel machines learn."""

from __future__ import annotations

import pytest


def test_kernel_machines_and_picture(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the example needs the extra 'demo'")
    pytest.importorskip("matplotlib", reason="the picture needs the extra 'plots'")
    from examples import gradient_kernel

    path = tmp_path / "graph.png"
    gradient_kernel.main(["--samples", "100", "--picture", str(path)])
    accuracy = {line[:36].strip(): float(line[36:]) for line in capsys.readouterr().out.splitlines()[:4]}
    assert accuracy["support vectors on its gradients"] > 0.8
    assert accuracy["ridge regression on its gradients"] > 0.8
    assert path.read_bytes().startswith(b"\x89PNG")
