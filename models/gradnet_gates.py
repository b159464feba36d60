r"""A piecewise linear network and a companion that goes through the very same gates.

Where the only bends of a network are ReLUs and max poolings it is, for a given input, a product of its layers and of
gates: which units are open, which pixel of a window is the largest. :class:`GateProgram` evaluates the network once and
keeps those choices (the record); any number of companions can then be carried through them: other weights in the same
gates (:mod:`torchgeom_optim.models.gated`), or the derivative in a direction of the weights
(:mod:`torchgeom_optim.models.tangent`). A companion costs no forward pass of the network if the record is kept.

The network's graph is read by ``torch.fx``. What bends and is no such gate is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.conv import _ConvNd

from torchgeom_optim.geometry.private_evaluation import private_evaluation
from torchgeom_optim.models.gradnet_steps import (
    SUMS,
    Layer,
    Record,
    UnsupportedBaseError,
    applied,
    channels_last,
    nodes_of,
    normalized,
    own_weights,
    read_steps,
    run_step,
)

__all__ = ["Affine", "GateProgram"]

# (layer, input of the base or None, input of the companion or None where that is zero) -> output of the companion
Affine = Callable[[Layer, Tensor | None, Tensor | None], Tensor]


class GateProgram:
    """The steps of a piecewise linear network.

    Args:
        model: the network: linear layers, convolutions, batch norms (with running statistics), ReLUs, leaky ReLUs, max
            pooling, and between them what is linear: sums, means, averages, reshapes, concatenation, dropout (off). It
            is evaluated as in evaluation mode and never changed; its weights are read anew in every pass.

    Attributes:
        layers: the calls of layers with weights, in their order.

    Raises:
        UnsupportedBaseError: the graph cannot be read, or has something else in it.

    Example:
        >>> program = GateProgram(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> record = program.record((torch.ones(5, 3),))
        >>> sorted(record), [layer.name for layer in program.layers]
        (['_1', 'logits', 'x'], ['0', '2'])
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            with private_evaluation(model):
                graph = fx.Tracer().trace(model)
        except Exception as error:
            raise UnsupportedBaseError(
                f"{type(model).__name__} cannot be traced by torch.fx ({type(error).__name__}: {error}): its forward "
                "must not branch on values. Use method='linearised' or 'paper', which take any network."
            ) from error
        self._model = model
        self._checked = False
        self._placeholder, self._steps, self._output = read_steps(graph, model)
        self.layers = [step.layer for step in self._steps if step.layer is not None]
        if not self.layers:
            raise UnsupportedBaseError(
                f"{type(model).__name__} has no layer with weights: at least one linear layer or convolution is needed."
            )

    def __reduce__(self) -> tuple[type[GateProgram], tuple[nn.Module]]:
        return GateProgram, (self._model,)  # a copy is that of the copied network

    def record(self, args: tuple[Any, ...], *, inputs: bool = False) -> Record:
        """Evaluate the network and keep its choices.

        Args:
            args: the one input of the network, [N, ...].
            inputs: keep what each layer is given, too, which :meth:`carry` hands to ``affine``.

        Returns:
            "x"; "logits" [N, C]; the gates by the names of their steps; the inputs as "<step>.input".

        Raises:
            UnsupportedBaseError: the steps do not give the network's outputs, which the first call looks at.
        """
        self._check(args)
        x = channels_last(*args)
        record: Record = {"x": x}
        values: dict[str, Any] = {self._placeholder: x}
        with torch.no_grad():
            for step in self._steps:
                given, kwargs = map_arg((step.args, step.kwargs), lambda node: values[node.name])
                if step.layer is None:
                    values[step.node] = run_step(step, given, kwargs, record, {})
                    continue
                module = step.layer.module
                a = normalized(module, given[0])
                if inputs and step.layer is not self.layers[0]:
                    record[f"{step.node}.input"] = a
                values[step.node] = applied(module, a, *own_weights(module))
        record["logits"] = values[self._output]
        return record

    def differentiated(self, args: tuple[Any, ...]) -> tuple[Tensor, list[tuple[Layer, Tensor, Tensor]]]:
        """Evaluate the network with a graph that leads from the logits to what the layers returned, and no further.

        Args:
            args: the one input of the network, [N, ...].

        Returns:
            Logits [N, C]; each layer with its (normalized) input and its output.

        Raises:
            UnsupportedBaseError: as :meth:`record`.
        """
        self._check(args)
        (x,) = args
        values: dict[str, Any] = {self._placeholder: channels_last(x)}
        calls: list[tuple[Layer, Tensor, Tensor]] = []
        with torch.enable_grad():
            for step in self._steps:
                given, kwargs = map_arg((step.args, step.kwargs), lambda node: values[node.name])
                if step.layer is None:
                    values[step.node] = run_step(step, given, kwargs, {}, {})
                    continue
                module = step.layer.module
                a = normalized(module, given[0])
                z = applied(module, a, *own_weights(module))
                values[step.node] = z if z.requires_grad else z.requires_grad_()
                calls.append((step.layer, a, values[step.node]))
        return values[self._output], calls

    def carry(self, record: Mapping[str, Tensor], affine: Affine, *, tangent: bool) -> Tensor:
        """Carry a companion through the record's gates, differentiably.

        Args:
            record: from :meth:`record`.
            affine: the companion's layers: ``affine(layer, a, b)`` with a what the base's layer was given (None if the
                record has it not) and b what the companion's is given, None where that is still zero.
            tangent: the companion starts as zero and is linear, as a derivative is; else it starts as the input.

        Returns:
            The companion's output [N, C].
        """
        values: dict[str, Any] = {self._placeholder: channels_last(record["x"])}
        zero = {self._placeholder} if tangent else set()  # steps with the base's value here, whose derivative is zero

        def of(node: fx.Node) -> Any:
            value = values[node.name]
            return torch.zeros_like(value) if node.name in zero and isinstance(value, Tensor) else value

        for step in self._steps:
            if step.layer is not None:
                source, module = step.args[0].name, step.layer.module
                value = values[source]
                if source in zero:
                    values[step.node] = affine(step.layer, normalized(module, value), None)
                else:
                    b = normalized(module, value, centred=not tangent)
                    values[step.node] = affine(step.layer, record.get(f"{step.node}.input"), b)
                continue
            still_zero = all(n.name in zero for n in nodes_of(step) if isinstance(values[n.name], Tensor))
            if tangent and still_zero:
                zero.add(step.node)
            given, kwargs = map_arg((step.args, step.kwargs), (lambda n: values[n.name]) if still_zero else of)
            if tangent and not still_zero and step.function in SUMS:
                given = tuple(x if isinstance(x, Tensor) else 0 for x in given)
                kwargs = {name: 0 if name == "other" and not isinstance(x, Tensor) else x for name, x in kwargs.items()}
            values[step.node] = run_step(step, given, kwargs, None, record)
        output: Tensor = values[self._output]
        return output

    def last_features(self) -> int:
        """How many numbers the last layer is given, per sample or per position.

        Returns:
            Its number of inputs.

        Raises:
            UnsupportedBaseError: the last layer is no linear layer or convolution.
        """
        module = self.layers[-1].module
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, _ConvNd):
            return module.in_channels
        raise UnsupportedBaseError(
            f"the last layer {self.layers[-1].name} is {type(module).__name__}: a linear layer or a convolution must "
            "come last. Use block=0, or method='linearised'."
        )

    def _check(self, args: tuple[Any, ...]) -> None:
        """Hooks, in-place changes and whatever else the graph does not show must not matter."""
        if self._checked:
            return
        self._checked = True
        few = tuple(x[:2] for x in args)
        ours = torch.nan_to_num(self.record(few)["logits"])
        with private_evaluation(self._model), torch.no_grad():
            own = torch.nan_to_num(self._model(*few))
        tolerance = min(0.1, 1e4 * torch.finfo(own.dtype).eps) * float(own.abs().max())
        if ours.shape != own.shape or not bool((ours - own).abs().max() <= tolerance):
            self._checked = False
            raise UnsupportedBaseError(
                "the network's layers, put together, do not give its outputs: a hook or an in-place change is part of "
                "what it computes. Remove it, or use method='linearised' or 'paper', which take any network."
            )
