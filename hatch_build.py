"""Build hook: makes what is not committed, by each build, editable or not. `python hatch_build.py` makes it alone.

- The gRPC stubs and their types from `protos/`, each in the package that speaks it.
- `csi_driver/luks/libbulk.so` from `bulk.c` beside it, where there is a C compiler. Without one a library that is there
  stays, and is used if it was made of that source; without any the package works all the same, slower
  (`csi_driver/luks/bulk.py`).
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import resources
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTOS = {
    "csi_driver/rpc": ("csi.proto", "addons_identity.proto", "addons_keyrotation.proto", "pluginregistration.proto"),
    "csi_driver/keys": ("kmsv2.proto",),
}
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
BULK_SOURCE = "csi_driver/luks/bulk.c"
BULK = "csi_driver/luks/libbulk.so"
COMPILER = os.environ.get("CC") or "cc"
BULK_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-ldl")


def generate(root: Path) -> None:
    """Write `NAME_pb2` and `NAME_pb2_grpc`, each as .py and .pyi, under `root`; RuntimeError if that fails."""
    for package, names in PROTOS.items():
        _generate(root, package, names)


def _generate(root: Path, package: str, names: tuple[str, ...]) -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    arguments = [
        "protoc",
        # The virtual path makes the stubs import each other as members of the package.
        f"-I{package}={root / 'protos'}",
        f"-I{resources.files('grpc_tools') / '_proto'}",
        f"--python_out={root}",
        f"--grpc_python_out={root}",
        f"--mypy_out=quiet:{root}",
        # Both ends are synchronous. Concrete servicers: a call left out answers UNIMPLEMENTED.
        f"--mypy_grpc_out=quiet,only_sync,generate_concrete_servicer_stubs:{root}",
    ]
    for name in PLUGINS:
        program = shutil.which(name, path=path)
        if program is None:
            sentence = f"the stubs cannot be made: {name} is not installed; run `make venv`"
            raise RuntimeError(sentence)
        arguments.append(f"--plugin={name}={program}")
    status = protoc.main([*arguments, *(f"{package}/{name}" for name in names)])
    if status != 0:
        sentence = f"the stubs cannot be made: protoc ended with status {status} on {', '.join(names)}"
        raise RuntimeError(sentence)


def compile_bulk(root: Path, compiler_command: str) -> bool:
    """Compile bulk.c under `root`; whether there is a library then. What cannot be done is told on stderr."""
    target, source = root / BULK, root / BULK_SOURCE
    compiler = shlex.split(compiler_command)
    if shutil.which(compiler[0]) is None:
        complaint = f"there is no C compiler {compiler[0]}"
    else:
        new = target.with_suffix(f".{os.getpid()}")
        digest = f'-DBULK_DIGEST="{hashlib.sha256(source.read_bytes()).hexdigest()}"'  # bulk.py compares it
        command = [*compiler, *BULK_FLAGS, digest, "-o", str(new), str(source)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
        if done.returncode == 0:
            new.replace(target)
            return True
        complaint = f"{compiler[0]} ended with status {done.returncode}: {done.stderr.strip()}"
    there = target.exists()
    result = "stays as it is" if there else "is left out, so images are encrypted more slowly"
    print(f"luks-csi: {BULK} {result}: {complaint}", file=sys.stderr)  # noqa: T201 - a build says so
    return there


class MakeHook(BuildHookInterface[Any]):
    """Makes everything before hatchling collects the files of a wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Make it in the tree that is being built; a wheel with a compiled part is one for this machine only."""
        root = Path(self.root)
        generate(root)
        if compile_bulk(root, COMPILER):
            build_data["artifacts"].append(f"/{BULK}")
            build_data["pure_python"] = False
            # Any Python 3: the compiled part does not know Python.
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


if __name__ == "__main__":
    generate(Path(__file__).parent)
    compile_bulk(Path(__file__).parent, COMPILER)
