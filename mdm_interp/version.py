"""Versions of what is installed."""

import importlib.metadata


def version_of(package: str) -> str:
    """Return a package's version, or `not installed`, as of one that runs from a checkout on the path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


__version__ = version_of("mdm-interp")
