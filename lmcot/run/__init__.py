"""What a run is: directory, questions, fleets, budgets, and what is checked before it starts."""
