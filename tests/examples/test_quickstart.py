"""What the command line of the demonstration takes, and what it refuses."""

from __future__ import annotations

import re

import pytest

from examples import quickstart


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--threads", "0"], ["--data", "mnist"]])
def test_bad_arguments_end_with_a_message(arguments, monkeypatch, capsys):
    monkeypatch.delenv("TORCHGEOM_DATA", raising=False)
    with pytest.raises(SystemExit):
        quickstart.main(arguments)
    assert re.search("must be at least 1|pass --root DIR", capsys.readouterr().err)
