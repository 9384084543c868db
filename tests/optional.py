"""Whether a test of what the lock does not have may be skipped."""

import os
from importlib.util import find_spec


def missing(name: str) -> bool:
    """True where the package is not installed. Where `STACKPKG_OPTIONAL` says that it must be, that is an error."""
    absent = find_spec(name) is None
    if absent and os.environ.get("STACKPKG_OPTIONAL"):
        raise ModuleNotFoundError(f"{name} is not installed, and STACKPKG_OPTIONAL asks for it")
    return absent
