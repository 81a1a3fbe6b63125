"""The evaluation: rows, requests, predictions, and the report with its statistics and pictures."""
