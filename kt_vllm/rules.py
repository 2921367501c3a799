"""Placement rules: a YAML file as frozen values, each with the line it came from. rules/README.md shows the schema."""

import difflib
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import regex
import yaml

from kt_vllm.dense_quant import QUANTS
from kt_vllm.errors import ConfigError
from kt_vllm.numa import check_numa

MAX_FILE_BYTES = 1 << 20
# For matching all module names against one expression. Thousands of names take milliseconds; what takes longer goes
# through exponentially many ways.
MATCH_SECONDS = 2.0
# Product of the counts in an expression, which compiles to as many copies: (a{1000}){1000} would fill the memory.
MAX_REPEATS = 10_000
_COUNT = re.compile(r"(?<=[{,])\d+(?=[},])")

EXPERTS_PLACES = ("cpu", "gpu")
GPU_QUANTS = ("auto", *QUANTS)
# What a rule can be about; a rule is compared only with modules of the kinds that its keys are about.
EXPERTS_KEYS = ("experts", "gpu_experts", "num_experts_per_tok", "isa", "threads", "numa")
DENSE_KEYS = ("gpu_quant",)
EXECUTOR_KEYS = ("isa", "threads", "numa")
_SELECTORS = ("match", "layers")
_RULE_KEYS = (*_SELECTORS, *EXPERTS_KEYS, *DENSE_KEYS)
_FILE_KEYS = ("rules", "architecture")


def quoted(text: str) -> str:
    """For a sentence: short, and on one line. Not repr(), which doubles the backslashes of an expression."""
    short = text if len(text) <= 60 else text[:57] + "..."
    return f"'{short}'" if short.isprintable() else repr(short)


@dataclass(frozen=True, eq=False)
class Rule:
    """One entry of `rules`. Of the settings, those that the rule does not mention are None.

    match: compiled expression, searched in module names; layers: (first, last) of ranges of layer indices. With both, a
    module must satisfy both. gpu_experts: ids, or how many of the first. lines: of each key.
    """

    file: str
    line: int
    lines: Mapping[str, int]
    match: "regex.Pattern[str] | None" = None
    layers: tuple[tuple[int, int], ...] | None = None
    experts: str | None = None
    gpu_experts: int | tuple[int, ...] | None = None
    num_experts_per_tok: int | None = None
    isa: str | None = None
    threads: int | None = None
    numa: str | None = None
    gpu_quant: str | None = None

    def where(self, key: str | None = None) -> str:
        """`file:line` of a key, or of the rule."""
        return f"{self.file}:{self.lines.get(key, self.line) if key else self.line}"

    @property
    def selector(self) -> str:
        """The keys that say what it matches, as a user wrote them."""
        layers = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in self.layers or ())
        parts = [f"match {quoted(self.match.pattern)}"] if self.match else []
        return " and ".join(parts + [f"layers {layers}"] * (self.layers is not None))

    def is_about(self, keys: tuple[str, ...]) -> bool:
        """Whether it sets one of these keys."""
        return any(key in self.lines for key in keys)

    def select(self, modules: Iterable[tuple[str, int | None]]) -> list[bool]:
        """Whether it matches each module, given by name and layer (None: of no layer)."""
        deadline = time.monotonic() + MATCH_SECONDS
        return [self._in_layers(layer) and self._matches(name, deadline) for name, layer in modules]

    def _in_layers(self, layer: int | None) -> bool:
        return self.layers is None or (layer is not None and any(a <= layer <= b for a, b in self.layers))

    def _matches(self, name: str, deadline: float) -> bool:
        if self.match is None:
            return True
        try:
            return self.match.search(name, timeout=max(1e-4, deadline - time.monotonic())) is not None
        except TimeoutError:
            raise ConfigError(
                f"{self.where('match')}: match {quoted(self.match.pattern)} takes more than {MATCH_SECONDS:g} s on "
                f"{name!r}; write it without a repetition inside a repetition."
            ) from None


@dataclass(frozen=True)
class RulesFile:
    """name: as it is shown to the user; architecture: general.architecture it is for, None for any."""

    name: str
    architecture: str | None
    rules: tuple[Rule, ...]


def read_rules(path: str | Path, name: str | None = None) -> RulesFile:
    """The file's rules in order. Raises ConfigError, one sentence that begins with file and line."""
    shown = name or str(path)
    try:
        with open(Path(path).expanduser(), "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--kt-rules {shown} cannot be read ({error.strerror}); give a file as in rules/.") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"--kt-rules {shown} is larger than {MAX_FILE_BYTES >> 20} MiB; give a file as in rules/.")
    return parse_rules(data, shown)


def parse_rules(data: bytes, name: str) -> RulesFile:
    """As read_rules(), from the file's content."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name}:{line}: this is not UTF-8 text; save the rules as UTF-8.") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{name}:{line}: this is not YAML ({error.problem or error.context}); mend it.") from None
    except yaml.YAMLError as error:  # a control character: without a mark
        raise ConfigError(f"{name}: this is not YAML ({str(error).splitlines()[0]}); mend it.") from None
    except RecursionError:
        raise ConfigError(f"{name}: its values are nested too deeply to be rules; see rules/README.md.") from None
    return _FileReader(name).read(root)


class _FileReader:
    """From YAML nodes, which know their lines, to values. Scalars are taken as written: `off` is no boolean here."""

    def __init__(self, name: str) -> None:
        self.name = name

    def error(self, node: yaml.Node, sentence: str) -> ConfigError:
        return ConfigError(f"{self.name}:{node.start_mark.line + 1}: {sentence}")

    def read(self, root: yaml.Node | None) -> RulesFile:
        if root is None:
            raise ConfigError(f"{self.name}: the file is empty; give a list under the key 'rules'.")
        pairs = self.mapping(root, _FILE_KEYS, "the file")
        architecture = self.text(pairs["architecture"], "architecture") if "architecture" in pairs else None
        if "rules" not in pairs:
            raise self.error(root, "the file has no key 'rules'; give a list of rules under it.")
        entries = pairs["rules"]
        if not isinstance(entries, yaml.SequenceNode) or not entries.value:
            raise self.error(entries, f"rules is {self.shown(entries)}; give a list with at least one rule.")
        return RulesFile(self.name, architecture, tuple(self.rule(node) for node in entries.value))

    def rule(self, node: yaml.Node) -> Rule:
        pairs = self.mapping(node, _RULE_KEYS, "a rule")
        readers: dict[str, Callable[[yaml.Node, str], object]] = {
            "match": self.pattern,
            "layers": self.layers,
            "experts": lambda n, key: self.choice(n, key, EXPERTS_PLACES),
            "gpu_experts": self.gpu_experts,
            "num_experts_per_tok": lambda n, key: self.number(n, key, 1),
            "isa": self.text,
            "threads": lambda n, key: self.number(n, key, 1),
            "numa": self.numa,
            "gpu_quant": lambda n, key: self.choice(n, key, GPU_QUANTS),
        }
        values = {key: readers[key](value, key) for key, value in pairs.items()}
        if not pairs.keys() & set(_SELECTORS):
            raise self.error(node, "the rule has neither match nor layers; say which modules it is about.")
        if pairs.keys() <= set(_SELECTORS):
            settings = ", ".join((*EXPERTS_KEYS, *DENSE_KEYS))
            raise self.error(node, f"the rule says nothing about what it matches; give one of {settings}.")
        if values.get("experts") == "gpu":
            for key in ("gpu_experts", *EXECUTOR_KEYS):
                if key in pairs:
                    raise self.error(
                        pairs[key], f"{key} is for experts on the cpu and the rule says experts: gpu; leave one out."
                    )
        lines = MappingProxyType({key: value.start_mark.line + 1 for key, value in pairs.items()})
        return Rule(self.name, node.start_mark.line + 1, lines, **values)  # type: ignore[arg-type]

    def mapping(self, node: yaml.Node, known: tuple[str, ...], what: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"{what} is {self.shown(node)}; give keys and values such as '{known[0]}: ...'.")
        pairs: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else self.shown(key_node)
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}."
                raise self.error(key_node, f"{what} has an unknown key {quoted(key)}; {hint}")
            if key in pairs:
                raise self.error(key_node, f"{what} has {key!r} twice; give it once.")
            pairs[key] = value
        return pairs

    def shown(self, node: yaml.Node) -> str:
        if isinstance(node, yaml.ScalarNode):
            return quoted(node.value) if node.value else "empty"
        return f"a{'' if node.value else 'n empty'} {'list' if isinstance(node, yaml.SequenceNode) else 'mapping'}"

    def text(self, node: yaml.Node, key: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise self.error(node, f"{key} is {self.shown(node)}; give one value.")
        return node.value

    def choice(self, node: yaml.Node, key: str, choices: tuple[str, ...]) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.value not in choices:
            raise self.error(node, f"{key} is {self.shown(node)}; give {' or '.join(choices)}.")
        return node.value

    def number(self, node: yaml.Node, key: str, least: int) -> int:
        # Not what YAML makes of it: 1:30 would be 90, and 0x10 sixteen.
        text = node.value if isinstance(node, yaml.ScalarNode) else ""
        if not (text.isascii() and text.isdecimal() and len(text) <= 9) or int(text) < least:
            raise self.error(node, f"{key} is {self.shown(node)}; give a whole number, {least} or more.")
        return int(text)

    def numa(self, node: yaml.Node, key: str) -> str:
        value = self.text(node, key)
        try:
            check_numa(value)
        except ConfigError:
            raise self.error(node, f"{key} is {quoted(value)}; give auto, off, or a list of nodes: 0,2-3.") from None
        return value

    def pattern(self, node: yaml.Node, key: str) -> "regex.Pattern[str]":
        text = self.text(node, key)
        if math.prod(max(int(n), 1) for n in _COUNT.findall(text)) > MAX_REPEATS:
            raise self.error(node, f"{key} is {quoted(text)}, which repeats too much for a name; write it shorter.")
        try:
            return regex.compile(text)
        except (regex.error, OverflowError, RecursionError) as error:
            raise self.error(node, f"{key} is {quoted(text)}, which is no regular expression ({error}).") from None

    def layers(self, node: yaml.Node, key: str) -> tuple[tuple[int, int], ...]:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        ranges = []
        for item in items:
            text = item.value if isinstance(item, yaml.ScalarNode) else ""
            for part in text.split(","):
                first, dash, last = (number.strip() for number in part.partition("-"))
                bounds = [first, last if dash else first]
                if not all(b.isascii() and b.isdecimal() and len(b) <= 9 for b in bounds):
                    raise self.error(item, f"{key} is {self.shown(item)}; give layers such as 7, 3-10 or 3-10,58.")
                if int(bounds[0]) > int(bounds[1]):
                    raise self.error(item, f"{key} has {part.strip()}, which ends before it begins; turn it round.")
                ranges.append((int(bounds[0]), int(bounds[1])))
        if not ranges:
            raise self.error(node, f"{key} is an empty list; give layers such as 7, 3-10 or 3-10,58.")
        return tuple(ranges)

    def gpu_experts(self, node: yaml.Node, key: str) -> int | tuple[int, ...]:
        if not isinstance(node, yaml.SequenceNode):
            return self.number(node, key, 1)
        ids = [self.number(item, key, 0) for item in node.value]
        if not ids:
            raise self.error(node, f"{key} is an empty list; give expert ids, or how many.")
        for low, high in itertools.pairwise(sorted(ids)):
            if low == high:
                raise self.error(node, f"{key} has expert {low} twice; give it once.")
        return tuple(sorted(ids))
