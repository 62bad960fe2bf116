"""Optional dependencies: one line that says what to install, and for what."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A library of an optional extra is not installed."""


def require_extra(extra: str, module: str) -> ModuleType:
    """Import a module that belongs to an optional extra.

    Args:
        extra: Name of the extra in `pyproject.toml`, such as `"report"`.
        module: The module to import, such as `"matplotlib"`.

    Raises:
        MissingExtraError: If it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:  # it is installed, but something that it needs is not
            raise
        raise MissingExtraError(
            f"{module!r} is not installed; it comes with the extra {extra!r}: pip install 'trl-reasoning-distill[{extra}]'"
        ) from None
