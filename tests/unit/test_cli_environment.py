"""What a command sets for the libraries that it loads."""

import os
import subprocess
import sys

_PROGRAM = """
import os
from csi_driver.cli.main import main
try:
    main(["--version"])
finally:
    print(os.environ["GRPC_ENABLE_FORK_SUPPORT"])
"""


def test_no_thread_of_grpc_ends_a_program_that_a_command_runs() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert done.stdout.split()[-1] == "0"
