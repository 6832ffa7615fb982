"""The version of this package, as its installation knows it."""

from importlib.metadata import PackageNotFoundError, version


def tool_version() -> str:
    """The installed version of this package."""
    try:
        return version("convrewrite")
    except PackageNotFoundError:
        return "0+unknown"
