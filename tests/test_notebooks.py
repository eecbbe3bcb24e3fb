"""Every notebook runs from start to end, in its short form, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path):
    environment = os.environ | {"EBM_PPL_FAST": "1", "EBM_PPL_OUT": str(tmp_path), "MPLBACKEND": "Agg"}
    run = subprocess.run([sys.executable, str(notebook)], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert list(tmp_path.glob("*.png")), "a notebook writes at least one picture"
