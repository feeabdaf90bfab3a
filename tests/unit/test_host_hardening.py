import json
import subprocess
import sys

from csi_driver.host import hardening

CODE = """
import ctypes, json, resource, sys
from csi_driver.host import hardening
hardening.harden_process()
locked = hardening.lock_memory()
with open("/proc/self/status") as status:
    fields = dict(line.split(":", 1) for line in status)
print(json.dumps({
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
    "locked": locked,
    "locked_kib": int(fields["VmLck"].split()[0]),
}))
"""


def test_a_hardened_process_leaves_no_core_and_its_memory_is_locked_where_that_is_said() -> None:
    answer = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, timeout=30)
    facts = json.loads(answer.stdout)
    assert facts["core"] == [0, 0]
    assert facts["dumpable"] == 0
    assert facts["locked"] == (facts["locked_kib"] > 0)


def test_memory_that_may_not_be_locked_is_reported() -> None:
    limited = (
        "import ctypes, os, resource\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"  # root may lock whatever the limit says
        "from csi_driver.host import hardening\n"
        "print(hardening.lock_memory())\n"
    )
    # Imported before the change of user: the tree may be readable by its owner only.
    code = "import csi_driver.host.hardening\n" + limited
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=30)
    assert answer.stdout == b"False\n"


def test_swap_is_told_from_the_kernels_list() -> None:
    with open("/proc/swaps") as swaps:
        lines = swaps.read().splitlines()
    assert hardening.swap_active() == (len(lines) > 1)
