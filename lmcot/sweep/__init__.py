"""Hyperparameter search: trials of one run with other settings, by Ray Tune."""
