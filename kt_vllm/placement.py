"""Where every module of a model goes: the rules applied to its modules, once, before the engine starts."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_vllm import _native
from kt_vllm.checkpoint import CheckpointPlan
from kt_vllm.config import DEFAULT_GPU_QUANT, DEFAULT_ISA, DEFAULT_NUMA, KTConfig, LayerPlacement
from kt_vllm.cpus import allowed_cpus, choose_cpus, nodes_of
from kt_vllm.dense_quant import weight_bytes
from kt_vllm.errors import ConfigError, ResourceError
from kt_vllm.families import ModelFamily
from kt_vllm.numa import format_list
from kt_vllm.rules import DENSE_KEYS, EXPERTS_KEYS, Rule, RulesFile, read_rules

DEFAULT = "default"
# Why a weight that linear layers multiply with stays in the model's type whatever is asked for.
_HAS_VIEWS = "attention computes with views of it, and would keep a second copy of one in fewer bits"
_TIED = "it is the embedding as well (tie_word_embeddings in config.json)"
# llama.cpp's name of the router in every architecture; the routed experts stand beside it.
_ROUTER = ("ffn_gate_inp.weight",)
_PACKAGE = Path(__file__).resolve().parent
# In an installed wheel, and in a checkout.
_SHIPPED = (_PACKAGE / "shipped_rules", _PACKAGE.parent / "rules")
# What a rule calls the executor's settings -> (field of KTConfig, its flag, the value that says nothing).
_EXECUTOR_FIELDS = {
    "isa": ("isa", "--kt-isa", DEFAULT_ISA),
    "threads": ("cpu_infer", "--kt-cpu-infer", None),
    "numa": ("numa", "--kt-numa", DEFAULT_NUMA),
}


@dataclass(frozen=True)
class Module:
    """One module of vLLM's model that has weights. layer: None outside the layers.

    num_float32: those of num_weights that stay float32; expert_bytes: of one routed expert as in the files;
    num_experts: 0 for a dense module; matrix: [rows, cols] of a dense module's weight, where it may be quantised, or
    might if it were not for the reason `kept`; is_head: it makes the logits.
    """

    name: str
    layer: int | None
    num_weights: int
    num_float32: int = 0
    expert_bytes: int = 0
    num_experts: int = 0
    matrix: tuple[int, int] | None = None
    kept: str | None = None
    is_head: bool = False


@dataclass(frozen=True)
class Decision:
    """What becomes of one module, and why.

    device_experts: ids of the routed experts that are computed on vLLM's device; top_k: experts for each token where
    that is not the model's number; gpu_quant: what was asked for a dense module; by: setting -> `file:line`, a flag, or
    DEFAULT. quant: what it gets, and why_quant where that is not what was asked for; see dense_placement.py.
    """

    module: Module
    device_experts: tuple[int, ...] = ()
    top_k: int | None = None
    gpu_quant: str | None = None
    by: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quant: str = "bf16"
    why_quant: str | None = None

    @property
    def num_host_experts(self) -> int:
        return self.module.num_experts - len(self.device_experts)

    @property
    def host_bytes(self) -> int:
        """In the executor's memory."""
        return self.module.expert_bytes * self.num_host_experts

    def device_bytes(self, itemsize: int) -> int:
        """On vLLM's device, with `itemsize` bytes a weight."""
        module = self.module
        if module.num_experts:
            return module.num_weights // module.num_experts * len(self.device_experts) * itemsize
        rows, cols = module.matrix or (0, 0)
        rest = module.num_weights - module.num_float32 - rows * cols
        return weight_bytes(self.quant, rows, cols, itemsize) + rest * itemsize + module.num_float32 * 4


@dataclass(frozen=True)
class Placement:
    """config: with what the rules say of the executor and of layers; decisions: in the model's order.

    executor_by: "isa", "threads" and "numa" -> `file:line`, a flag, or DEFAULT.
    """

    config: KTConfig
    rules: RulesFile | None
    decisions: tuple[Decision, ...]
    executor_by: Mapping[str, str]

    @classmethod
    def resolve(cls, config: KTConfig, plan: CheckpointPlan, top_k: int) -> "Placement":
        """Applies the user's rules, or those shipped for the architecture, to the model of `plan`.

        top_k: experts for each token by config.json. Raises ConfigError for a rule that cannot be kept.
        """
        rules = load_rules(config.rules, plan.family.gguf_architecture)
        modules = list_modules(plan)
        chosen = _first_matches(rules.rules if rules else (), modules)
        decisions = tuple(_decide(config, module, rule, top_k) for module, rule in zip(modules, chosen, strict=True))
        settings, executor_by = _executor_settings(config, decisions, chosen)
        layers = tuple(_layer_placement(d) for d in decisions if d.device_experts or (d.top_k and d.module.num_experts))
        return cls(dataclasses.replace(config, layers=layers, **settings), rules, decisions, executor_by)

    @property
    def host_bytes(self) -> int:
        """Of all routed experts in host memory."""
        return sum(decision.host_bytes for decision in self.decisions)

    def device_expert_bytes(self, itemsize: int) -> int:
        """Of all routed experts on vLLM's device."""
        return sum(d.device_bytes(itemsize) for d in self.decisions if d.module.num_experts)

    def report(self) -> list[str]:
        """Lines for the log: whose rules, and what is not as by default."""
        experts = [d for d in self.decisions if d.module.num_experts]

        def layers(chosen: Sequence[Decision]) -> str:
            return format_list(d.module.layer for d in chosen if d.module.layer is not None)

        whole = [d for d in experts if d.device_experts and not d.num_host_experts]
        split = [d for d in experts if d.device_experts and d.num_host_experts]
        lines = [
            f"placement by {self.rules.name if self.rules else 'default, for lack of rules for this architecture'}."
        ]
        if whole:
            lines.append(f"routed experts of layers {layers(whole)} are on vLLM's device.")
        if split:
            lines.append(f"some routed experts of layers {layers(split)} are on vLLM's device.")
        for top_k in sorted({d.top_k for d in experts if d.top_k}):
            lines.append(
                f"{top_k} experts for each token in layers {layers([d for d in experts if d.top_k == top_k])}."
            )
        return lines

    def settle_executor(self, warn: Callable[[str], object] = lambda _: None) -> KTConfig:
        """config with CPU and NUMA node of every executor thread. Raises KTError for what this machine lacks."""
        config = self.config
        where = {key: flag for key, (_, flag, _) in _EXECUTOR_FIELDS.items()}
        where |= {key: f"{by}: {key}" for key, by in self.executor_by.items() if by not in (DEFAULT, where[key])}
        try:
            _native.choose_isa(config.isa)
        except _native.NativeError as error:
            raise ResourceError(f"{where['isa']} is {config.isa!r}: {error}") from None
        try:
            if config.cpus:
                nodes = config.nodes or nodes_of(config.cpus, numa=config.numa)
                return dataclasses.replace(config, nodes=nodes)
            choice = choose_cpus(config.cpu_infer, allowed_cpus(), numa=config.numa)
        except ConfigError as error:
            raise ConfigError(str(error).replace("--kt-numa", where["numa"], 1)) from None
        if choice.warning:
            warn(choice.warning.replace("--kt-cpu-infer", where["threads"], 1))
        return dataclasses.replace(config, cpus=choice.cpus, nodes=choice.nodes)


def load_rules(path: str | None, architecture: str) -> RulesFile | None:
    """The user's file, else the one shipped for a general.architecture; None where none is."""
    if path is None:
        found = [folder / f"{architecture}.yaml" for folder in _SHIPPED]
        shipped = next((p for p in found if p.is_file()), None)
        return None if shipped is None else read_rules(shipped, f"rules/{architecture}.yaml")
    rules = read_rules(path)
    if rules.architecture not in (None, architecture):
        raise ConfigError(
            f"{rules.name}: the rules are for architecture {rules.architecture!r} and the GGUF has {architecture!r}; "
            "give rules for this model, or leave --kt-rules out."
        )
    return rules


def router_name(family: ModelFamily) -> str:
    """Of a layer's router in vLLM's model, without layer_prefix: "mlp.gate"."""
    (router,) = {name.hf for name in family.layer_names if name.gguf == _ROUTER}
    return router.removesuffix(".weight")


def experts_name(family: ModelFamily) -> str:
    """Of a layer's routed experts in vLLM's model, without layer_prefix: "mlp.experts"."""
    return router_name(family).rpartition(".")[0] + ".experts"


def list_modules(plan: CheckpointPlan) -> list[Module]:
    """Every module with weights: those outside the layers, then layer by layer, routed experts after dense modules.

    And a head that is the embedding, without weights of its own.
    """
    head, router = plan.family.output.rpartition(".")[0], router_name(plan.family)
    prefix = re.escape(plan.family.layer_prefix).replace(re.escape("{layer}"), r"(\d+)")
    dense: dict[str, Module] = {}
    for tensor in plan.dense:
        name = tensor.hf_name.rpartition(".")[0]
        match = re.match(prefix, name)
        seen = dense.get(name) or Module(name, int(match[1]) if match else None, 0)
        # A router is small, and an error in it chooses other experts.
        is_linear = name[match.end() :] != router if match else name == head
        matrix = tensor.matrix if is_linear and tensor.hf_name.endswith(".weight") else None
        dense[name] = dataclasses.replace(
            seen,
            matrix=matrix or seen.matrix,
            kept=_HAS_VIEWS if match and name[match.end() :] in plan.family.kept else None,
            is_head=name == head,
            num_weights=seen.num_weights + tensor.num_weights,
            num_float32=seen.num_float32 + tensor.num_weights * tensor.keep_float32,
        )
    if plan.tied:
        dense[head] = Module(head, None, 0, matrix=(0, 0), kept=_TIED, is_head=True)
    stem = experts_name(plan.family)
    experts = []
    for layer, tensors in plan.experts.items():
        num_experts, rows, cols = tensors.gate.shape
        name = plan.family.layer_prefix.format(layer=layer) + stem
        weights = 3 * num_experts * rows * cols
        experts.append(Module(name, layer, weights, 0, tensors.nbytes // num_experts, num_experts))
    return sorted([*dense.values(), *experts], key=lambda m: -1 if m.layer is None else m.layer)


def _first_matches(rules: Sequence[Rule], modules: Sequence[Module]) -> list[Rule | None]:
    """The rule that decides each module. Raises ConfigError for a rule that decides none of a kind it is about."""
    chosen: list[Rule | None] = [None] * len(modules)
    for rule in rules:
        for keys, kind, is_experts in ((EXPERTS_KEYS, "routed experts", True), (DENSE_KEYS, "dense module", False)):
            if not rule.is_about(keys):
                continue
            mine = [i for i, module in enumerate(modules) if bool(module.num_experts) == is_experts]
            if not mine:  # as where --kt-no-experts leaves them out
                continue
            selected = [
                i
                for i, is_selected in zip(
                    mine, rule.select((modules[i].name, modules[i].layer) for i in mine), strict=True
                )
                if is_selected
            ]
            if not selected:
                raise ConfigError(
                    f"{rule.where()}: {rule.selector} matches no {kind} of this model; the nearest is "
                    f"{_nearest(rule, [modules[i] for i in mine])}."
                )
            free = [i for i in selected if chosen[i] is None]
            if not free:
                first = chosen[selected[0]]
                assert first is not None
                raise ConfigError(
                    f"{rule.where()}: {rule.selector} matches only what earlier rules decide (see line {first.line}); "
                    "the first match wins, so move this one up or take it out."
                )
            for i in free:
                chosen[i] = rule
    return chosen


def _nearest(rule: Rule, modules: Sequence[Module]) -> str:
    """The name of the module that the rule most likely meant."""
    if rule.match is not None:
        literal = re.sub(r"[\^$*+?()\[\]{}|]", "", rule.match.pattern.replace("\\d", "0").replace("\\", ""))
        names = [module.name for module in modules]
        near = difflib.get_close_matches(literal[:200], names, n=1, cutoff=0.0)
        if near:
            return repr(near[0])
    bounds = [bound for pair in rule.layers or () for bound in pair]
    inside = [module for module in modules if module.layer is not None]
    if bounds and inside:
        return repr(min(inside, key=lambda m: min(abs((m.layer or 0) - bound) for bound in bounds)).name)
    return repr(modules[0].name) if modules else "none at all"


def _decide(config: KTConfig, module: Module, rule: Rule | None, model_top_k: int) -> Decision:
    by = {"place": DEFAULT if rule is None else rule.where()}
    if not module.num_experts:
        quant = DEFAULT_GPU_QUANT
        if rule is not None and rule.gpu_quant is not None:
            by["gpu_quant"] = by["place"] = rule.where("gpu_quant")
            quant = rule.gpu_quant
        if config.gpu_quant != DEFAULT_GPU_QUANT and module.matrix is not None:
            quant, by["gpu_quant"] = config.gpu_quant, "--kt-gpu-quant"
        return Decision(module, gpu_quant=quant, by=by)
    on_device: tuple[int, ...] = ()
    top_k = None
    if rule is not None:
        if rule.experts is not None:
            by["place"] = rule.where("experts")
        if rule.experts == "gpu":
            on_device = tuple(range(module.num_experts))
        elif rule.gpu_experts is not None:
            by["place"] = rule.where("gpu_experts")
            on_device = _split(rule, module)
        if rule.num_experts_per_tok is not None:
            top_k, by["num_experts_per_tok"] = rule.num_experts_per_tok, rule.where("num_experts_per_tok")
    if config.num_experts_per_tok is not None:
        top_k, by["num_experts_per_tok"] = config.num_experts_per_tok, "--kt-num-experts-per-tok"
    if top_k is not None and top_k > model_top_k:
        where = by["num_experts_per_tok"]
        what = where if config.num_experts_per_tok is not None else f"{where}: num_experts_per_tok"
        raise ConfigError(
            f"{what} is {top_k} and the model was made for {model_top_k} experts a token; give 1 to {model_top_k}."
        )
    return Decision(module, on_device, None if top_k == model_top_k else top_k, None, by)


def _split(rule: Rule, module: Module) -> tuple[int, ...]:
    wanted, total = rule.gpu_experts, module.num_experts
    largest = wanted if isinstance(wanted, int) else max(wanted or ()) + 1
    if largest > total:
        seen = f"{wanted} experts" if isinstance(wanted, int) else f"expert {largest - 1}"
        raise ConfigError(
            f"{rule.where('gpu_experts')}: gpu_experts names {seen} and {module.name} has {total}, numbered from 0 to "
            f"{total - 1}; name some of these, or how many."
        )
    return tuple(range(wanted)) if isinstance(wanted, int) else tuple(wanted or ())


def _layer_placement(decision: Decision) -> LayerPlacement:
    assert decision.module.layer is not None
    on_device = decision.device_experts if decision.num_host_experts else None
    return LayerPlacement(decision.module.layer, on_device, decision.top_k)


def _executor_settings(
    config: KTConfig, decisions: Sequence[Decision], chosen: Sequence[Rule | None]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Changed fields of KTConfig, and what decided each setting. There is one executor: rules must agree about it."""
    changed: dict[str, Any] = {}
    by: dict[str, str] = {}
    for key, (field, flag, default) in _EXECUTOR_FIELDS.items():
        said = {
            rule: decision.module.layer
            for decision, rule in zip(decisions, chosen, strict=True)
            if rule is not None and decision.num_host_experts and key in rule.lines
        }
        values = {rule: getattr(rule, key) for rule in said}
        first = next(iter(values), None)
        for other, value in values.items():
            if first is not None and value != values[first]:
                raise ConfigError(
                    f"{other.where(key)}: {key} is {value} and line {first.lines[key]} says {values[first]}; one "
                    "executor computes the experts of all layers, so give one value."
                )
        if getattr(config, field) != default:
            by[key] = flag
        elif first is not None:
            changed[field], by[key] = values[first], first.where(key)
            if key == "isa" and values[first] not in (DEFAULT_ISA, *_native.isas()):
                raise ConfigError(
                    f"{by[key]}: isa is {values[first]!r}; give {', '.join((DEFAULT_ISA, *_native.isas()))}."
                )
        else:
            by[key] = DEFAULT
    return changed, by
