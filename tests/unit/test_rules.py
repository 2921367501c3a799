"""Rules files: what they may say, and one sentence with file and line for everything else."""

import time
from pathlib import Path

import pytest

from kt_vllm.checkpoint import CheckpointPlan
from kt_vllm.config import KTConfig
from kt_vllm.errors import ConfigError
from kt_vllm.gguf.reader import GGUFModel
from kt_vllm.placement import Placement
from kt_vllm.rules import MAX_FILE_BYTES, parse_rules, read_rules
from tests import gguf_files as files

SENTENCES = Path(__file__).with_name("bad_rules.txt")


def bad_files() -> dict[str, tuple[bytes, str]]:
    """name -> (content, sentence). The model has layers 0-2, the first of them dense, and 4 experts, top-2."""
    found: dict[str, tuple[bytes, str]] = {
        "a control character": (
            b"rules: \0",
            "{file}: this is not YAML (unacceptable character #x0000: special characters are not allowed); mend it.",
        ),
        "not UTF-8": (
            b"rules:\n  - match: '\xff'\n",
            "{file}:2: this is not UTF-8 text; save the rules as UTF-8.",
        ),
        "nested": (
            b"rules: " + b"[" * 100_000,
            "{file}: its values are nested too deeply to be rules; see rules/README.md.",
        ),
    }
    for block in SENTENCES.read_text().split("\n=== ")[1:]:
        name, _, rest = block.partition("\n")
        content, _, sentence = f"\n{rest}".partition("\n--> ")
        found[name] = (content.removeprefix("\n").encode(), sentence.rstrip("\n"))
    return found


BAD = bad_files()


def test_there_are_many_of_them() -> None:
    assert len(BAD) > 40 and all(sentence.startswith("{file}") for _, sentence in BAD.values())


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> CheckpointPlan:
    path = files.write_sparse(tmp_path_factory.mktemp("model") / "m.gguf", files.Shape(), lambda name: "F32")
    return CheckpointPlan.build(GGUFModel.open(str(path)), files.hf_config())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence(
    name: str, plan: CheckpointPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, sentence = BAD[name]
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        Placement.resolve(KTConfig(gguf="/m", rules="x.yaml"), plan, top_k=2)
    assert str(raised.value) == sentence.replace("{file}", "x.yaml")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    for path, part in (
        (tmp_path / "none.yaml", "cannot be read (No such file or directory)"),
        (tmp_path, "cannot be read (Is a directory)"),
        (large, "is larger than 1 MiB"),
    ):
        with pytest.raises(ConfigError, match="--kt-rules") as raised:
            read_rules(path)
        assert part in str(raised.value)


def test_an_expression_that_takes_forever_is_refused_in_time() -> None:
    (rule,) = parse_rules(
        b"rules:\n  - match: '^(?=(.*)(.*)(.*)(.*)(.*)\\1\\2\\3\\4z)'\n    experts: gpu", "x.yaml"
    ).rules
    names = [(f"model.layers.{i}.mlp.shared_experts.down_proj.of.a.long.name", i) for i in range(2000)]
    began = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"^x\.yaml:2: match .* takes more than 2 s on 'model\.layers\.\d+\."
    ) as raised:
        rule.select(names)
    assert "repetition" in str(raised.value)
    assert time.monotonic() - began < 10


def test_every_key_as_it_is_written() -> None:
    """Scalars are what the file says, not what YAML makes of them: off is no boolean, 1_0 no ten."""
    text = b"""
architecture: deepseek2
rules:
  - match: 'mlp\\.experts$'
    layers: 3-10, 58
    experts: cpu
    gpu_experts: [17, 0, 3]
    num_experts_per_tok: 6
    isa: avx2
    threads: 12
    numa: off
  - layers: [1, 5-7]
    gpu_experts: 9
    gpu_quant: fp8
  - layers: 0
    experts: gpu
"""
    rules = parse_rules(text, "x.yaml")
    assert rules.architecture == "deepseek2"
    first, second, third = rules.rules
    assert first.match is not None and first.match.pattern == r"mlp\.experts$"
    assert (first.layers, first.experts, first.gpu_experts) == (((3, 10), (58, 58)), "cpu", (0, 3, 17))
    assert (first.num_experts_per_tok, first.isa, first.threads, first.numa) == (6, "avx2", 12, "off")
    assert (first.where(), first.where("numa"), first.where("gpu_quant")) == ("x.yaml:4", "x.yaml:11", "x.yaml:4")
    assert (second.layers, second.gpu_experts, second.gpu_quant) == (((1, 1), (5, 7)), 9, "fp8")
    assert (third.layers, third.experts, third.match, third.isa) == (((0, 0),), "gpu", None, None)


def test_a_rule_matches_by_name_and_by_layer() -> None:
    text = b"rules:\n  - match: 'experts'\n    layers: 2-3\n    experts: gpu\n  - layers: 0\n    gpu_quant: auto"
    first, second = parse_rules(text, "x").rules
    modules = [("lm_head", None), ("model.layers.2.mlp.experts", 2), ("model.layers.2.mlp.gate", 2), ("experts", 4)]
    assert first.select(modules) == [False, True, False, False]
    assert second.select([("lm_head", None), ("a", 0), ("b", 1)]) == [False, True, False]


@pytest.mark.parametrize("file", ["rules/README.md", "README.md"])
def test_the_documented_examples_are_rules(file: str) -> None:
    text = (Path(__file__).resolve().parents[2] / file).read_text()
    blocks = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    assert blocks and all(parse_rules(block.encode(), file).rules for block in blocks)
