"""Entry point of ``torchrun --nproc-per-node 2 -m recipes.recommender``."""

import sys

try:
    from .cli import main
except ModuleNotFoundError as error:
    sys.exit(
        f"recommender: this recipe needs {error.name}, which is not installed; "
        'run `pip install -e ".[recipes]"` at the root of the repository.'
    )

sys.exit(main())
