"""What every test run has in common."""

from hypothesis import settings

# Other work shares the machine: a slow example is not a failure, the limit per test in pyproject.toml is.
settings.register_profile("luks-csi", deadline=None)
settings.load_profile("luks-csi")
