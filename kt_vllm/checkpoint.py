"""What becomes of every tensor of a GGUF model: vLLM's, the executor's, or left out with a reason."""

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import isclose, prod
from typing import TYPE_CHECKING

from kt_vllm.errors import GGUFError
from kt_vllm.families import DenseName, ModelFamily, find_family
from kt_vllm.gguf.dense import DECODABLE_TYPES, TRANSFORMS, empty_dense, fill_dense
from kt_vllm.gguf.experts import ExpertLayout, LayerExperts, is_expert
from kt_vllm.gguf.experts import ExpertSource as ExpertSource  # who has a plan needs its parts
from kt_vllm.gguf.header import GGUFTensor, shown
from kt_vllm.gguf.reader import GGUFModel

if TYPE_CHECKING:
    import torch

_SAME_MODEL = "give the model folder and the GGUF file of one model"
_LAYER = re.compile(r"blk\.(\d{1,6})\.(.+)")


@dataclass(frozen=True)
class DenseTensor:
    """One parameter of vLLM's model and the tensors it is made of (see families.DenseName)."""

    hf_name: str
    sources: tuple[GGUFTensor, ...]
    transform: str
    keep_float32: bool
    arguments: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes read from the files for it."""
        return sum(s.nbytes for s in self.sources)

    @property
    def num_weights(self) -> int:
        return sum(prod(s.shape) for s in self.sources)

    @property
    def matrix(self) -> tuple[int, int] | None:
        """[rows, cols] of a weight that a linear layer multiplies with; None for vectors and the router's."""
        cols = self.sources[-1].shape[-1]
        if self.keep_float32 or len(self.sources[-1].shape) < 2 or self.num_weights == cols:
            return None
        return self.num_weights // cols, cols


@dataclass(frozen=True)
class CheckpointPlan:
    """dense: in file order; experts: by layer index; ignored: (tensor name, reason), in file order.

    tied: the head is the embedding, and none of `dense`.
    """

    family: ModelFamily
    dense: tuple[DenseTensor, ...]
    experts: Mapping[int, LayerExperts]
    ignored: tuple[tuple[str, str], ...]
    tied: bool = False

    @classmethod
    def build(
        cls,
        model: GGUFModel,
        hf_config: Mapping[str, object],
        supported_types: Sequence[str] | None = None,
        *,
        with_experts: bool = True,
    ) -> "CheckpointPlan":
        """Accounts for every tensor of `model` under the config.json `hf_config`.

        supported_types: GGML types the executor has kernels for (None: not checked). with_experts: False leaves routed
        experts out, which the file then need not have. Raises GGUFError where the two do not belong together, a tensor
        is missing or unexplained, or a type cannot be computed with or decoded.
        """
        return _Builder(model, hf_config, supported_types, with_experts).build()

    @property
    def dense_file_bytes(self) -> int:
        """Bytes that iter_dense reads if it skips nothing."""
        return sum(d.nbytes for d in self.dense)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts, in files as in memory."""
        return sum(layer.nbytes for layer in self.experts.values())

    def dense_bytes_at(self, itemsize: int) -> int:
        """Bytes of all dense parameters with `itemsize` bytes a weight (those kept in float32: 4)."""
        return sum(d.num_weights * (4 if d.keep_float32 else itemsize) for d in self.dense)


def iter_dense(
    plan: CheckpointPlan,
    dtype: "torch.dtype | None" = None,
    wanted: Callable[[str], bool] | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """(Hugging Face name, values) of each dense parameter in file order; the next one is read meanwhile.

    dtype: None for float32; router weights and correction biases are float32 whatever it is. wanted: names it returns
    False for are not read. on_bytes: called with each parameter's bytes in the files, read or skipped.
    """

    # All memory is this thread's, which frees it too: malloc keeps what one thread takes and another frees, up to 60 MB
    # with vLLM's CPU platform.
    def begin_next() -> "tuple[list[torch.Tensor], Future[None]]":
        dense = todo.popleft()
        parts = [empty_dense(source, None if dense.keep_float32 else dtype) for source in dense.sources]
        return parts, ahead.submit(fill, dense.sources, parts)

    def fill(sources: Sequence[GGUFTensor], parts: "list[torch.Tensor]") -> None:
        for source, part in zip(sources, parts, strict=True):
            fill_dense(source, part)

    is_wanted = [wanted is None or wanted(dense.hf_name) for dense in plan.dense]
    todo = deque(dense for dense, yes in zip(plan.dense, is_wanted, strict=True) if yes)
    with ThreadPoolExecutor(1, "kt_vllm dense") as ahead:
        reading = begin_next() if todo else None
        for dense, yes in zip(plan.dense, is_wanted, strict=True):
            if yes and reading is not None:
                parts, filled = reading
                filled.result()
                reading = begin_next() if todo else None
                values = TRANSFORMS[dense.transform](*parts, *dense.arguments)
                del parts
                yield dense.hf_name, values
            if on_bytes is not None:
                on_bytes(dense.nbytes)


def _equal(in_gguf: object, in_config: object) -> bool:
    """A float of a GGUF is one of 32 bits, so what config.json has was rounded."""
    if isinstance(in_gguf, float) and isinstance(in_config, (int, float)):
        return isclose(in_gguf, in_config, rel_tol=1e-6)
    return in_gguf == in_config


class _Builder:
    def __init__(
        self, model: GGUFModel, config: Mapping[str, object], supported: Sequence[str] | None, with_experts: bool
    ) -> None:
        if model.get("expert_count") in (None, 0) and not any("_exps." in name for name in model.tensors):
            raise GGUFError(
                f"{model.path!r} is a dense model ({model.architecture!r} with no expert_count and no expert tensors) "
                "and a mixture-of-experts model is expected: serve a dense model without --kt-gguf"
            )
        model_type = config.get("model_type")
        self.model, self.config, self.supported, self.with_experts = model, config, supported, with_experts
        self.family = find_family(model.architecture, None if model_type is None else str(model_type))
        self.check_fields()
        self.num_layers = self.field(self.family.fields.num_layers)
        self.moe_layers = self.find_moe_layers()
        self.tied = bool(config.get("tie_word_embeddings"))

    def field(self, name: str) -> int:
        value = self.config.get(name)
        if not isinstance(value, int):
            raise GGUFError(
                f"config.json has {value!r} for {name} and an integer is expected: give the model folder that belongs "
                f"to {self.model.path!r}"
            )
        return value

    def check_fields(self) -> None:
        for check in self.family.checks:
            seen = self.model.get(check.gguf)
            if seen is None:
                continue
            spelled = dict(check.values)
            if isinstance(seen, int):
                seen = spelled.get(seen, seen)
            sums: list[object] = []
            for names in check.hf:
                values = [self.config.get(name) for name in names]
                numbers = [v for v in values if isinstance(v, (int, float))]
                if spelled:
                    sums += [v for v in values if v is not None]
                elif len(numbers) == len(values):
                    sums.append(sum(numbers))
            less = self.model.get(check.without) if check.without else None
            rest = seen - less if isinstance(seen, int) and isinstance(less, int) else seen
            if any(_equal(seen, v) for v in sums) or rest in sums[:1] or (not sums and not check.required):
                continue
            has = " or ".join(f"{v}" for v in dict.fromkeys(sums)) or "none"
            raise GGUFError(
                f"{self.model.path!r} has {self.model.architecture}.{check.gguf} = {seen} and config.json has {has} "
                f"for {' + '.join(check.hf[0])}: {_SAME_MODEL}"
            )

    def find_moe_layers(self) -> frozenset[int]:
        rule = self.family.moe_layers
        first = self.config.get(rule.first_dense) if rule.first_dense else None
        every = self.config.get(rule.every) if rule.every else None
        skip = self.config.get(rule.dense_list) if rule.dense_list else None
        first = first if isinstance(first, int) else 0
        every = every if isinstance(every, int) and every > 0 else 1
        dense = set(skip) if isinstance(skip, (list, tuple)) else set()
        layers = range(first, self.num_layers)
        return frozenset(i for i in layers if (i + rule.shift) % every == 0 and i not in dense)

    def build(self) -> CheckpointPlan:
        ignored: list[tuple[str, str]] = []
        global_: dict[str, GGUFTensor] = {}
        layers: list[dict[str, GGUFTensor]] = [{} for _ in range(self.num_layers)]
        for name, tensor in self.model.tensors.items():
            match = _LAYER.fullmatch(name)
            layer, stem = (int(match[1]), match[2]) if match else (None, name)
            reason = self.why_ignored(layer, stem)
            if reason:
                ignored.append((name, reason))
            elif layer is None:
                global_[stem] = tensor
            elif layer < self.num_layers:
                layers[layer][stem] = tensor
            else:
                raise GGUFError(
                    f"{self.model.path!r} has the tensor {shown(name)} and config.json has only {self.num_layers} "
                    f"layers: {_SAME_MODEL}"
                )
        experts = {i: self.take_experts(i, layers[i]) for i in sorted(self.moe_layers)} if self.with_experts else {}
        dense = self.take_dense(self.family.global_names, "", global_, ignored)
        for i, tensors in enumerate(layers):
            prefix = self.family.layer_prefix.format(layer=i)
            dense += self.take_dense(self.family.layer_names, prefix, tensors, ignored)
        self.check_complete({d.hf_name for d in dense})
        order = {name: i for i, name in enumerate(self.model.tensors)}
        dense.sort(key=lambda d: order[d.sources[0].name])
        ignored.sort(key=lambda entry: order[entry[0]])
        return CheckpointPlan(self.family, tuple(dense), experts, tuple(ignored), self.tied)

    def why_ignored(self, layer: int | None, stem: str) -> str | None:
        for known, reason in self.family.ignored:
            if stem == known or (known.endswith(".") and stem.startswith(known)):
                return reason
        if not self.with_experts and layer is not None and is_expert(self.family.experts, stem):
            return "routed experts are left out, as --kt-no-experts says"
        num_blocks = self.model.get("block_count")
        in_file = isinstance(num_blocks, int) and layer is not None and self.num_layers <= layer < num_blocks
        return self.family.mtp_reason if in_file else None

    def take_experts(self, layer: int, tensors: dict[str, GGUFTensor]) -> LayerExperts:
        """Takes the layer's expert tensors out of `tensors`."""
        fields = self.family.fields
        sizes_from = f"{fields.num_experts}, {fields.hidden_size} and {fields.intermediate_size}"
        layout = ExpertLayout(self.family.experts, self.model.path, layer, tensors, sizes_from, self.supported)
        experts = layout.read(*map(self.field, (fields.num_experts, fields.intermediate_size, fields.hidden_size)))
        for stem in layout.used:
            del tensors[stem]
        return experts

    def take_dense(
        self,
        rules: tuple[DenseName, ...],
        prefix: str,
        tensors: dict[str, GGUFTensor],
        ignored: list[tuple[str, str]],
    ) -> list[DenseTensor]:
        """The parameters made of `tensors`, every one of which must be of use or have a reason not to be."""
        made: dict[str, DenseTensor] = {}
        unused = dict(tensors)
        for rule in rules:
            if not all(stem in tensors for stem in rule.gguf):
                continue
            sources = tuple(tensors[stem] for stem in rule.gguf)
            if self.tied and rule.hf == self.family.output:
                reason = "config.json has tie_word_embeddings, so the embedding is used"
            elif rule.hf in made:
                reason = f"{made[rule.hf].sources[0].name} already gives {prefix + rule.hf}"
            else:
                self.check_dense(rule, sources)
                arguments = tuple(self.field(name) for name in rule.arguments)
                made[rule.hf] = DenseTensor(prefix + rule.hf, sources, rule.transform, rule.keep_float32, arguments)
                reason = None
            for stem in rule.gguf:
                tensor = unused.pop(stem, None)
                if tensor and reason:
                    ignored.append((tensor.name, reason))
        for stem, tensor in unused.items():
            self.refuse(stem, tensor, rules)
        return list(made.values())

    def refuse(self, stem: str, tensor: GGUFTensor, rules: tuple[DenseName, ...]) -> None:
        partners = [s for rule in rules if stem in rule.gguf for s in rule.gguf if s != stem]
        if partners:
            name = tensor.name.removesuffix(stem) + partners[0]
            raise GGUFError(
                f"{self.model.path!r} has {shown(tensor.name)} and not {shown(name)}, which belong together: the file "
                "is incomplete; download or convert it again"
            )
        if is_expert(self.family.experts, stem):
            raise GGUFError(
                f"{self.model.path!r} has routed experts in {shown(tensor.name)}, a layer that has none by "
                f"config.json: {_SAME_MODEL}"
            )
        raise GGUFError(
            f"{self.model.path!r} has the tensor {shown(tensor.name)}, which no {self.family.gguf_architecture!r} "
            "model known here has, and leaving it out could change the answers: use a file made by llama.cpp's "
            "converter, or report this one"
        )

    def check_dense(self, rule: DenseName, sources: tuple[GGUFTensor, ...]) -> None:
        for source in sources:
            if source.type not in DECODABLE_TYPES:
                raise GGUFError(
                    f"tensor {source.name!r} has type {source.type}, which the `gguf` package cannot decode: use a "
                    f"file with dense tensors in {', '.join(sorted(DECODABLE_TYPES))}"
                )
        if rule.shape:
            shape = tuple(self.field(name) for name in rule.shape)
            if sources[0].shape != shape:
                raise GGUFError(
                    f"tensor {sources[0].name!r} has shape {list(sources[0].shape)} and {list(shape)} is expected from "
                    f"config.json's {' and '.join(rule.shape)}: {_SAME_MODEL}"
                )
        for need in self.family.needs:
            if rule.hf == need.hf and self.config.get(need.field) != need.value:
                raise GGUFError(
                    f"{self.model.path!r} has {sources[0].name!r}, which vLLM uses only if config.json has "
                    f"{need.field} {need.value!r}, and it has {self.config.get(need.field)!r}: set it in config.json, "
                    "or give the model folder that belongs to the GGUF file"
                )

    def check_complete(self, have: set[str]) -> None:
        """Names a tensor that is missing: a global one, or one that other layers have.

        have: names of the parameters that were made. What no layer has is found when vLLM's model is loaded.
        """
        for rule in self.family.global_names:
            if rule.hf not in have and not (self.tied and rule.hf == self.family.output):
                raise GGUFError(
                    f"{self.model.path!r} has no tensor {rule.gguf[0]!r}: the file is incomplete; download or convert "
                    "it again"
                )
        prefixes = [self.family.layer_prefix.format(layer=i) for i in range(self.num_layers)]
        every = frozenset(range(self.num_layers))
        kinds = {"all": every, "moe": self.moe_layers, "dense": every - self.moe_layers}
        for rule in self.family.layer_names:
            kind = sorted(kinds[rule.layers])
            lacking = [i for i in kind if prefixes[i] + rule.hf not in have]
            if lacking and len(lacking) < len(kind):
                raise GGUFError(
                    f"{self.model.path!r} has no tensor 'blk.{lacking[0]}.{rule.gguf[0]}', and other layers have "
                    "theirs: the file is incomplete; download or convert it again"
                )
