"""Missed steps: what skipping the rows that a batch leaves out costs, and what replaying their steps brings back.

Run it with ``python -m recipes.missed_steps`` from the root of the repository.
"""
