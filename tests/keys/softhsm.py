"""A PKCS#11 token of SoftHSM with an AES key, made as docs/kms.md says, and our program for it among a driver's."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MODULE = "/usr/lib/softhsm/libsofthsm2.so"
TOKEN = "luks"
KEY = "csi"
PIN = "4711-a-pin"
_PROGRAM = Path(__file__).parents[2] / "deploy" / "kms" / "pkcs11.py"


@dataclass(frozen=True)
class SoftHsm:
    """A token whose content is in `folder`, as the PIN's file is; the driver's programs are in `programs`."""

    folder: Path
    programs: Path

    @property
    def entry(self) -> dict[str, object]:
        """What the KMS configuration says."""
        return {"encryptionKMSType": "exec", "program": _PROGRAM.name, "arguments": [TOKEN, KEY]}

    @property
    def pin_file(self) -> Path:
        return self.folder / "pin"

    @property
    def environment(self) -> dict[str, str]:
        return {"SOFTHSM2_CONF": str(self.folder / "softhsm2.conf")}

    def run(self, *argv: str) -> None:
        """Run one of the tools for it. Raises CalledProcessError."""
        subprocess.run(argv, env=os.environ | self.environment, check=True, capture_output=True, timeout=60)

    def tool(self, *arguments: str) -> None:
        """What somebody does by hand."""
        self.run("pkcs11-tool", "--module", MODULE, "--token-label", TOKEN, "--login", "--pin", PIN, *arguments)

    def make_key(self, label: str = KEY, key_id: str = "01") -> None:
        self.tool("--keygen", "--key-type", "AES:32", "--sensitive", "--label", label, "--id", key_id)

    def destroy_key(self, label: str = KEY, key_id: str = "01") -> None:
        self.tool("--delete-object", "--type", "secrkey", "--label", label, "--id", key_id)

    def settle(self, module: str = MODULE, token: str = TOKEN) -> None:
        """Write the program's settings."""
        entry = {"module": module, "pinFile": str(self.pin_file), "environment": self.environment}
        (self.programs / "pkcs11.json").write_text(json.dumps({token: entry}))


def soft_hsm(folder: Path, programs: Path) -> SoftHsm:
    """Make one, with a key."""
    made = SoftHsm(folder, programs)
    tokens = folder / "tokens"
    tokens.mkdir(parents=True)
    programs.mkdir(exist_ok=True)
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {tokens}\n")
    made.pin_file.write_text(f"{PIN}\n")
    made.run("softhsm2-util", "--init-token", "--free", "--label", TOKEN, "--pin", PIN, "--so-pin", f"so-{PIN}")
    made.make_key()
    shutil.copy(_PROGRAM, programs)
    made.settle()
    return made
