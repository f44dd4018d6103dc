"""Faults of a running fleet's servers on purpose, and what its clients saw: ``pdserve chaos``."""
