"""The Python interface: stages as functions, results as objects; see docs/python.md."""
