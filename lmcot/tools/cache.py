"""`lmcot cache` shows what the frozen LM's replies take on the disk, or clears them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lmcot.frozen.cache import Held, ReplyCache, cache_path


def show_cache(folder: str | None, *, as_json: bool) -> None:
    """Prints what is held of each model's replies."""
    path = cache_path(folder)
    held = ReplyCache(path, max_bytes=0).held() if path.is_file() else []
    if as_json:
        print(json.dumps({"path": str(path), "models": [asdict(one) for one in held]}))
    elif not path.is_file():
        print(f"there is no cache at {path}")
    else:
        print(_table(held, path))


def clear_cache(folder: str | None, model: str | None, *, as_json: bool) -> None:
    """Drops all replies, or those of a model."""
    path = cache_path(folder)
    dropped: Sequence[Held] = []
    if path.is_file():
        cache = ReplyCache(path, max_bytes=0)
        dropped = [one for one in cache.held() if model in (None, one.model)]
        cache.clear(model)
    if as_json:
        print(json.dumps({"path": str(path), "dropped": [asdict(one) for one in dropped]}))
    elif path.is_file():
        print(f"dropped {sum(one.replies for one in dropped)} replies from {path}")
    else:
        print(f"there is no cache at {path}")


def _table(held: Sequence[Held], path: Path) -> str:
    lines = [f"{one.replies:9d} replies {one.bytes / 2**20:9.1f} MiB  {one.model}" for one in held]
    total = sum(one.bytes for one in held) / 2**20
    replies = sum(one.replies for one in held)
    return "\n".join([*lines, f"{replies:9d} replies {total:9.1f} MiB  in {path}"])
