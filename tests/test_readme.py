"""The README's own code, run from top to bottom as a reader would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshot import snapshot

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_code_runs_and_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it saves a file
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    embedding, ids, optimizer = names["embedding"], names["ids"], names["optimizer"]
    moments = optimizer.state[embedding.weight]
    assert sorted(moments["rows"].tolist()) == ids.unique().tolist()
    optimizer.zero_grad()
    exec(blocks[1], names)
    assert moments is not optimizer.state[embedding.weight]
    assert embedding.weight.shape == (1200, 50) and not embedding.weight[1000:].any()
    assert not {3, 7} & set(optimizer.state[embedding.weight]["rows"].tolist())
    optimizer.zero_grad()
    before = snapshot(optimizer)
    exec(blocks[2], names)
    assert snapshot(optimizer) == before
    rows = optimizer.state[embedding.weight]["rows"]
    theirs = names["torch_optimizer"].state[embedding.weight]["exp_avg"]
    assert torch.equal(theirs[rows], optimizer.state[embedding.weight]["exp_avg"])
