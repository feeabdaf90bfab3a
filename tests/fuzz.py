"""`make fuzz`: each header parser fed by atheris, which looks for bytes that lead to new code.

`python -m tests.fuzz TARGET SECONDS` runs one of those that `python -m tests.fuzz_targets` names. A traceback, more
than 1 GiB of memory or ten seconds for one input end it, and the input is kept as `build/fuzz/crash-…`, `oom-…` or
`timeout-…`.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["csi_driver"]):
    from tests.fuzz_targets import targets


def main() -> None:
    """Run the target that the arguments name."""
    target, seconds = targets()[sys.argv[1]], int(sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="corpus-") as corpus:
        for number, seed in enumerate(target.seeds):
            Path(corpus, str(number)).write_bytes(seed)
        limits = (
            "-rss_limit_mb=1024",
            "-timeout=10",
            "-artifact_prefix=build/fuzz/",
            f"-max_total_time={seconds}",
            "-print_final_stats=1",
        )
        longest = max(2 * max(map(len, target.seeds)), 4096)
        atheris.Setup([sys.argv[0], corpus, f"-max_len={longest}", *limits], target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
