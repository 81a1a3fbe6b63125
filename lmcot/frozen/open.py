"""From settings to a frozen LM."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

from lmcot.config import (
    FrozenSettings,
    OpenAIFrozen,
    PromptSettings,
    TransformersFrozen,
    VllmFrozen,
)
from lmcot.errors import UserError
from lmcot.frozen.backend import FrozenBackend
from lmcot.frozen.cache import ReplyCache, cache_path
from lmcot.frozen.cached import CachedLM
from lmcot.frozen.needs import Found, Needs
from lmcot.records import Usage

# Backends are imported when they are used: torch is heavy, and openai need not be installed.


def _transformers() -> type[FrozenBackend]:
    from lmcot.frozen.transformers_backend import TransformersLM

    return TransformersLM


def _vllm() -> type[FrozenBackend]:
    from lmcot.frozen.vllm_backend import VllmLM

    return VllmLM


def _openai() -> type[FrozenBackend]:
    if importlib.util.find_spec("openai") is None:
        raise UserError(
            "frozen.backend is 'openai', but the package openai is not installed: "
            "run pip install 'lmcot[openai]'"
        )
    from lmcot.frozen.openai.backend import OpenAILM

    return OpenAILM


BACKENDS: Mapping[type[FrozenSettings], Callable[[], type[FrozenBackend]]] = {
    TransformersFrozen: _transformers,
    VllmFrozen: _vllm,
    OpenAIFrozen: _openai,
}
"""What imports the backend of each class of settings."""


def open_frozen_lm(settings: FrozenSettings, prompts: PromptSettings) -> CachedLM:
    """The frozen LM that the settings name, loaded and ready, behind its cache.

    Raises:
        UserError: if its weights do not load, its package or API key is missing, or the cache
            cannot be opened.
    """
    cache = None
    if settings.cache.enabled:
        path, size = cache_path(settings.cache.folder), int(settings.cache.max_gib * 2**30)
        cache = ReplyCache(path, size)
    lm = BACKENDS[type(settings)]().open(settings, prompts)
    return CachedLM(lm, cache, whole_calls=settings.isolates_calls)


def check_frozen_lm(
    settings: FrozenSettings, needs: Needs, spend: Callable[[Usage], None] = lambda usage: None
) -> Found:
    """Checks what can be told without loading weights; an endpoint is asked what the run will ask.

    Args:
        spend: takes each request to an endpoint into account; what it raises ends the check.

    Raises:
        UserError: if there is no model at the source, or the package or API key is missing, or
            the endpoint does not answer.
    """
    return BACKENDS[type(settings)]().check(settings, needs, spend)
