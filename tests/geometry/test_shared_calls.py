"""Tables that are looked up once for all samples: covered by their rule where every sample adds the same rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import oracles
from torchgeom_optim.geometry.gram import per_sample_gram
from torchgeom_optim.geometry.gram_recorder import GramRecorder

NUM_TOKENS, LENGTH, WIDTH = 7, 4, 5


class Positions(nn.Module):
    """Tokens and positions, put together in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.tokens, self.kinds = nn.Embedding(NUM_TOKENS, WIDTH), nn.Embedding(2, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.drop = nn.Dropout(0.3 if way == "dropout" else 0.0)
        self.head = nn.Linear(WIDTH, 3)
        self.way = way
        if way == "frozen tokens":
            self.tokens.weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])
        x, way = self.tokens(tokens), self.way
        if way in ("added", "dropout", "frozen tokens"):
            x = x + self.positions(places)
        elif way == "one row":
            x = x + self.positions(places[None])
        elif way == "first":
            x = self.positions(places) + x
        elif way == "third":
            x = x + self.kinds(tokens % 2)
            x += self.positions(places)
        elif way == "reversed too":
            p = self.positions(places)
            x = torch.stack([x + p, self.tokens(tokens.flip(1)) + p], 1).flatten(1, 2)
        elif way == "halved":
            x = torch.add(x, self.positions(places), alpha=0.5)
        elif way == "subtracted":
            x = x - self.positions(places)
        elif way == "after an activation":
            x = torch.tanh(x) + self.positions(places)
        elif way == "used again":
            p = self.positions(places)
            x = (x + p) * p.square().mean()
        elif way == "twice in a row":
            p = self.positions(places)
            x = (x + p) + p
        elif way == "one for all":
            x = x + self.positions(places).mean(0)
        return self.head(torch.tanh(self.drop(x))).mean(1)


BY_RULE = ("added", "one row", "first", "third", "reversed too", "twice in a row")
OTHERWISE = ("halved", "subtracted", "after an activation", "used again", "one for all", "frozen tokens")


def problem(way: str, num_samples: int) -> tuple[Positions, Tensor, Tensor]:
    torch.manual_seed(1)
    return Positions(way).double(), torch.randint(NUM_TOKENS, (num_samples, LENGTH)), torch.randint(3, (num_samples,))


def assert_are_products_of(grams: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    assert grams.keys() == gradients.keys()
    for name, rows in gradients.items():
        torch.testing.assert_close(grams[name], rows.flatten(1) @ rows.flatten(1).T, **oracles.tolerance(condition=100))


@pytest.mark.parametrize("num_samples", [1, 3, LENGTH])  # as many samples as positions do not deceive it
@pytest.mark.parametrize("way", [*BY_RULE, *OTHERWISE])
def test_however_positions_are_used(way: str, num_samples: int):
    model, tokens, targets = problem(way, num_samples)
    result = per_sample_gram(model, nn.CrossEntropyLoss(), tokens, targets, per_parameter=True)
    assert_are_products_of(result.parameters, oracles.per_sample_gradients(model, F.cross_entropy, tokens, targets))
    assert result.routes["positions.weight"] == ("rule" if way in BY_RULE else "vmap")


@pytest.mark.parametrize("way", [*BY_RULE, "dropout"])
def test_seen_in_the_pass_of_a_loop(way: str):
    """Without a loss function: nothing has to be formed sample by sample, and dropout's masks are those of the pass."""
    model, tokens, targets = problem(way, 3)
    torch.manual_seed(2)
    with GramRecorder(model, reduction="mean", per_parameter=True) as recorder:
        F.cross_entropy(model(tokens), targets).backward()
        result = recorder.result()
        torch.manual_seed(2)
        losses = F.cross_entropy(model(tokens), targets, reduction="none")
    used = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    rows = [torch.autograd.grad(loss, [p for _, p in used], retain_graph=True) for loss in losses]
    expected = {name: torch.stack([row[k] for row in rows]) for k, (name, _) in enumerate(used)}
    assert_are_products_of({name: result.parameters[name] for name in expected}, expected)
    assert {result.routes[name] for name in expected} == {"rule"}


def test_in_one_pass_after_the_other():
    model, tokens, targets = problem("added", 3)
    expected = per_sample_gram(model, nn.CrossEntropyLoss(), tokens, targets).weights
    with GramRecorder(model, reduction="mean") as recorder:
        for _ in range(2):
            loss = F.cross_entropy(model(tokens), targets)
            loss.backward()
            torch.testing.assert_close(recorder.result(loss=loss).weights, expected, **oracles.tolerance(condition=100))
        loss = F.cross_entropy(model(tokens), targets)
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="two backward passes"):
            recorder.result()
