"""Code of the user's own, named ``module:name``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from lmcot.errors import UserError


def load_own(setting: str, name: str, what: str) -> Callable[..., Any]:
    """The function or class that a setting names.

    Args:
        what: which of the two it is.

    Raises:
        UserError: if the module cannot be imported, or has no such function or class.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        missing = isinstance(error, ModuleNotFoundError)
        remedy = "install it or put its folder on PYTHONPATH" if missing else "fix it"
        raise UserError(
            f"{setting} is '{name}', but the module '{module_name}' cannot be imported "
            f"({type(error).__name__}: {error}): {remedy}"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(
            f"{setting} is '{name}', but the module '{module_name}' has no {what} "
            f"'{attribute}': define it there, or name another"
        )
    return found


def own_source(setting: str, name: str) -> str:
    """The text of the module that a setting's function or class is defined in."""
    return source_of(load_own(setting, name, "function or class"))


def source_of(found: object) -> str:
    """The text of the module that a function or class is defined in; empty if it is not known."""
    module = inspect.getmodule(found)
    return inspect.getsource(module) if module is not None else ""
