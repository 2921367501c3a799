"""Where the executor's time is read, in the process that has the model: the functions here run in vLLM's workers."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from kt_vllm.executor import LayerHandle
from kt_vllm.handover.device_layer import handovers
from kt_vllm.layer import KTMoEMethod, KTRoutedExperts


@dataclass
class Clock:
    """Sums over calls. executor_ns: from request to reply; between_ns: from a reply to the request of a higher layer.

    num_layers: of this model that call; num_tokens: rows, with the padding of graphs.
    """

    num_layers: int = 0
    num_calls: int = 0
    num_tokens: int = 0
    executor_ns: int = 0
    between_ns: int = 0

    def __add__(self, other: "Clock") -> "Clock":
        return Clock(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def since(self, before: "Clock") -> "Clock":
        return Clock(
            self.num_layers,
            self.num_calls - before.num_calls,
            self.num_tokens - before.num_tokens,
            self.executor_ns - before.executor_ns,
            self.between_ns - before.between_ns,
        )

    @property
    def num_steps(self) -> float:
        """Passes through the model."""
        return self.num_calls / self.num_layers if self.num_layers else 0.0


class _TimedHandle(LayerHandle):
    """What the coordinator counts, where there is none: vLLM's thread calls the executor itself."""

    def __init__(self, handle: LayerHandle, clock: "_HostClock") -> None:
        self.__dict__.update(vars(handle))
        self._clock = clock

    def submit(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> None:
        self._clock.begin(self.index, hidden_states.shape[0])
        super().submit(hidden_states, *others, **named)

    def wait(self) -> None:
        super().wait()
        self._clock.end()


class _HostClock:
    def __init__(self) -> None:
        self.sums = Clock()
        self._begin = self._end = 0
        self._layer = -1

    def begin(self, layer: int, num_tokens: int) -> None:
        self._begin = time.perf_counter_ns()
        self.sums.num_calls += 1
        self.sums.num_tokens += num_tokens
        if layer > self._layer >= 0:
            self.sums.between_ns += self._begin - self._end
        self._layer = layer

    def end(self) -> None:
        self._end = time.perf_counter_ns()
        self.sums.executor_ns += self._end - self._begin


_host = _HostClock()
_num_layers = 0


def start_clock(model: nn.Module) -> str:
    """Finds the executor of this worker's part of the model; says how its time is taken: coordinator, host or none."""
    global _host, _num_layers
    methods = [m.quant_method for m in model.modules() if isinstance(m, KTRoutedExperts)]
    ours = [m for m in methods if isinstance(m, KTMoEMethod) and m.handle is not None]
    _host, _num_layers = _HostClock(), len(ours)
    for method in ours:
        if isinstance(method.handle, LayerHandle):
            method.handle = _TimedHandle(method.handle, _host)
    if handovers:
        return f"coordinator, {next(iter(handovers)).way.name}"
    return "host" if any(isinstance(m.handle, LayerHandle) for m in ours) else "none"


def read_clock(model: nn.Module) -> Clock:
    """Since the start of the process. Of the worker on which start_clock() ran."""
    total = Clock(*asdict(_host.sums).values())
    for handover in handovers:
        stats = handover.coordinator.stats
        total += Clock(0, *(stats[key] for key in ("num_calls", "num_tokens", "executor_ns", "between_ns")))
    total.num_layers = _num_layers
    return total
