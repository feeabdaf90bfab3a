"""`make sanity`: csi-sanity against the real server with encrypted volumes, mount and block, on real dm-crypt.

Nothing is skipped or focused by us. What csi-sanity skips by itself, because a capability is not advertised, must be
exactly what tests/data/sanity-skips.json lists, with a reason for each.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

from tests.machine.server import ServerProcess

_SKIPS = Path(__file__).parent.parent / "data" / "sanity-skips.json"
_PASSPHRASE = "csi-sanity's own passphrase"
_MIB = 1 << 20
_RUN_SECONDS = 900
_SECRETS = (
    "CreateVolumeSecret",
    "NodeStageVolumeSecret",
    "NodePublishVolumeSecret",
    "ControllerValidateVolumeCapabilitiesSecret",
)


def main() -> int:
    """Run both access types; returns 0 when nothing failed and the skips are the listed ones."""
    program, state = os.environ["CSI_SANITY"], Path(os.environ.get("MACHINE_STATE", "/var/tmp"))
    listed = {skip: reason for reason, skips in json.loads(_SKIPS.read_text()).items() for skip in skips}
    passed = failed = 0
    skipped: set[str] = set()
    with tempfile.TemporaryDirectory(dir=state, prefix="sanity-") as folder:
        for access_type in ("mount", "block"):
            results = _run(program, Path(folder) / access_type, access_type)
            passed += sum(status == "passed" for status in results.values())
            failed += sum(status not in ("passed", "skipped", "pending") for status in results.values())
            skipped |= {name for name, status in results.items() if status in ("skipped", "pending")}
    unlisted, needless = skipped - listed.keys(), listed.keys() - skipped
    for name in sorted(unlisted):
        print(f"skipped and not listed: {name}")
    for name in sorted(needless):
        print(f"listed and not skipped: {name}")
    print(
        f"sanity: passed={passed} failed={failed} skipped={len(skipped)} listed={len(listed)} "
        f"unlisted={len(unlisted)} needless={len(needless)}"
    )
    return 0 if passed and not (failed or unlisted or needless) else 1


def _run(program: str, folder: Path, access_type: str) -> Mapping[str, str]:
    folder.mkdir()
    files = {"secrets": folder / "secrets.yaml", "parameters": folder / "parameters.yaml", "report": folder / "out.xml"}
    files["secrets"].write_text("".join(f"{name}:\n  CRYPTO_KEY_VALUE: {_PASSPHRASE!r}\n" for name in _SECRETS))
    files["parameters"].write_text('encrypted: "true"\npbkdf: "pbkdf2"\npbkdfIterations: "1000"\n')
    with ServerProcess(folder / "server") as server:
        argv = [
            program,
            f"-csi.endpoint=unix://{server.endpoint}",
            f"-csi.mountdir={folder / 'mount'}",
            f"-csi.stagingdir={folder / 'stage'}",
            f"-csi.secrets={files['secrets']}",
            f"-csi.testvolumeparameters={files['parameters']}",
            f"-csi.testvolumeaccesstype={access_type}",
            f"-csi.testvolumesize={64 * _MIB}",
            f"-csi.testvolumeexpandsize={128 * _MIB}",
            f"-ginkgo.junit-report={files['report']}",
            "-ginkgo.no-color",
            "-ginkgo.succinct",
        ]
        ended = subprocess.run(argv, check=False, timeout=_RUN_SECONDS, stdout=subprocess.PIPE, text=True)
        if ended.returncode:
            print(ended.stdout)
            print(server.log())
    return {
        case.attrib["name"]: case.attrib["status"]
        for case in ET.parse(files["report"]).iter("testcase")  # noqa: S314 - csi-sanity wrote it just now
        if case.attrib["name"].startswith("[It]")
    }


if __name__ == "__main__":
    sys.exit(main())
