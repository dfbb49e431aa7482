"""Entry point of ``python -m sparseadam``."""

import sys

from .bench.cli import main

sys.exit(main())
