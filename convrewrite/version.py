"""The version of this package, as its installation knows it."""


def tool_version() -> str:
    """The installed version of this package."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and few commands ask

    try:
        return version("convrewrite")
    except PackageNotFoundError:
        return "0+unknown"
