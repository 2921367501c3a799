"""Builds kt_vllm._native with CMake; all metadata is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake is not on the PATH, expected 3.25 or newer; run: pip install 'cmake>=3.25'")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        if shutil.which("ninja"):
            configure.append("-GNinja")
        jobs = self.parallel or len(os.sched_getaffinity(0))
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--target", "_native", f"-j{jobs}"], check=True)


setup(ext_modules=[CMakeExtension("kt_vllm._native")], cmdclass={"build_ext": CMakeBuild})
