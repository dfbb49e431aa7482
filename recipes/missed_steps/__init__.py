"""Missed steps: what rows that a batch leaves out lose when they are skipped, and what replaying their steps brings back.

Run it with ``python -m recipes.missed_steps`` from the root of the repository.
"""
