"""Builds the extension qcomm._C with CMake. What the package is and needs stands in pyproject.toml.

Environment: QCOMM_CUDA (AUTO, ON or OFF) decides on the CUDA kernels, CMAKE_ARGS holds further arguments for CMake,
QCOMM_BUILD_DIR is where CMake builds (tools/build_wheels.py: one for all Pythons, which share the core's objects).
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CORE = "qcomm._C"


class CMakeBuild(build_ext):
    """One build directory for each Python, which stays, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds, with the modules landing where setuptools wants them."""
        if ext.name != CORE:  # CMake has built all of them
            return
        output_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        own = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        build_dir = Path(os.environ.get("QCOMM_BUILD_DIR") or own)
        # pip puts its cmake and ninja on PATH; without build isolation they are beside the interpreter.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        environment = {**os.environ, "PATH": path}
        # An isolated build has its tools in a new place each time, and options of an earlier build must not linger.
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build_dir)]
        configure += [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DQCOMM_CUDA={os.environ.get('QCOMM_CUDA') or 'AUTO'}",
        ]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        for command in (configure, ["cmake", "--build", str(build_dir)]):
            try:
                subprocess.run(command, check=True, env=environment)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(f"building qcomm._C failed: {error}") from error


# An editable install keeps the modules that are listed; there is no _cuda without nvcc.
MODULES = [Extension(CORE, sources=[]), Extension("qcomm._cuda", sources=[], optional=True)]

setup(ext_modules=MODULES, cmdclass={"build_ext": CMakeBuild})
