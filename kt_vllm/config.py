"""KTConfig: one frozen value that holds what the user asked for and travels to every worker process."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kt_vllm.dense_quant import QUANTS
from kt_vllm.errors import ConfigError
from kt_vllm.numa import check_numa

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Settings that a rule may give as well: these, and no other value, mean that the command line said nothing.
DEFAULT_ISA = "auto"
DEFAULT_NUMA = "auto"
DEFAULT_GPU_QUANT = "auto"

# The key of vLLM's additional_config under which the values travel (as JSON).
CONFIG_KEY = "kt"


def _flag(help_text: str, default: Any = dataclasses.MISSING, **argparse_kwargs: Any) -> Any:
    """A field that is also the command-line flag --kt-<name>."""
    return dataclasses.field(default=default, metadata={"help": help_text, "argparse": argparse_kwargs})


def _whole_number(text: str) -> int | str:
    """Text that is none stays text, so that KTConfig refuses it in the words it has for JSON as well."""
    try:
        return int(text)
    except ValueError:
        return text


@dataclasses.dataclass(frozen=True)
class LayerPlacement:
    """Where the routed experts of one layer are computed, and how many of them for each token.

    device_experts: ids, ascending, of the experts on vLLM's device; None: all of them, () : none, the executor has all.
    top_k: experts for each token; None: as many as the model says.
    """

    layer: int
    device_experts: tuple[int, ...] | None = ()
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.device_experts is not None:
            object.__setattr__(self, "device_experts", tuple(self.device_experts))


@dataclasses.dataclass(frozen=True)
class DensePlacement:
    """Dense modules that vLLM's device does not keep in the model's own type: fp8 or int4, see dense_quant.py.

    module: name with {} for the layer, as in "model.layers.{}.self_attn.o_proj"; layers: empty for a module that is in
    none, as the head.
    """

    module: str
    layers: tuple[int, ...]
    quant: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def names(self) -> tuple[str, ...]:
        """Of every module, as vLLM's model has it."""
        return tuple(self.module.format(layer) for layer in self.layers) or (self.module,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTConfig:
    """Fields made by _flag() are flags (--kt-cpu-infer is cpu_infer); the others are resolved at start."""

    gguf: str = _flag(
        "Weights: a GGUF file, a folder that holds the shards of one model, any one of them, or what to download from "
        "the hub, such as org/repo:Q4_K_M. The model argument then gives only config and tokenizer.",
        metavar="PATH|REPO:NAME",
    )
    cpu_infer: int | None = _flag(
        "Threads of the routed-expert executor. Default: physical cores minus one.",
        default=None,
        type=_whole_number,
        metavar="N",
    )
    isa: str = _flag(
        "Instruction set of the expert kernels: auto takes the best this CPU can run.",
        default=DEFAULT_ISA,
        metavar="ISA",
    )
    numa: str = _flag(
        "NUMA nodes of the executor: auto takes all it may use, off sees the machine as one, or a list such as 0,2-3.",
        default=DEFAULT_NUMA,
        metavar="auto|off|LIST",
    )
    gpu_quant: str = _flag(
        "Dense weights on the GPU: bf16 (the model's type), fp8 or int4, the head one step more exact; auto takes the "
        "most exact of them that leaves room for the KV cache of one sequence of --max-model-len, or "
        "--kv-cache-memory-bytes.",
        default=DEFAULT_GPU_QUANT,
        metavar="|".join((DEFAULT_GPU_QUANT, *QUANTS)),
    )
    rules: str | None = _flag(
        "What runs where: a file as in rules/README.md. Default: the one shipped for the model's architecture.",
        default=None,
        metavar="FILE",
    )
    num_experts_per_tok: int | None = _flag(
        "Fewer routed experts for each token than the model was trained with: faster, and less exact.",
        default=None,
        type=_whole_number,
        metavar="N",
    )
    handover: str = _flag(
        "How a GPU and the executor hand over: flags in memory that both see, or functions that the GPU's stream calls "
        "on the host (hostfunc, slower). auto: flags where they work.",
        default="auto",
        metavar="auto|flags|hostfunc",
    )
    no_experts: bool = _flag(
        "Load no routed experts and take their output as zero: to measure everything else. Answers are nonsense.",
        default=False,
        action="store_true",
    )
    # A GPU's call that the executor does not answer in this time ends the engine.
    watchdog_seconds: float = 120.0
    # The logical CPU of each executor thread, and the NUMA node of each (-1: none). Chosen in the process the user
    # started: vLLM pins its workers.
    cpus: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()
    # What the rules say of the layers that are not as by default.
    layers: tuple[LayerPlacement, ...] = ()
    # What --kt-gpu-quant and the rules come to.
    dense: tuple[DensePlacement, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.gguf, str) or not self.gguf:
            raise ConfigError(
                f"--kt-gguf is {self.gguf!r}; give the path of a GGUF file or folder, or org/repo:Q4_K_M."
            )
        for flag, number, what in (
            ("--kt-cpu-infer", self.cpu_infer, "threads"),
            ("--kt-num-experts-per-tok", self.num_experts_per_tok, "experts"),
        ):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                raise ConfigError(f"{flag} is {number!r}; give a whole number of {what}, 1 or more.")
            if number is not None and number < 1:
                raise ConfigError(f"{flag} is {number}; give 1 or more {what}, or leave it out.")
        if self.handover not in ("auto", "flags", "hostfunc"):
            raise ConfigError(f"--kt-handover is {self.handover!r}; give auto, flags or hostfunc.")
        if not isinstance(self.no_experts, bool):
            raise ConfigError(f"no_experts is {self.no_experts!r}; give true or false.")
        seconds = self.watchdog_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
            raise ConfigError(f"watchdog_seconds is {seconds!r}; give seconds, more than 0.")
        if not isinstance(self.isa, str):
            raise ConfigError(f"--kt-isa is {self.isa!r}; give auto or the name of an instruction set.")
        check_numa(self.numa)
        if self.gpu_quant not in (DEFAULT_GPU_QUANT, *QUANTS):
            raise ConfigError(
                f"--kt-gpu-quant is {self.gpu_quant!r}; give one of {', '.join((DEFAULT_GPU_QUANT, *QUANTS))}."
            )
        if self.rules is not None and (not isinstance(self.rules, str) or not self.rules):
            raise ConfigError(f"--kt-rules is {self.rules!r}; give the path of a rules file, or leave it out.")
        for name, kind in (("layers", LayerPlacement), ("dense", DensePlacement)):
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, tuple(x if isinstance(x, kind) else kind(**x) for x in given))
            except TypeError:
                raise ConfigError(f"{name} is {given!r}; it is made from --kt-rules FILE: give that.") from None
        object.__setattr__(self, "cpus", tuple(self.cpus))
        object.__setattr__(self, "nodes", tuple(self.nodes))
        if self.nodes and len(self.nodes) != len(self.cpus):
            raise ConfigError(
                f"nodes has {len(self.nodes)} entries and cpus {len(self.cpus)}; give a node for each CPU, or neither."
            )

    @classmethod
    def from_dict(cls, values: Any) -> "KTConfig":
        """From additional_config["kt"]. Raises ConfigError for anything but a complete mapping of known keys."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping):
            raise ConfigError(
                f'additional_config["kt"] is {values!r}; give a mapping such as {{"gguf": "/models/model.gguf"}}.'
            )
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}."
                raise ConfigError(f'additional_config["kt"] has an unknown key {key!r}; {hint}')
        if "gguf" not in values:
            raise ConfigError("kt_vllm flags are given but no weights: add --kt-gguf PATH (or the key 'gguf').")
        return cls(**values)

    @classmethod
    def from_vllm_config(cls, vllm_config: "VllmConfig") -> "KTConfig | None":
        """None when the user asked for nothing: vLLM then runs as if the plugin were not installed."""
        values = (vllm_config.additional_config or {}).get(CONFIG_KEY)
        return None if values is None else cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable: vLLM hashes additional_config."""
        layers = [
            {**vars(layer), "device_experts": None if layer.device_experts is None else list(layer.device_experts)}
            for layer in self.layers
        ]
        dense = [{**vars(modules), "layers": list(modules.layers)} for modules in self.dense]
        lists = {"cpus": list(self.cpus), "nodes": list(self.nodes), "layers": layers, "dense": dense}
        return {**dataclasses.asdict(self), **lists}

    def placement(self, layer: int) -> LayerPlacement:
        """Of the layer with this index."""
        return next((x for x in self.layers if x.layer == layer), LayerPlacement(layer))


def flag_fields() -> list[dataclasses.Field]:
    """The fields of KTConfig that are command-line flags."""
    return [field for field in dataclasses.fields(KTConfig) if "argparse" in field.metadata]
