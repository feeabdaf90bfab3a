"""Build hook: makes the gRPC stubs and their types from `protos/`.

The stubs land in `csi_driver/rpc/`, are not committed, and are made again by each build, editable or not.
`python hatch_build.py` makes them alone.
"""

import os
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "csi_driver/rpc"
PROTOS = ("csi.proto", "pluginregistration.proto")
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")


def generate(root: Path) -> None:
    """Write `NAME_pb2` and `NAME_pb2_grpc`, each as .py and .pyi, under `root`; RuntimeError if that fails."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    arguments = [
        "protoc",
        # The virtual path makes the stubs import each other as members of the package.
        f"-I{PACKAGE}={root / 'protos'}",
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
    status = protoc.main([*arguments, *(f"{PACKAGE}/{name}" for name in PROTOS)])
    if status != 0:
        sentence = f"the stubs cannot be made: protoc ended with status {status} on {', '.join(PROTOS)}"
        raise RuntimeError(sentence)


class StubsHook(BuildHookInterface[Any]):
    """Runs `generate` before hatchling collects the files of a wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Make the stubs in the tree that is being built."""
        generate(Path(self.root))


if __name__ == "__main__":
    generate(Path(__file__).parent)
