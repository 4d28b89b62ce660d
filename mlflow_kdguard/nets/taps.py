"""Feature maps of any torch network, through hooks.

Which layers (`auto`): among all calls of submodules, from the first convolution on and pooling
aside, the last four-dimensional output of each resolution. If that output comes out of a ReLU
whose input was the untouched output of another leaf (a normalisation, a convolution, a sum), that
leaf is taken instead: the map before the activation, as in overhaul distillation
(arXiv:1904.01866). A module that is called several times gives no name to a map; the block around
it does. A network without maps (an MLP) is tapped at its hidden linear layers.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from mlflow_kdguard.errors import UsageError

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)


@dataclass(slots=True, eq=False)
class _Output:
    """One tensor that went through the network, and the names of the modules that returned it."""

    tensor: Tensor
    version: int
    names: list[str]
    kind: type[nn.Module]
    source: "_Output | None"

    @property
    def pooled(self) -> bool:
        """Whether this is a summary of another map: pooled, or the activation of a pooled one."""
        before = self.source if issubclass(self.kind, _ACTIVATIONS) else None
        return "Pool" in self.kind.__name__ or (before is not None and before.pooled)

    def is_now(self, tensor: Tensor) -> bool:
        """Whether `tensor` is this output and nothing changed it in place since."""
        return tensor is self.tensor and tensor._version == self.version


@dataclass(slots=True, eq=False)
class _Trace:
    outputs: list[_Output] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    sources: list["_Output | None"] = field(default_factory=list)

    def find(self, tensor: object) -> _Output | None:
        if not isinstance(tensor, Tensor):
            return None
        return next((out for out in reversed(self.outputs) if out.is_now(tensor)), None)


def auto(net: nn.Module, shape: Sequence[int]) -> tuple[str, ...]:
    """Names of the layers to tap, in the order of computation.

    `shape` is (C, H, W) of an image. Deterministic; weights, mode and gradients are left alone.
    Raises UsageError where the network has no layer that can be named.
    """
    trace = _watch(net, shape)
    chosen = _last_maps(trace) or _hidden_linear(trace)
    names = tuple(dict.fromkeys(name for out in chosen if (name := _name(out, trace))))
    if not names:
        raise UsageError(
            f"no feature map of {type(net).__name__} can be tapped automatically.",
            remedy="Name the layers (detox.layers); every name of net.named_modules() can be one.",
        )
    return names


def _watch(net: nn.Module, shape: Sequence[int]) -> _Trace:
    """Run one grey batch through the network in eval mode and record what its modules return."""
    trace = _Trace()
    handles: list[RemovableHandle] = []
    for name, module in net.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(_listener(trace)))
            handles.append(module.register_forward_hook(_recorder(name, trace)))
    tensor = next(net.parameters(), next(net.buffers(), torch.zeros(())))
    batch = torch.full((2, *shape), 0.5, device=tensor.device, dtype=tensor.dtype)
    modes = [(module, module.training) for module in net.modules()]
    try:
        net.eval()
        with torch.no_grad():
            net(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return trace


def _listener(trace: _Trace) -> Any:
    def listen(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Asked before the call: an in-place activation changes its input.
        trace.sources.append(trace.find(inputs[0] if inputs else None))

    return listen


def _recorder(name: str, trace: _Trace) -> Any:
    def record(module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        trace.calls[name] += 1
        source = trace.sources.pop()
        if not isinstance(output, Tensor):
            return None
        leaf = next(module.children(), None) is None
        if not leaf and (known := trace.find(output)):
            known.names.append(name)
            return None
        # Downstream gets a copy, so that an in-place ReLU or += shows as a new version of it.
        copy = output.clone()
        trace.outputs.append(_Output(copy, copy._version, [name], type(module), source))
        return copy

    return record


def _last_maps(trace: _Trace) -> list[_Output]:
    last: dict[tuple[int, ...], _Output] = {}
    started = False
    for out in trace.outputs:
        started = started or issubclass(out.kind, _ConvNd | nn.Linear)
        if started and out.tensor.dim() == 4 and not out.pooled:
            last[tuple(out.tensor.shape[2:])] = out
    chosen = (_before_activation(out, trace) for out in last.values())
    return sorted(chosen, key=trace.outputs.index)


def _before_activation(out: _Output, trace: _Trace) -> _Output:
    before = out.source if issubclass(out.kind, _ACTIVATIONS) else None
    return out if before is None or _name(before, trace) is None else before


def _hidden_linear(trace: _Trace) -> list[_Output]:
    return [out for out in trace.outputs if issubclass(out.kind, nn.Linear)][:-1]


def _name(out: _Output, trace: _Trace) -> str | None:
    """The innermost module that returned this output and was called only once."""
    return next((name for name in out.names if trace.calls[name] == 1), None)


class Taps:
    """Reads the outputs of named layers while the network runs.

        with Taps(net, names) as taps:
            logits = net(x)
        taps.features["body.norm1"]

    Features belong to the graph of gradients and are those of the last call. Raises UsageError
    for a name that the network does not have.
    """

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        self.features: dict[str, Tensor] = {}
        self._modules = {name: _submodule(net, name) for name in names}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Taps":
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._keeper(name)))
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _keeper(self, name: str) -> Any:
        def keep(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                raise UsageError(
                    f"layer {name} returns {type(output).__name__}, not one tensor.",
                    remedy="Name another layer.",
                )
            self.features[name] = output
            # The network goes on with a copy: an in-place ReLU must not rectify what is kept.
            return output.clone()

        return keep


def insert(net: nn.Module, name: str, module: nn.Module) -> None:
    """Let `module` act on the output of submodule `name` from now on, in place.

    The submodule becomes Sequential(submodule, module), so weights, export and deep copies carry
    the addition; `name` then taps the output of `module`. Raises UsageError for an unknown name.
    """
    target = _submodule(net, name)
    wrapped = nn.Sequential(target, module)
    wrapped.train(target.training)
    parent, _, attribute = name.rpartition(".")
    setattr(net.get_submodule(parent), attribute, wrapped)


def _submodule(net: nn.Module, name: str) -> nn.Module:
    found: nn.Module | None = dict(net.named_modules()).get(name) if name else None
    if found is None:
        known = [known for known, _ in net.named_modules() if known]
        raise UsageError(
            f"the network has no layer called {name!r}.",
            remedy=f"Its layers: {', '.join(known[:40])}{' …' if len(known) > 40 else ''}.",
        )
    return found
