"""The templates of the frozen LM's prompts, with the demonstrations that the settings ask for."""

from __future__ import annotations

from lmcot.config import PromptSettings
from lmcot.data.prompts import PromptTemplates, load_templates


def open_templates(prompts: PromptSettings) -> PromptTemplates:
    """The templates that the settings name, with their demonstrations.

    Raises:
        UserError: if there are no such templates, or fewer demonstrations than are to be shown.
    """
    return load_templates(prompts.templates).showing(prompts.demonstrations)
