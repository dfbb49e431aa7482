"""Entry point of ``python -m recipes.missed_steps``."""

import sys

try:
    from .cli import main
except ModuleNotFoundError as error:
    sys.exit(
        f"missed_steps: this recipe needs {error.name}, which is not installed; "
        'run `pip install -e ".[recipes]"` at the root of the repository.'
    )

sys.exit(main())
