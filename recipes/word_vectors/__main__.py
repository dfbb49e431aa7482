"""Entry point of ``python -m recipes.word_vectors``."""

import sys

try:
    from .cli import main
except ModuleNotFoundError as error:
    sys.exit(
        f"word_vectors: this recipe needs {error.name}, which is not installed; "
        'run `pip install -e ".[recipes]"` at the root of the repository.'
    )

sys.exit(main())
