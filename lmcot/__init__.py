"""LM-guided chain of thought: a small language model reasons, a frozen large one answers."""

__version__ = "0.1.0"
