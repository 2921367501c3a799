"""What `kt-vllm bench layer` is asked to measure."""

from dataclasses import dataclass

from kt_vllm import _native
from kt_vllm.bench.random_weights import TYPES
from kt_vllm.cpus import CpuChoice, allowed_cpus, choose_cpus
from kt_vllm.errors import ConfigError

FLOAT_TYPES = ("bfloat16", "float16", "float32")
# As many as fit comfortably into memory twice; more tokens a call only repeat what 4096 do.
MAX_TOKENS = 1 << 16


@dataclass(frozen=True)
class LayerBench:
    """hidden_size, intermediate_size, num_experts, top_k: of the layer; types: of gate, up and down.

    tokens: a measurement each. seconds: for each of them; repeats: calls each has at least. dram_bytes: read for the
    bandwidth, 0 for a choice by cache size and free memory; limit_seconds: for each limit. neighbour: a CPU that
    something else keeps busy meanwhile, or None. numa: as --kt-numa.
    """

    hidden_size: int = 7168
    intermediate_size: int = 2048
    num_experts: int = 256
    top_k: int = 8
    types: tuple[str, str, str] = ("Q4_K", "Q4_K", "Q4_K")
    tokens: tuple[int, ...] = (1, 8, 64, 512, 4096)
    threads: int | None = None
    isa: str = "auto"
    numa: str = "auto"
    float_type: str = "bfloat16"
    seconds: float = 2.0
    repeats: int = 5
    seed: int = 0
    limit_seconds: float = 0.5
    dram_bytes: int = 0
    neighbour: int | None = None

    def check(self) -> None:
        """Raises ConfigError (or NativeError for an instruction set this CPU lacks) for what cannot be measured."""
        for flag, value in (
            ("--hidden", self.hidden_size),
            ("--intermediate", self.intermediate_size),
            ("--experts", self.num_experts),
            ("--top-k", self.top_k),
            ("--repeats", self.repeats),
        ):
            if value < 1:
                raise ConfigError(f"{flag} is {value} and must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads is {self.threads} and must be at least 1")
        if self.top_k > self.num_experts:
            raise ConfigError(f"--top-k is {self.top_k}, expected at most --experts {self.num_experts}")
        for count in self.tokens:
            if not 1 <= count <= MAX_TOKENS:
                raise ConfigError(f"--tokens has {count}, expected numbers from 1 to {MAX_TOKENS}")
        if not self.tokens:
            raise ConfigError("--tokens is empty, expected numbers such as 1,8,64")
        for flag, seconds in (("--seconds", self.seconds), ("--limit-seconds", self.limit_seconds)):
            if not 0 < seconds <= 3600:
                raise ConfigError(f"{flag} is {seconds}, expected more than 0 and at most 3600")
        if self.float_type not in FLOAT_TYPES:
            raise ConfigError(f"--dtype is '{self.float_type}', expected one of {', '.join(FLOAT_TYPES)}")
        if self.neighbour is not None and self.neighbour not in allowed_cpus():
            raise ConfigError(f"--neighbour is CPU {self.neighbour}, which this process may not use")
        try:
            self.placement()
        except ConfigError as error:
            raise ConfigError(str(error).replace("--kt-numa", "--numa")) from None
        self._check_types()

    def _check_types(self) -> None:
        isa = _native.choose_isa(self.isa)[0]
        known = [name for name in _native.supported_types(isa) if name in TYPES]
        sizes = _native.type_sizes()
        if len(self.types) != 3:
            raise ConfigError(f"--type has {len(self.types)} parts, expected one type or gate/up/down")
        for name, what, (_, cols) in zip(self.types, ("gate", "up", "down"), self.shapes(), strict=True):
            if name not in known:
                raise ConfigError(f"--type {name} is none that {isa} computes, expected one of {', '.join(known)}")
            if cols % sizes[name][0]:
                flag = "--intermediate" if what == "down" else "--hidden"
                raise ConfigError(f"{flag} is {cols}, but rows of {name} for {what} come in blocks of {sizes[name][0]}")

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, cols) of an expert's gate, up and down."""
        up = (self.intermediate_size, self.hidden_size)
        return up, up, (self.hidden_size, self.intermediate_size)

    def projection_bytes(self) -> tuple[int, ...]:
        """Bytes of an expert's gate, up and down."""
        sizes = _native.type_sizes()
        return tuple(
            rows * cols // sizes[name][0] * sizes[name][1]
            for name, (rows, cols) in zip(self.types, self.shapes(), strict=True)
        )

    def expert_bytes(self) -> int:
        return sum(self.projection_bytes())

    def operations(self, num_tokens: int) -> float:
        """Multiplications and additions of one call."""
        return 2.0 * 3 * self.hidden_size * self.intermediate_size * self.top_k * num_tokens

    def placement(self) -> CpuChoice:
        """CPU and memory node of each thread, as `kt-vllm serve` would choose. Raises ConfigError as choose_cpus()."""
        return choose_cpus(self.threads, allowed_cpus(), numa=self.numa)

    def cpus(self) -> list[int]:
        """The logical CPU of each thread."""
        return list(self.placement().cpus)
