"""Builds kt_vllm._native with CMake and takes rules/ along; all metadata is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake is not on the PATH, expected 3.25 or newer; run: pip install 'cmake>=3.25'")
        ninja = shutil.which("ninja")
        build_type = "Debug" if self.debug else "Release"
        # In the checkout, not in pip's temporary folder, so that the next build compiles only what changed.
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{build_type.lower()}"
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build}",
            f"-DCMAKE_BUILD_TYPE={build_type}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={Path(self.get_ext_fullpath(ext.name)).resolve().parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            # CMake would keep the one of the last build, which with pip's build isolation is gone by now.
            "-Upybind11_DIR",
            *(["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
        ]
        # CMake takes these at the first configuration only; another choice has to begin afresh.
        choice = repr([bool(ninja), *map(os.environ.get, ("CXX", "CXXFLAGS", "LDFLAGS"))])
        stamp = build / "choice"
        if not stamp.is_file() or stamp.read_text() != choice:
            configure.append("--fresh")
        jobs = self.parallel or len(os.sched_getaffinity(0))
        subprocess.run(configure, check=True)
        stamp.write_text(choice)
        subprocess.run([cmake, "--build", str(build), "--target", "_native", f"-j{jobs}"], check=True)


class BuildWithRules(build_py):
    """rules/*.yaml become kt_vllm/shipped_rules/, but for an editable install, which finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "kt_vllm" / "shipped_rules"
        shutil.rmtree(target, ignore_errors=True)  # what an earlier build left
        target.mkdir(parents=True)
        for file in sorted((ROOT / "rules").glob("*.yaml")):
            shutil.copy(file, target)


setup(
    ext_modules=[CMakeExtension("kt_vllm._native")],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildWithRules},
)
