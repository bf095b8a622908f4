"""The chaos benchmark at its smallest: four kills of a method that keeps something of each image."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "benchmarks/chaos.py"


def test_four_kills(tmp_path, child):
    words = ["--only", "deepcluster", "--kills", "2", "--pair-kills", "2", "--no-others", "--json", str(tmp_path / "c")]
    environment = {**child, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], env=environment, capture_output=True, text=True, cwd=os.fspath(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "c").read_text())
    assert told["made"] == told["survived"] == 4 and told["apart"] == 0
    assert [row["apart"] for row in told["rows"]] == [0, 0] and sum(row["saving"] for row in told["rows"]) >= 1
    assert all(row["most_lost"] <= 12 for row in told["rows"]), "two checkpoints' worth: one may have been half written"
