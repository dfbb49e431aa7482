"""Word vectors: skip-gram with negative sampling, a task whose tables are large and sparse.

Run it with ``python -m recipes.word_vectors`` from the root of the repository.
"""
