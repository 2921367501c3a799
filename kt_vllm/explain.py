"""`kt-vllm explain MODEL --kt-gguf ...`: every module, where it goes, its bytes, and which line of which file decided.

Reads config.json and the headers of the GGUF, no weights; needs neither vLLM nor torch.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from kt_vllm import _native, dense_placement, hub
from kt_vllm.args import Parser, add_flags, fold_flags
from kt_vllm.checkpoint import CheckpointPlan
from kt_vllm.config import CONFIG_KEY, DEFAULT_GPU_QUANT, KTConfig
from kt_vllm.dense_quant import QUANTS
from kt_vllm.errors import ConfigError, KTError
from kt_vllm.gguf.reader import GGUFModel
from kt_vllm.numa import format_list
from kt_vllm.placement import Decision, Placement

JSON_VERSION = 1
_PROGRAM = "kt-vllm explain"
_ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
# transformers writes one of these and reads any, each model class its own way; importing it takes 3 s.
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROGRAM,
        description="Prints where each module of a model goes (cpu: host memory, computed by the executor; gpu: vLLM's "
        "own device), how many bytes it has there, and which line of which file decided. Reads headers only.",
    )
    parser.add_argument("model", help="folder with config.json, or the Hugging Face name of one")
    add_flags(parser)
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", *_ITEM_SIZES), help="of the model, as vLLM's --dtype"
    )
    parser.add_argument("--all", action="store_true", help="a line for each module, instead of one for equal ones")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, a record for each module")
    return parser


def read_config(model: str) -> dict[str, Any]:
    """config.json of a folder, or of a repository on the hub, of which nothing else is fetched."""
    path = Path(model).expanduser()
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise ConfigError(f"the model {model!r} has no config.json; give the folder of the model of the GGUF.")
    elif path.exists() or model.startswith(("/", "./", "../", "~")):
        seen = "is a file" if path.exists() else "does not exist"
        raise ConfigError(f"the model {model!r} {seen}; give a folder with config.json, or a Hugging Face name.")
    else:
        fetched = hub.fetch_config(model)
        if fetched is None:
            raise ConfigError(
                f"the model {model!r} is neither a path here nor a Hugging Face name such as org/name; give a folder "
                "with config.json, or such a name."
            )
        file = fetched
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read as JSON ({error}); download it again.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{str(file)!r} is no model's config.json; give the folder of the model of the GGUF.")
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    known = next((config[name] for name in _NUM_EXPERTS if name in config), None)
    return config | {name: config.get(name, known) for name in _NUM_EXPERTS if known is not None}


def _model_dtype(wish: str, config: Mapping[str, Any]) -> str:
    said = str(config.get("torch_dtype") or config.get("dtype"))
    return wish if wish != "auto" else said if said in ("bfloat16", "float16") else "bfloat16"


def explain(config: KTConfig, hf_config: Mapping[str, Any], itemsize: int) -> tuple[Placement, dict[str, int]]:
    """The placement that the engine would take, and what dense weights take on a GPU with each --kt-gpu-quant.

    Where that and the rules say auto, the placement is for the model's own type: which one it will be depends on the
    GPU. itemsize: bytes of a number of that type. Raises KTError where the engine would refuse. The data behind the
    headers need not be there.
    """
    if hub.is_hub_name(config.gguf):
        raise ConfigError(
            f"--kt-gguf {config.gguf} is no path here, and explain downloads no weights: serve the model once, "
            "or fetch it with `hf download`, and give its path."
        )
    model = GGUFModel.open(config.gguf, require_data=False)
    plan = CheckpointPlan.build(model, hf_config, supported_types=_native.supported_types("reference"))
    top_k = hf_config.get("num_experts_per_tok")
    if not isinstance(top_k, int):
        raise ConfigError(f"config.json has {top_k!r} for num_experts_per_tok and an integer is expected.")
    placement = Placement.resolve(config, plan, top_k)
    wishes = QUANTS if config.gpu_quant == DEFAULT_GPU_QUANT else (config.gpu_quant,)
    settled = {quant: dense_placement.settle(placement, quant) for quant in wishes}
    sizes = {quant: dense_placement.device_bytes(x, plan.family, itemsize) for quant, x in settled.items()}
    return settled[wishes[0]], sizes


def _place(decision: Decision) -> str:
    on_device, on_host = len(decision.device_experts), decision.num_host_experts
    if not on_host:
        return "gpu"
    return f"cpu {on_host}, gpu {on_device}" if on_device else "cpu"


def _settings(decision: Decision) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if decision.top_k is not None:
        settings["num_experts_per_tok"] = decision.top_k
    if decision.module.matrix is not None and (decision.gpu_quant != "auto" or decision.quant != QUANTS[0]):
        settings["gpu_quant"] = decision.quant
    return settings


def to_json(placement: Placement, dtype: str, dense_gpu_bytes: Mapping[str, int]) -> dict[str, Any]:
    """Everything, with a record for each module. dense_gpu_bytes: as of explain()."""
    size = _ITEM_SIZES[dtype]
    config = placement.config
    modules = [
        {
            "name": decision.module.name,
            "layer": decision.module.layer,
            "on": _place(decision),
            "gpu_experts": list(decision.device_experts),
            "cpu_bytes": decision.host_bytes,
            "gpu_bytes": decision.device_bytes(size),
            **_settings(decision),
            "decided_by": dict(decision.by),
        }
        for decision in placement.decisions
    ]
    return {
        "version": JSON_VERSION,
        "dtype": dtype,
        "rules": placement.rules.name if placement.rules else None,
        "executor": {
            "isa": {"value": config.isa, "decided_by": placement.executor_by["isa"]},
            "threads": {"value": config.cpu_infer, "decided_by": placement.executor_by["threads"]},
            "numa": {"value": config.numa, "decided_by": placement.executor_by["numa"]},
        },
        "cpu_bytes": placement.host_bytes,
        "gpu_bytes": sum(decision.device_bytes(size) for decision in placement.decisions),
        "dense_gpu_bytes": dict(dense_gpu_bytes),
        "refused": dense_placement.refusals(placement, dtype),
        "modules": modules,
    }


def _fold(modules: Sequence[Mapping[str, Any]], unfold: bool) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """(name, modules) of each line of the table: equal modules of several layers share one, with their numbers."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for module in modules:
        template = _NUMBER.sub("{}", module["name"], count=1)
        same = [module[key] for key in ("on", "gpu_experts", "decided_by")]
        same += [module.get("num_experts_per_tok"), module.get("gpu_quant")]
        groups.setdefault((module["name"] if unfold else template, repr(same)), []).append(module)
    lines = []
    for (template, _), members in groups.items():
        layers = [m["layer"] for m in members if m["layer"] is not None]
        name = members[0]["name"] if len(members) == 1 else template.replace("{}", f"{{{format_list(layers)}}}")
        lines.append((name, members))
    return lines


def print_table(console: Console, report: Mapping[str, Any], unfold: bool) -> None:
    table = Table(box=rich.box.SIMPLE, pad_edge=False)
    for column in ("module", "on", "cpu", "gpu", "", "decided by"):
        table.add_column(column, justify="right" if column in ("cpu", "gpu") else "left", overflow="fold")
    for name, members in _fold(report["modules"], unfold):
        first = members[0]
        by = dict(first["decided_by"])
        place = by.pop("place")
        extra = [f"{key} {first[key]}" for key in ("num_experts_per_tok", "gpu_quant") if key in first]
        also = [f"{key}: {where}" for key, where in by.items() if where != place]
        sizes = [_size(sum(m[key] for m in members)) for key in ("cpu_bytes", "gpu_bytes")]
        table.add_row(name, first["on"], *sizes, ", ".join(extra), ", ".join([place, *also]))
    table.add_section()
    table.add_row("all", "", _size(report["cpu_bytes"]), _size(report["gpu_bytes"]), "", "")
    console.print(table)
    executor = report["executor"]
    values = {key: "auto" if entry["value"] is None else entry["value"] for key, entry in executor.items()}
    parts = [f"{key} {values[key]} ({entry['decided_by']})" for key, entry in executor.items()]
    console.print(f"executor: {', '.join(parts)}", markup=False, highlight=False)
    console.print(f"rules: {report['rules'] or 'none for this architecture'}; gpu weights in {report['dtype']}")
    dense = ", ".join(f"{_size(count)} in {quant}" for quant, count in report["dense_gpu_bytes"].items())
    console.print(f"gpu weights without routed experts, and with all that vLLM keeps twice: {dense}", highlight=False)
    for sentence in report["refused"]:
        console.print(f"refused at start: {sentence}", markup=False, highlight=False)


def _size(count: int) -> str:
    if not count:
        return "-"
    units = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
    return next((f"{count / size:,.2f} {unit}" for unit, size in units if count >= size), f"{count} B")


def main(arguments: Sequence[str]) -> None:
    """Ends the process with status 2 and one sentence for everything a user can mend."""
    try:
        args = _parser().parse_args(arguments)
        fold_flags(args)
        config = KTConfig.from_dict((getattr(args, "additional_config", None) or {}).get(CONFIG_KEY, {}))
        hf_config = read_config(args.model)
        dtype = _model_dtype(args.dtype, hf_config)
        placement, dense_gpu_bytes = explain(config, hf_config, _ITEM_SIZES[dtype])
        report = to_json(placement, dtype, dense_gpu_bytes)
        if args.json:
            sys.stdout.write(json.dumps(report, indent=1) + "\n")
        else:
            wide = None if sys.stdout.isatty() else 500  # a pipe has no width, and rich would cut lines at 80
            print_table(Console(width=wide), report, args.all)
    except KTError as error:
        sys.stderr.write(f"{_PROGRAM}: {error}\n")
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
