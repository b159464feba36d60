"""A call that leaves no trace in the user's model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchgeom_optim.geometry.capture import Capture
from torchgeom_optim.geometry.pure_call import pure_call, without_trace


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()


def test_parameters_are_replaced_and_buffers_spared():
    model, x = network(), torch.randn(6, 4, dtype=torch.float64)
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected = network()
    expected.load_state_dict({**model.state_dict(), **other})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    actual = pure_call(model, other, (x,))
    torch.manual_seed(1)
    torch.testing.assert_close(actual, expected(x), rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_parameters_left_out_are_constants():
    model, x = network().eval(), torch.randn(6, 4, dtype=torch.float64)
    weight = model[0].weight.detach().clone().requires_grad_()
    pure_call(model, {"0.weight": weight}, (x,)).sum().backward()
    assert weight.grad is not None
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(pure_call(model, {}, (x,)), model(x), rtol=0, atol=0)


def test_buffers_may_be_given():
    model, x = network().eval(), torch.randn(6, 4, dtype=torch.float64)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    buffers["1.running_mean"] += 1
    shifted = pure_call(model, {}, (x,), buffers)
    assert not torch.equal(shifted, model(x))
    model[1].running_mean += 1
    torch.testing.assert_close(shifted, model(x), rtol=0, atol=0)


def test_random_draws_and_captures_do_not_notice():
    model, x = network(), torch.randn(6, 4, dtype=torch.float64)
    seen: dict[str, int] = {"mine": 0, "theirs": 0}

    def watch(who: str) -> Capture:
        def on_call(module: nn.Module, x: Tensor, y: Tensor) -> None:
            seen[who] += 1

        return Capture([model[0]], on_call)

    mine, theirs = watch("mine"), watch("theirs")
    state = torch.random.get_rng_state()
    with without_trace(model, mine):
        model(x)
    assert seen == {"mine": 1, "theirs": 0}
    assert torch.equal(torch.random.get_rng_state(), state)
    model(x)
    assert seen == {"mine": 2, "theirs": 1}
    assert not torch.equal(torch.random.get_rng_state(), state)
    mine.close()
    theirs.close()
