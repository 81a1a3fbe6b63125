"""The generation engine: whatever samples from a model, or scores with it, goes through it."""
