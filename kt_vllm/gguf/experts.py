"""A layer's routed experts in each layout that llama.cpp has written: stacked, one tensor an expert, gate with up.

Whatever the layout, the executor gets the same bytes in the same order: a list of pieces of files for each projection.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from kt_vllm.errors import GGUFError
from kt_vllm.families import ExpertNames
from kt_vllm.gguf.header import GGUFTensor, shown


@dataclass(frozen=True)
class ExpertSource:
    """One projection of a layer's routed experts: the arguments of kt_vllm._native.ExpertTensor.

    shape: (num_experts, rows, cols); spans: (path, offset, bytes), which in this order make up the stacked tensor.
    """

    type: str
    shape: tuple[int, int, int]
    spans: tuple[tuple[str, int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, _, nbytes in self.spans)


@dataclass(frozen=True)
class LayerExperts:
    """gate and up [num_experts, intermediate_size, hidden_size], down [num_experts, hidden_size, intermediate_size]."""

    gate: ExpertSource
    up: ExpertSource
    down: ExpertSource

    @property
    def nbytes(self) -> int:
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes


class ExpertLayout:
    """The expert tensors among those of one layer, and their names.

    path: of the model; tensors: by name without `blk.N.`; sizes_from: the config.json fields that shapes come from;
    supported: types the executor has kernels for (None: not checked). Every method raises GGUFError.
    """

    def __init__(
        self,
        names: ExpertNames,
        path: str,
        layer: int,
        tensors: Mapping[str, GGUFTensor],
        sizes_from: str,
        supported: Sequence[str] | None = None,
    ) -> None:
        self.names, self.path, self.layer, self.tensors = names, path, layer, tensors
        self.sizes_from, self.supported = sizes_from, supported
        self.used: set[str] = set()

    def read(self, num_experts: int, intermediate: int, hidden: int) -> LayerExperts:
        """The layer's experts; `used` then has the names of the tensors they are in."""
        return LayerExperts(
            self.projection("gate", (num_experts, intermediate, hidden)),
            self.projection("up", (num_experts, intermediate, hidden)),
            self.projection("down", (num_experts, hidden, intermediate)),
        )

    def projection(self, kind: str, shape: tuple[int, int, int]) -> ExpertSource:
        stacked = getattr(self.names, kind)
        each = each_expert(self.names, kind)
        single = {int(m[1]): stem for stem in self.tensors if (m := each.fullmatch(stem))}
        fused = "" if kind == "down" else self.names.gate_up
        found = [stem for stem in (stacked, fused, next(iter(single.values()), "")) if stem in self.tensors]
        if len(found) > 1:
            raise GGUFError(
                f"{self.path!r} has the experts of layer {self.layer} twice, in {self.full(found[0])} and in "
                f"{self.full(found[1])}: leave one of them out, or convert the model again"
            )
        if not found:
            raise self.missing(stacked)
        if stacked in self.tensors:
            tensor = self.take(stacked, shape)
            return ExpertSource(tensor.type, shape, (_span(tensor),))
        if fused in self.tensors:
            return self.half(fused, kind, shape)
        return self.each(single, each_name(self.names, kind), shape)

    def half(self, stem: str, kind: str, shape: tuple[int, int, int]) -> ExpertSource:
        """Each expert's gate rows are followed by its up rows."""
        num_experts, rows, cols = shape
        tensor = self.take(stem, (num_experts, 2 * rows, cols))
        size = tensor.nbytes // (2 * num_experts)
        first = 0 if kind == "gate" else size
        spans = tuple((tensor.path, tensor.offset + 2 * size * e + first, size) for e in range(num_experts))
        return ExpertSource(tensor.type, shape, spans)

    def each(self, single: Mapping[int, str], name: str, shape: tuple[int, int, int]) -> ExpertSource:
        """The files may have them in any order, and in different shards."""
        num_experts, rows, cols = shape
        extra = [expert for expert in single if expert >= num_experts]
        if extra:
            raise GGUFError(
                f"{self.path!r} has the tensor {self.full(single[extra[0]])}, and config.json has only {num_experts} "
                "experts: give the model folder and the GGUF file of one model"
            )
        experts = []
        for expert in range(num_experts):
            if expert not in single:
                raise self.missing(name.format(expert=expert))
            experts.append(self.take(single[expert], (rows, cols)))
        other = next((t for t in experts if t.type != experts[0].type), None)
        if other:
            raise GGUFError(
                f"expert tensors {shown(experts[0].name)} and {shown(other.name)} have types {experts[0].type} and "
                f"{other.type}, and the executor needs one type for all experts of a projection of a layer: convert "
                "the model again with a current llama.cpp, which stacks them"
            )
        return ExpertSource(experts[0].type, shape, tuple(map(_span, experts)))

    def take(self, stem: str, shape: tuple[int, ...]) -> GGUFTensor:
        tensor = self.tensors[stem]
        if tensor.shape != shape:
            raise GGUFError(
                f"tensor {tensor.name!r} has shape {list(tensor.shape)} and {list(shape)} is expected from "
                f"config.json's {self.sizes_from}: give the model folder and the GGUF file of one model"
            )
        if self.supported is not None and tensor.type not in self.supported:
            raise GGUFError(
                f"expert tensor {tensor.name!r} has type {tensor.type}, which the executor has no kernels for: use "
                f"a file with experts in {', '.join(self.supported)}"
            )
        self.used.add(stem)
        return tensor

    def full(self, stem: str) -> str:
        return shown(self.tensors[stem].name)

    def missing(self, stem: str) -> GGUFError:
        return GGUFError(
            f"{self.path!r} has no tensor 'blk.{self.layer}.{stem}', and layer {self.layer} has routed experts by "
            "config.json: the file is incomplete or of another model; download or convert it again"
        )


def is_expert(names: ExpertNames, stem: str) -> bool:
    """Whether a tensor of this name, without `blk.N.`, holds routed experts in any layout."""
    kinds = ("gate", "up", "down")
    return stem in (names.gate, names.up, names.down, names.gate_up) or any(
        each_expert(names, kind).fullmatch(stem) for kind in kinds
    )


def each_name(names: ExpertNames, kind: str) -> str:
    return getattr(names, f"{kind}_each")


@lru_cache
def each_expert(names: ExpertNames, kind: str) -> re.Pattern[str]:
    """Matches the names of single experts' tensors; group 1 is the number, written as llama.cpp does."""
    before, after = each_name(names, kind).split("{expert}")
    return re.compile(re.escape(before) + r"(0|[1-9]\d{0,5})" + re.escape(after), re.ASCII)


def _span(tensor: GGUFTensor) -> tuple[str, int, int]:
    return tensor.path, tensor.offset, tensor.nbytes
