"""KTConfig: one frozen value that holds what the user asked for and travels to every worker process."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kt_vllm.errors import ConfigError
from kt_vllm.numa import check_numa

if TYPE_CHECKING:
    from vllm.config import VllmConfig

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
        "Instruction set of the expert kernels: auto takes the best this CPU can run.", default="auto", metavar="ISA"
    )
    numa: str = _flag(
        "NUMA nodes of the executor: auto takes all it may use, off sees the machine as one, or a list such as 0,2-3.",
        default="auto",
        metavar="auto|off|LIST",
    )
    # The logical CPU of each executor thread, and the NUMA node of each (-1: none). Chosen in the process the user
    # started: vLLM pins its workers.
    cpus: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.gguf, str) or not self.gguf:
            raise ConfigError(
                f"--kt-gguf is {self.gguf!r}; give the path of a GGUF file or folder, or org/repo:Q4_K_M."
            )
        if self.cpu_infer is not None and (isinstance(self.cpu_infer, bool) or not isinstance(self.cpu_infer, int)):
            raise ConfigError(f"--kt-cpu-infer is {self.cpu_infer!r}; give a whole number of threads, 1 or more.")
        if self.cpu_infer is not None and self.cpu_infer < 1:
            raise ConfigError(f"--kt-cpu-infer is {self.cpu_infer}; give 1 or more threads, or leave it out.")
        if not isinstance(self.isa, str):
            raise ConfigError(f"--kt-isa is {self.isa!r}; give auto or the name of an instruction set.")
        check_numa(self.numa)
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
        return {**dataclasses.asdict(self), "cpus": list(self.cpus), "nodes": list(self.nodes)}


def flag_fields() -> list[dataclasses.Field]:
    """The fields of KTConfig that are command-line flags."""
    return [field for field in dataclasses.fields(KTConfig) if "argparse" in field.metadata]
