"""A run: its directory, questions, fleets and budgets, and the checks before it starts."""
