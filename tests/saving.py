"""What users do with a state."""

from __future__ import annotations

import io
from typing import Any

import torch


def through_a_file(value: Any) -> Any:
    """Save and load as users are told to."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
