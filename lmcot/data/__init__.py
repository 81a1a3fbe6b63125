"""Questions and prompts: loaders, contexts, templates, and the resumable prompt sampler."""

from lmcot.data.context import apply_context, render_context, select_context
from lmcot.data.loaders import LoadedExamples, load_examples
from lmcot.data.prompts import PromptTemplates, load_templates
from lmcot.data.render import Chat, Tokenizer, encode, render
from lmcot.data.sampler import PromptSampler

__all__ = [
    "Chat",
    "LoadedExamples",
    "PromptSampler",
    "PromptTemplates",
    "Tokenizer",
    "apply_context",
    "encode",
    "load_examples",
    "load_templates",
    "render",
    "render_context",
    "select_context",
]
