"""The clients of key management systems: extras of the package, loaded when an entry of their type is asked."""

import importlib
from typing import Any

from csi_driver.model.errors import FailedPrecondition


def load(module: str, where: str, extra: str) -> Any:
    """The module of that name. Raises FailedPrecondition naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FailedPrecondition(
            f"{where} needs the Python package {(error.name or module).partition('.')[0]}, which is not installed; "
            f"install it with `pip install luks-csi[{extra}]`"
        ) from None
