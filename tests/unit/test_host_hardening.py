import json
import subprocess
import sys

FACTS = """
import ctypes, json, resource
def tell():
    print(json.dumps({
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
    }))
"""
PROCESS = f"""{FACTS}
from csi_driver.host import hardening
hardening.harden_process()
tell()
"""
COMMAND = f"""{FACTS}
from csi_driver.cli.main import main
def look(_):
    tell()
    raise SystemExit
main(["doctor"], obj=look)
"""


def facts_of(code: str) -> object:
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    return json.loads(answer.stdout)


def test_a_hardened_process_leaves_no_core() -> None:
    assert facts_of(PROCESS) == {"core": [1, 1], "dumpable": 0}


def test_every_command_is_one_even_if_it_takes_no_secret_itself() -> None:
    """`doctor` logs in to each KMS."""
    assert facts_of(COMMAND) == {"core": [1, 1], "dumpable": 0}
