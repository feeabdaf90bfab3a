import json
import subprocess
import sys

CODE = """
import ctypes, json, resource, sys
from csi_driver.host import hardening
hardening.harden_process()
print(json.dumps({
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
}))
"""


def test_a_hardened_process_leaves_no_core() -> None:
    answer = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, timeout=30)
    facts = json.loads(answer.stdout)
    assert facts["core"] == [0, 0]
    assert facts["dumpable"] == 0
