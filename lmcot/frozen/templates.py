"""The templates of the frozen LM's prompts, with the demonstrations that the settings ask for."""

from __future__ import annotations

from dataclasses import replace

from lmcot.config import DrawnDemonstrations, PromptSettings
from lmcot.data.demonstrations import Nearest
from lmcot.data.prompts import PromptTemplates, templates_for

EMBEDDINGS = "prompts.demonstrations.embeddings"


def open_templates(prompts: PromptSettings) -> PromptTemplates:
    """The templates that the settings name, with their demonstrations.

    Args:
        prompts: the settings; what is to be drawn was drawn.

    Raises:
        UserError: if there are no such templates, fewer demonstrations than are to be shown, or no
            such model of embeddings.
        ValueError: if the demonstrations are still to be drawn.
    """
    templates, wanted = templates_for(prompts), prompts.demonstrations
    if isinstance(wanted, int):
        return templates.showing(wanted)
    if isinstance(wanted, DrawnDemonstrations):
        raise ValueError("the demonstrations are not drawn yet")
    nearest = None
    if wanted.nearest is not None:
        from lmcot.models.embeddings import SentenceEmbedder  # loads torch

        embedder = SentenceEmbedder(wanted.embeddings, setting=EMBEDDINGS)
        nearest = Nearest(wanted.examples, wanted.nearest, embedder.embed)
    return replace(templates, demonstrations=wanted.examples, nearest=nearest)
