"""Rejection sampling: rounds of sampling, judging, choosing and training."""
