"""What --kt-gpu-quant and the rules' gpu_quant come to for each dense module, and what they may not ask for."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from kt_vllm.config import DEFAULT_GPU_QUANT, DensePlacement
from kt_vllm.dense_quant import QUANTS, fitting, for_head, head_rows
from kt_vllm.families import ModelFamily
from kt_vllm.placement import Decision, Placement

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_FLAG = "--kt-gpu-quant"


def keep_head(placement: Placement, reason: str) -> Placement:
    """The placement with a head that stays in the model's type, unless it does for another reason."""
    decisions = tuple(
        dataclasses.replace(d, module=dataclasses.replace(d.module, kept=d.module.kept or reason))
        if d.module.is_head
        else d
        for d in placement.decisions
    )
    return dataclasses.replace(placement, decisions=decisions)


def settle(placement: Placement, auto: str = QUANTS[0], served: Sequence[str] = QUANTS, tensor: int = 1) -> Placement:
    """The placement with `quant` of every dense module, and config.dense, which tells the workers.

    auto: for modules that neither the flag nor a rule decides. served: what the platform has kernels for; a module
    whose shape does not fit takes the next more exact of these. tensor: devices that share the head.
    """
    decisions = tuple(_settle(decision, auto, served, tensor) for decision in placement.decisions)
    layers: dict[tuple[str, str], list[int]] = {}
    for decision in decisions:
        if decision.quant != QUANTS[0]:
            layer = decision.module.layer
            template = decision.module.name if layer is None else _LAYER.sub("{}", decision.module.name, count=1)
            layers.setdefault((template, decision.quant), []).extend([] if layer is None else [layer])
    dense = tuple(DensePlacement(module, tuple(found), quant) for (module, quant), found in layers.items())
    return dataclasses.replace(
        placement, decisions=decisions, config=dataclasses.replace(placement.config, dense=dense)
    )


def _settle(decision: Decision, auto: str, served: Sequence[str], tensor: int) -> Decision:
    module = decision.module
    if module.matrix is None:
        return dataclasses.replace(decision, quant=QUANTS[0], why_quant=None)
    wanted = _asked(decision) or auto
    if module.kept is not None:
        quant, reason = QUANTS[0], None if wanted == QUANTS[0] else module.kept
    elif module.is_head:
        quant, reason = _head(decision, wanted, served, tensor)
    else:
        quant, reason = fitting(wanted, *module.matrix, served)
    return dataclasses.replace(decision, quant=quant, why_quant=reason)


def _asked(decision: Decision) -> str | None:
    """What flag or rule say; None where they leave it to `auto`."""
    return None if decision.gpu_quant == DEFAULT_GPU_QUANT else decision.gpu_quant


def _head(decision: Decision, wanted: str, served: Sequence[str], tensor: int) -> tuple[str, str | None]:
    """(quant, why it is not `wanted`) of the head: what a rule says of it, else for_head()."""
    assert decision.module.matrix is not None
    vocabulary, cols = decision.module.matrix
    has_rule = _asked(decision) is not None and decision.by["gpu_quant"] != _FLAG
    chosen = wanted if has_rule else for_head(wanted)
    quant, reason = fitting(chosen, head_rows(vocabulary, tensor), cols, served)
    return quant, reason or (None if chosen == wanted else "it is kept one step more exact")


def refusals(placement: Placement, dtype: str, served: Sequence[str] = QUANTS) -> list[str]:
    """What flag and rules ask for and cannot have, a sentence each. dtype: the model's; served: as of settle()."""
    asked: dict[str, list[Decision]] = {}
    for decision in placement.decisions:
        if _asked(decision) is not None:
            asked.setdefault(decision.by["gpu_quant"], []).append(decision)
    sentences = (_refusal(where, decisions, dtype, served) for where, decisions in asked.items())
    return [sentence for sentence in sentences if sentence is not None]


def _refusal(where: str, decisions: Sequence[Decision], dtype: str, served: Sequence[str]) -> str | None:
    """decisions: all that were made at `where`, which names one way to keep them."""
    quant, module = decisions[0].gpu_quant, decisions[0].module
    said = f"{where} is {quant}" if where == _FLAG else f"{where}: gpu_quant is {quant}"
    if quant not in served:
        return f"{said}, for which there are no kernels on this platform; give {', '.join(served)} or auto."
    if quant == "bf16":
        return None if dtype == "bfloat16" else f"{said} and the model runs in {dtype}; give auto or --dtype bfloat16."
    if dtype == "float32":
        return f"{said} and the model runs in {dtype}, for which there are no kernels; give --dtype bfloat16."
    if all(decision.module.matrix is None or decision.module.kept for decision in decisions):
        if module.kept is not None:
            stays = f"which stays in the model's type, as {module.kept}; match other linear layers, or give auto."
        else:
            stays = "and embedding, norms and routers stay in the model's type; match linear layers or the head."
        return f"{said} for {module.name}, {stays}"
    return None


def report(placement: Placement) -> list[str]:
    """Lines for the log: how many modules get what, and which not what was asked for."""
    heads = [d for d in placement.decisions if d.module.is_head]
    dense = [d for d in placement.decisions if d.module.matrix is not None and not d.module.is_head]
    lines = []
    kinds = {quant: sum(d.quant == quant for d in dense) for quant in QUANTS}
    if any(d.quant != QUANTS[0] for d in (*dense, *heads)):
        counts = ", ".join(f"{count} in {quant}" for quant, count in kinds.items() if count)
        head = "".join(f"; the head in {d.quant}{f', as {d.why_quant}' if d.why_quant else ''}" for d in heads)
        lines.append(f"dense modules on the device: {counts}{head}; embedding, norms and routers in the model's type.")
    reasons: dict[tuple[str, str], list[str]] = {}
    for decision in dense:
        if decision.why_quant is not None:
            reasons.setdefault((decision.quant, decision.why_quant), []).append(decision.module.name)
    for (quant, reason), names in reasons.items():
        lines.append(f"{len(names)} dense modules are in {quant}, as {reason}: {', '.join(names[:4])}.")
    return lines


def device_bytes(placement: Placement, family: ModelFamily, itemsize: int, tensor: int = 1, pipeline: int = 1) -> int:
    """Of all dense weights on the fullest of the devices.

    itemsize: bytes a weight in the model's type; tensor, pipeline: devices that share each layer, and the layers.
    """
    outside: dict[str, int] = {}
    layers: dict[int, int] = {}
    for decision in placement.decisions:
        module = decision.module
        if module.num_experts:
            continue
        nbytes = decision.device_bytes(itemsize)
        if module.layer is None:
            outside[module.name] = nbytes // (tensor if module.num_weights >= 1 << 16 else 1)
            continue
        stem = module.name.removeprefix(family.layer_prefix.format(layer=module.layer))
        is_cut = module.matrix is not None and stem not in family.replicated
        layers[module.layer] = layers.get(module.layer, 0) + nbytes // (tensor if is_cut else 1)
    return _fullest_stage(outside, [layers[i] for i in sorted(layers)], pipeline)


def _fullest_stage(outside: Mapping[str, int], layers: Sequence[int], pipeline: int) -> int:
    """Embedding before the first stage, norm and head after the last; the layers spread evenly."""
    if pipeline == 1:
        return sum(outside.values()) + sum(layers)
    each = -(-len(layers) // pipeline)
    stages = [sum(layers[i * each : (i + 1) * each]) for i in range(pipeline)]
    return max(stages) + max(outside.values(), default=0)
