import sys

import pytest
import torch

from weights import run_main


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins with the same random state, alone or in the suite."""
    torch.manual_seed(0)


@pytest.fixture
def command_line(monkeypatch, capsys, tmp_path):
    """Calls a script in this process as its command line does, in an empty folder: (module, *arguments) -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        status = 0
        try:
            run_main(module.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call
