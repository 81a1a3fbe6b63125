"""The frozen LM behind an OpenAI-compatible endpoint."""
