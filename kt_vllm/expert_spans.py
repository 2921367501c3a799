"""Single experts of a layer: where their bytes are in the files, and their values."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kt_vllm import _native
from kt_vllm.checkpoint import ExpertSource, LayerExperts
from kt_vllm.config import LayerPlacement
from kt_vllm.errors import GGUFError


def host_experts(experts: LayerExperts, placement: LayerPlacement) -> LayerExperts | None:
    """What the executor computes of a layer; None for nothing."""
    if placement.device_experts is None:
        return None
    ids = [i for i in range(experts.gate.shape[0]) if i not in placement.device_experts]
    return select_experts(experts, ids) if placement.device_experts else experts


def select_experts(experts: LayerExperts, ids: Sequence[int]) -> LayerExperts:
    """These experts of a layer alone, in this order; reads nothing."""
    return LayerExperts(*(_select(source, ids) for source in (experts.gate, experts.up, experts.down)))


def _select(source: ExpertSource, ids: Sequence[int]) -> ExpertSource:
    size = source.nbytes // source.shape[0]
    spans: list[tuple[str, int, int]] = []
    for expert in ids:
        for path, offset, nbytes in _cut(source.spans, expert * size, size):
            last = spans[-1] if spans else ("", 0, 0)
            if last[0] == path and last[1] + last[2] == offset:
                spans[-1] = (path, last[1], last[2] + nbytes)
            else:
                spans.append((path, offset, nbytes))
    return replace(source, shape=(len(ids), *source.shape[1:]), spans=tuple(spans))


def _cut(spans: Sequence[tuple[str, int, int]], begin: int, size: int) -> Iterator[tuple[str, int, int]]:
    """The parts of `spans`, taken as one run of bytes, that hold [begin, begin + size)."""
    at = 0
    for path, offset, nbytes in spans:
        first, last = max(begin, at), min(begin + size, at + nbytes)
        if first < last:
            yield path, offset + first - at, last - first
        at += nbytes


def read_expert(source: ExpertSource, expert: int) -> NDArray[np.float32]:
    """The values of one expert, [rows, cols]. Raises GGUFError when the file is no longer as it was."""
    size = source.nbytes // source.shape[0]
    data = np.empty(size, np.uint8)
    done = 0
    for path, offset, nbytes in _cut(source.spans, expert * size, size):
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            end = done + nbytes
            while done < end:
                count = file.readinto(memoryview(data.data)[done:end])
                if not count:
                    raise GGUFError(
                        f"{path!r} ended inside an expert though it was long enough when it was opened: something is "
                        "writing to it; wait for that and start again"
                    )
                done += count
    return _native.dequantize(source.type, data).reshape(source.shape[1:])
