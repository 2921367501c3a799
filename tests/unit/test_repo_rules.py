"""CONTRIBUTING.md's rules, as far as a program can check them."""

import ast
import importlib.util
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 400
REQUIRED = [
    *("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "setup.py", "CMakeLists.txt"),
    *("Makefile", "tools/bootstrap.py", ".ci/run", ".clang-format", ".ruff.toml", ".pre-commit-config.yaml"),
    *("kt_vllm/__init__.py", "kt_vllm/py.typed", "kt_vllm/_native.pyi", "examples/demo.py", "examples/README.md"),
]
# Rule 2. Diagnostics are read in envs.py; the command line may set what vLLM reads.
MAY_READ_ENVIRONMENT = {"kt_vllm/envs.py", "kt_vllm/cli.py"}
MAY_PRINT = {"kt_vllm/cli.py"}
# Rule 4.
MAY_PATCH_VLLM = {"kt_vllm/compat.py"}
# Rule 7: the folders compiled with flags of their own.
ISA_FOLDERS = ("csrc/kernels/panel/", "csrc/kernels/amx/")


def _files() -> list[str]:
    """What git knows or would be asked to add; every file where there is no git (a source archive)."""
    folders = ("kt_vllm", "csrc")
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        listed = [path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(name for name in listed if (ROOT / name).is_file() and not name.endswith((".so", ".pyc")))


FILES = _files()
PYTHON = [name for name in FILES if name.endswith(".py")]
CPP = [name for name in FILES if name.endswith((".h", ".cpp", ".inc", ".cu"))]


def _tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(), name)


def _root_name(node: ast.expr) -> str | None:
    """`vllm` of `vllm.config.VllmConfig`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def patches_of_vllm(tree: ast.Module) -> Iterator[int]:
    """Lines that assign to, or delete, an attribute of something imported from vLLM (by hand or with setattr)."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    imported.add(alias.asname or "vllm")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm" and node.level == 0:
            imported.update(alias.asname or alias.name for alias in node.names)
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and _root_name(node.func) in {"setattr", "delattr"}:
            yield from [node.lineno for first in node.args[:1] if _root_name(first) in imported]
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
            for part in parts:
                # vllm.REGISTRY["name"] = ... is a patch as well.
                inner = part.value if isinstance(part, ast.Subscript) else part
                if not isinstance(part, ast.Name) and _root_name(inner) in imported:
                    yield part.lineno


@pytest.mark.parametrize("name", REQUIRED)
def test_required_file(name: str) -> None:
    assert (ROOT / name).is_file()


def test_a_file_is_at_most_400_lines() -> None:
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_python_reads_the_environment_in_one_place() -> None:
    found = []
    for name in PYTHON:
        for node in ast.walk(_tree(name)):
            attribute = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"}
            imported = isinstance(node, ast.alias) and node.name in {"environ", "getenv", "putenv"}
            if (attribute or imported) and name not in MAY_READ_ENVIRONMENT:
                found.append(f"{name}:{node.lineno}")
    assert found == []


def test_cpp_reads_no_environment() -> None:
    assert [name for name in CPP if re.search(r"\b(secure_)?getenv\b|\benviron\b", (ROOT / name).read_text())] == []


def test_only_the_command_line_prints() -> None:
    found = []
    for name in PYTHON:
        for node in ast.walk(_tree(name)):
            if isinstance(node, ast.Call) and _root_name(node.func) == "print" and name not in MAY_PRINT:
                found.append(f"{name}:{node.lineno}")
    assert found == []


def test_vllm_is_patched_in_one_place() -> None:
    found = [f"{name}:{line}" for name in PYTHON if name not in MAY_PATCH_VLLM for line in patches_of_vllm(_tree(name))]
    assert found == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import vllm\nvllm.config.x = 1", [2]),
        ("import vllm.config as c\nc.VllmConfig.x += 1", [2]),
        ("from vllm.config import VllmConfig as V\nsetattr(V, 'x', 1)", [2]),
        ("from vllm import a\ndel a.b\na.table['k'] = 1\na.x, y = 1, 2", [2, 3, 4]),
        ("def f():\n    from vllm import a\n    a.b = 1", [3]),
        ("from vllm import a\na = 1\nb = a.x\nself.a = a", []),
        ("import numpy as np\nnp.x = 1", []),
    ],
)
def test_the_search_for_patches_finds_them(source: str, lines: list[int]) -> None:
    assert sorted(patches_of_vllm(ast.parse(source))) == lines


def test_instruction_set_files_use_no_containers() -> None:
    """An inline std function compiled with AVX-512 may be the copy that the linker keeps for the whole library."""
    container = re.compile(r"\bstd::(vector|string|map|unordered_map|set|deque|list|array|function|mutex|thread)\b")
    found = []
    for name in CPP:
        if name.startswith(ISA_FOLDERS):
            for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
                if container.search(line.split("//")[0]):
                    found.append(f"{name}:{number}")
    assert found == []


def test_importing_the_package_needs_neither_vllm_nor_torch() -> None:
    """By source, so that it holds for lazy imports too: nothing that __init__ imports at the top may import them."""
    seen: set[str] = set()
    queue = ["kt_vllm/__init__.py"]
    while queue:
        name = queue.pop()
        if name in seen or not (ROOT / name).is_file():
            continue
        seen.add(name)
        for node in _tree(name).body:
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = "kt_vllm." * bool(node.level) + (node.module or "")
                modules = [base, *(f"{base.rstrip('.')}.{alias.name}" for alias in node.names)]
            for module in modules:
                assert module.split(".")[0] not in {"vllm", "torch"}, f"{name}:{node.lineno} imports {module}"
                if module.split(".")[0] == "kt_vllm":
                    path = module.rstrip(".").replace(".", "/")
                    queue += [f"{path}.py", f"{path}/__init__.py"]


def _stub_names(body: list[ast.stmt]) -> set[str]:
    names = {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    names |= {ast.unparse(node.target) for node in body if isinstance(node, ast.AnnAssign)}
    return {name for name in names if not name.startswith("_")}


def test_stub_equals_extension() -> None:
    if importlib.util.find_spec("kt_vllm._native") is None:
        pytest.skip("the extension is not built")
    from kt_vllm import _native

    stub = _tree("kt_vllm/_native.pyi")
    assert _stub_names(stub.body) == {name for name in vars(_native) if not name.startswith("_")}
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            actual = {name for name in vars(getattr(_native, node.name)) if not name.startswith("_")}
            assert _stub_names(node.body) == actual, node.name


def test_ruff_and_clang_format_agree_on_the_line_length() -> None:
    ruff = tomllib.loads((ROOT / ".ruff.toml").read_text())["line-length"]
    assert f"ColumnLimit: {ruff}" in (ROOT / ".clang-format").read_text()
