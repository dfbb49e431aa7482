"""Entry point of ``python -m recipes.low_precision``."""

import sys

try:
    from .cli import main
except ModuleNotFoundError as error:
    sys.exit(
        f"low_precision: this recipe needs {error.name}, which is not installed; "
        'run `pip install -e ".[recipes]"` at the root of the repository.'
    )

sys.exit(main())
