# SPDX-License-Identifier: Apache-2.0
"""The version, in one place, and what it says about how optq is installed."""

__version__ = "0.1.0.dev0"

SOURCE = "." if ".dev" in __version__ else "optq"
"""What pip installs: a copy of the repository, of a version that no index has, or the name on PyPI."""


def pip_install(extra: str = "") -> str:
    """The command that installs optq, with one of pyproject.toml's extras."""
    return f"pip install '{SOURCE}[{extra}]'" if extra else f"pip install {SOURCE}"


def how_to_install(extra: str = "") -> str:
    """The command, and where it is to be called if that matters."""
    return pip_install(extra) + (" in a copy of optq's repository" if SOURCE == "." else "")
