r"""Which parameters were used by known layers alone, and which in other ways too.

A rule's factors are a parameter's whole per-sample gradient only if every use of the parameter in the pass was a call
of a layer with a rule, and axis 0 of that layer's input was the samples. Both are checked, neither is assumed:

- *Other uses* (``F.linear(x, layer.weight)``, attention's output layer whose forward is never called, a weight that
  is computed from other parameters) show in autograd's graph. :meth:`LayerCalls.resolve` walks it from the loss down
  and steps over each recorded call, from its output right to its input: a parameter that the walk still meets was
  used by something else.
- *The sample axis* (time before samples, positions looked up once per batch, samples and time flattened together) is
  found by running the model on a batch of another size: the axis that changes is the samples. A call that does not
  change is shared by them; of an embedding, the samples' shares may show further on
  (:mod:`torchgeom_optim.geometry.shared_calls`).
- *The samples' order* (a model that sorts its batch and restores the order later) shows in the graph as well, as
  operations that can move rows (:mod:`torchgeom_optim.geometry.row_moves`): then no parameter counts as covered.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_map

from torchgeom_optim.geometry.capture import Capture
from torchgeom_optim.geometry.factors import Factor
from torchgeom_optim.geometry.layers import LayerRule, factors_of_call, rule_for
from torchgeom_optim.geometry.private_evaluation import attributes_kept, with_weights
from torchgeom_optim.geometry.pure_call import without_trace
from torchgeom_optim.geometry.row_moves import could_move_rows, moves_rows
from torchgeom_optim.geometry.shared_calls import is_added_to_samples

__all__ = ["LayerCall", "LayerCalls", "ParameterUses", "watched_layers"]

OnOutputGrad = Callable[["LayerCall", Tensor], None]
_Signature = tuple[tuple[int, torch.Size], ...]

_Axis = Literal["samples", "shared", "other"]  # axis 0 of a call's input

_first_axes: weakref.WeakKeyDictionary[nn.Module, dict[_Signature, tuple[_Axis, ...]]]
_first_axes = weakref.WeakKeyDictionary()
_MAX_SIGNATURES = 64  # a model that is called with ever new shapes must not fill the memory


class LayerCall:
    """One call of a layer with a rule."""

    def __init__(self, rule: LayerRule, module: nn.Module, layer_input: Tensor, output: Tensor) -> None:
        self.module = module
        self.input_shape = layer_input.shape
        self.output_shape = output.shape
        self.output_node: Node | None = output.grad_fn
        self.input_node: Node | None = layer_input.grad_fn
        if self.input_node is None and layer_input.requires_grad:
            self.input_node = get_gradient_edge(layer_input).node
        self._output_nr = output.output_nr
        self.parameters: dict[str, str] = {}  # the layer's own name -> the model's name
        self._rule = rule
        self._input: Tensor | None = layer_input
        self._version = layer_input._version
        self._training = module.training

    @property
    def output_edge(self) -> GradientEdge:
        """Where in autograd's graph the gradient at the output arrives, whatever is done to the output in place."""
        assert self.output_node is not None
        return GradientEdge(self.output_node, self._output_nr)

    def factors(self, output_grads: Tensor, names: Iterable[str]) -> Mapping[str, Factor]:
        """What this call adds to the per-sample gradients of some of its parameters, by the layer's names for them.

        Args:
            output_grads: C gradients per sample at the call's output, shape [N, C, ...].
            names: the layer's names of the parameters.

        Returns:
            name -> factor.

        Raises:
            RuntimeError: the input has been overwritten since, or the layer's mode was switched.
        """
        layer_input = self._input
        if layer_input is None:
            raise RuntimeError(
                f"the input of a {type(self.module).__name__} is gone: it is kept until the pass is over; "
                f"ask for factors during the backward pass."
            )
        if layer_input._version != self._version or self.module.training != self._training:
            raise RuntimeError(
                f"the input of a {type(self.module).__name__} was modified in place, or its mode was switched, after "
                f"its call; both must stay until the backward pass is over: apply the in-place operation to a copy."
            )
        return factors_of_call(self._rule, self.module, layer_input, output_grads, tuple(names))

    def as_of_samples(self, num_samples: int, node: Node) -> LayerCall:
        """The same call as if every one of the samples that share it had made it, its output being that of a node."""
        other = copy.copy(self)
        other.output_node, other._output_nr = node, 0
        assert self._input is not None
        row = self._input[0] if self._input.dim() > 1 and len(self._input) == 1 else self._input
        other._input = row.expand(num_samples, *row.shape)
        return other

    @property
    def is_released(self) -> bool:
        """Whether the input is gone, the call's share having been taken."""
        return self._input is None

    def release(self) -> None:
        """Let go of the layer's input."""
        self._input = None


@dataclass(frozen=True)
class ParameterUses:
    """How a pass used the parameters.

    Args:
        calls: for each parameter that only layers with a rule used, their calls that the loss depends on.
        other: parameters that were used in other ways, perhaps besides.
        unused: parameters that the loss does not depend on.
        last: calls that gradients have to reach so that they reach all: those before which no other call lies.
    """

    calls: dict[str, list[LayerCall]]
    other: frozenset[str]
    unused: frozenset[str]
    last: tuple[LayerCall, ...]


def watched_layers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the modules that have a rule and a trainable parameter of their own."""
    return [
        module
        for module in modules
        if any(p is not None and p.requires_grad for p in module._parameters.values()) and rule_for(module)
    ]


class _WhenGradArrives:
    """What is set on a node of autograd's graph. It holds nothing that holds the node: no cycle keeps a graph alive."""

    def __init__(self, record: LayerCalls, call: LayerCall) -> None:
        self._record = weakref.ref(record)
        self._call = weakref.ref(call)

    def __call__(self, output_grad: Tensor) -> None:
        record, call = self._record(), self._call()
        if record is not None and call is not None:
            record.on_output_grad(call, output_grad)

    def before_node(self, output_grads: tuple[Tensor | None, ...]) -> None:
        if output_grads[0] is not None:
            self(output_grads[0])


class LayerCalls:
    """Records the calls of layers with a rule during one forward pass.

    Args:
        names: id of each trainable parameter, as the layers hold it during the pass, -> its name.
        on_output_grad: called with the call and the gradient at its output, as soon as that is known.
    """

    def __init__(self, names: Mapping[int, str], on_output_grad: OnOutputGrad | None = None) -> None:
        self._names = names
        self._on_output_grad = on_output_grad
        self.recording = True
        self.calls: list[LayerCall] = []
        self._num_samples = 0
        self._shared: dict[Node, LayerCall] = {}  # by the nodes of their outputs
        self._added: dict[Node, LayerCall] = {}  # by the nodes that add them to what samples have

    def forget(self) -> None:
        """Let go of all calls."""
        for calls in (self.calls, self._shared, self._added):
            calls.clear()

    def on_call(self, module: nn.Module, layer_input: Tensor, output: Tensor) -> Callable[[Tensor], None] | None:
        """To be given to a :class:`~torchgeom_optim.geometry.capture.Capture` of :func:`watched_layers`."""
        if not self.recording:
            return None
        rule = rule_for(module)
        if rule is None or not isinstance(layer_input, Tensor) or not rule.applies(module, layer_input):
            return None
        own = {name: module._parameters.get(name) for name in rule.parameters}
        if any(getattr(module, name, None) is not p for name, p in own.items()):
            return None  # computed from other parameters (parametrizations): the rule does not know how
        trainable = {name: p for name, p in own.items() if p is not None and p.requires_grad}
        if not trainable or any(id(p) not in self._names for p in trainable.values()):
            return None
        call = LayerCall(rule, module, layer_input, output)
        call.parameters = {name: self._names[id(p)] for name, p in trainable.items()}
        self.calls.append(call)
        return None if self._on_output_grad is None else _WhenGradArrives(self, call)

    def on_output_grad(self, call: LayerCall, output_grad: Tensor) -> None:
        """Pass on the gradient at a call's output."""
        if self._on_output_grad is not None:
            self._on_output_grad(call, output_grad)

    def signature(self) -> _Signature:
        """The sequence of layers and input shapes."""
        return tuple((id(call.module), call.input_shape) for call in self.calls)

    def keep_sample_first(self, model: nn.Module, args: Any, kwargs: Any, num_samples: int) -> None:
        """Drop the calls whose input's axis 0 is not the samples; tables that all samples share are kept aside.

        The model is run on a batch of another size, once for every sequence of layers and shapes that it shows.

        Args:
            model: the model, as its own parameters' names are known.
            args: positional arguments of the call that was recorded.
            kwargs: its keyword arguments. Tensors of length N along axis 0 are taken to have the samples there.
            num_samples: N.
        """
        signature = self.signature()
        known = _first_axes.setdefault(model, {})
        if signature not in known:
            if len(known) >= _MAX_SIGNATURES:
                known.clear()
            known[signature] = _compare(signature, _probe(model, args, kwargs, num_samples), num_samples)
        axes = list(zip(self.calls, known[signature], strict=True))
        self.calls = [call for call, axis in axes if axis == "samples"]
        self._num_samples = num_samples
        # Copies: the hooks on their outputs, where the samples' shares are summed, speak of the calls themselves.
        shared = [copy.copy(call) for call, axis in axes if axis == "shared" and isinstance(call.module, nn.Embedding)]
        self._shared = {call.output_node: call for call in shared if call.output_node is not None}

    def resolve(self, roots: Iterable[Tensor], names: Iterable[str], outputs: Iterable[Tensor] = ()) -> ParameterUses:
        """Tell the parameters that only recorded calls used from the others.

        Args:
            roots: the loss, or all that the loss is computed from.
            names: the trainable parameters.
            outputs: what the model returned: where rows are moved on the way there, every parameter counts as used in
                other ways. A loss may pick and move rows as it likes.

        Returns:
            how each of them was used.
        """
        call_at = {call.output_node: call for call in self.calls if call.output_node is not None}
        other: set[str] = set()
        reached: list[LayerCall] = []
        last: list[LayerCall] = []
        has_call_below: dict[Node, bool] = {}
        movers: list[Node] = []
        stack = [(get_gradient_edge(root).node, False) for root in roots if root.requires_grad]
        while stack:
            node, is_done = stack.pop()
            call = call_at.get(node)
            if call is None:
                below = [n for n, _ in node.next_functions if n is not None]
                if self._shared:
                    below = [n for n in below if n not in self._shared or not self._is_added(n, node, call_at)]
            else:
                below = [] if call.input_node is None else [call.input_node]
            if is_done:
                for n in below:
                    if n in call_at or has_call_below[n]:
                        has_call_below[node] = True
                        break
                else:
                    if call is not None:
                        last.append(call)
            elif node not in has_call_below:
                has_call_below[node] = False
                if call is not None:
                    reached.append(call)
                elif node in self._added:
                    reached.append(self._added[node])
                name = self._names.get(id(getattr(node, "variable", None)))
                if name is not None:
                    other.add(name)
                elif could_move_rows(node):
                    movers.append(node)
                stack.append((node, True))
                stack.extend((n, False) for n in below)
        if movers and self.rows_move_below(outputs):
            for call in reached:
                other.update(call.parameters.values())
            last.clear()
        calls: dict[str, list[LayerCall]] = {}
        for call in reached:
            for name in call.parameters.values():
                if name not in other:
                    calls.setdefault(name, []).append(call)
        unused = frozenset(names) - other - calls.keys()
        return ParameterUses(calls, frozenset(other), unused, tuple(last))

    def _is_added(self, shared: Node, total: Node, calls: Mapping[Node, LayerCall]) -> bool:
        """Whether a node adds a shared call to what samples have; from then on it counts as a call of every sample."""
        if total not in self._added:
            call = self._shared[shared]
            if not is_added_to_samples(total, shared, call.output_shape, self._num_samples, calls):
                return False
            self._added[total] = own = call.as_of_samples(self._num_samples, total)
            total.register_prehook(_WhenGradArrives(self, own).before_node)
        return True

    def rows_move_below(self, outputs: Iterable[Tensor]) -> bool:
        """Whether something between the inputs and these tensors, recorded calls left out, may move rows."""
        call_at = {call.output_node: call for call in self.calls}
        stack = [get_gradient_edge(output).node for output in outputs if output.requires_grad]
        seen = set(stack)
        while stack:
            node = stack.pop()
            if node in call_at:
                below = [call_at[node].input_node]
            elif could_move_rows(node) and moves_rows(node, self._names):
                return True
            else:
                below = [n for n, _ in node.next_functions]
            new = [n for n in below if n is not None and n not in seen]
            seen.update(new)
            stack.extend(new)
        return False


def _probe(model: nn.Module, args: Any, kwargs: Any, num_samples: int) -> _Signature | None:
    """The layers and shapes that the model shows on a batch of 2 samples, or of 3; None if rows move on the way.

    The user's hooks on modules do not see that pass, unless the model needs them, and modules keep their attributes.

    Returns:
        the signature, or None.

    Raises:
        RuntimeError: the model refuses that batch.
    """
    size = 3 if num_samples == 2 else 2
    rows = torch.arange(size) % num_samples

    def resized(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == num_samples:
            leaf = leaf.detach().index_select(0, rows.to(leaf.device))
            # With inputs in the graph, what is done to them before the first layer shows. Clones may be overwritten.
            return leaf.requires_grad_().clone() if leaf.is_floating_point() else leaf
        return leaf

    parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}

    def run() -> _Signature | None:
        record = LayerCalls({id(p): name for name, p in parameters.items()})
        inputs: list[Tensor] = []

        def on_call(module: nn.Module, layer_input: Tensor, output: Tensor) -> None:
            record.on_call(module, layer_input, output)
            if record.calls and record.calls[-1].output_node is output.grad_fn:
                inputs.append(layer_input)

        capture = Capture(watched_layers(model.modules()), on_call)
        with capture, torch.enable_grad(), without_trace(model, capture), attributes_kept(model.modules()):
            new_args, new_kwargs = tree_map(resized, args), tree_map(resized, kwargs)
            with_weights(model, parameters, dict(model.named_buffers()), lambda model: model(*new_args, **new_kwargs))
            return None if record.rows_move_below(inputs) else record.signature()

    try:
        with _without_hooks(model):
            return run()
    except Exception:  # whatever it is: the hooks may be part of what the model computes
        pass
    try:
        return run()
    except RuntimeError as error:
        raise RuntimeError(
            f"the model refused a batch of {size} samples, which tells along which axis its layers have the samples; "
            f"it must take any number of samples along axis 0 of its tensors: see the error above."
        ) from error


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, the modules have no forward hooks but torch's own, which compute weights."""
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    kept = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in kinds]
    try:
        for module, kind, hooks in kept:
            own = {k: h for k, h in hooks.items() if type(h).__module__.startswith("torch.")}
            setattr(module, kind, OrderedDict(own))
        yield
    finally:
        for module, kind, hooks in kept:
            setattr(module, kind, hooks)


def _compare(signature: _Signature, probe: _Signature | None, num_samples: int) -> tuple[_Axis, ...]:
    size = 3 if num_samples == 2 else 2
    unknown: list[_Axis] = ["other"] * len(signature)
    if probe is None:
        return tuple(unknown)
    if [module for module, _ in signature] != [module for module, _ in probe]:
        return tuple(unknown)  # another way through the model: nothing can be told

    def axis(shape: torch.Size, other: torch.Size) -> _Axis:
        if shape == other:
            return "shared"
        return "samples" if shape[0] == num_samples and other[0] == size and shape[1:] == other[1:] else "other"

    return tuple(axis(shape, other) for (_, shape), (_, other) in zip(signature, probe, strict=True))
