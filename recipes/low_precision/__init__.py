"""Low precision: what moments and tables of fewer bits save on the word-vector recipe, and what they cost.

Run it with ``python -m recipes.low_precision`` from the root of the repository.
"""
