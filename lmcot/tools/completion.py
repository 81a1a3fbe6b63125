"""`lmcot completion` prints a shell's completion of the command."""

from __future__ import annotations

import argparse
import importlib

from lmcot.errors import UserError


def show_completion(parser: argparse.ArgumentParser, shell: str) -> None:
    """Prints the completion of ``bash``, ``zsh`` or ``fish``.

    Raises:
        UserError: if shtab, which makes it of the parser, is not installed.
    """
    try:
        shtab = importlib.import_module("shtab")
    except ImportError:
        raise UserError(
            "completion needs shtab, which is not installed: pip install 'lmcot[completion]'"
        ) from None
    print(shtab.complete(parser, shell))
