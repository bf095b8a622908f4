"""The README's script for a cluster, as it stands there, under a scheduler that sends signals and runs it again."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SMALL = "--backbone test_resnet --image-size 32 --batch-size 8 --precision fp32 --device cpu --workers 1 --epochs 9"


def script() -> str:
    (text,) = re.findall(r"<!-- slurm -->\n```sh\n(.*?)```\n<!-- /slurm -->", (ROOT / "README.md").read_text(), re.S)
    return text


def test_the_script_gets_through_time_limits(photos, tmp_path, child, warm):
    """`srun` hands signals on and gives the code back, `scontrol requeue` leaves a mark, and the job is run again."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tmp_path / "leaves").symlink_to(photos)
    ours = f'exec {sys.executable} -m sslpre "${{@:2}}" {SMALL}'
    (tools / "srun").write_text(f"#!/bin/bash\necho $$ > job.pid\n{ours}\n")
    (tools / "scontrol").write_text('#!/bin/bash\n[ "$1 $2" = "requeue 77" ] && touch requeued\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (tmp_path / "job.sh").write_text(script())
    environment = {**child, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    run, jobs = tmp_path / "runs/leaves", 0
    while True:
        jobs += 1
        (tmp_path / "requeued").unlink(missing_ok=True)
        (tmp_path / "job.pid").unlink(missing_ok=True)
        with open(tmp_path / "job.log", "a") as log:
            job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment, stdout=log, stderr=log)
        limit = jobs * 18  # steps at which the time is up
        while job.poll() is None and jobs < 3 and not any(run.glob(f"checkpoints/step-{limit:08d}/MANIFEST*")):
            time.sleep(0.01)
        if job.poll() is None and jobs < 3:
            os.kill(int((tmp_path / "job.pid").read_text()), signal.SIGUSR1)
        assert job.wait(timeout=120) == 0, (tmp_path / "job.log").read_text()
        if not (tmp_path / "requeued").exists():
            break
    told = (tmp_path / "job.log").read_text()
    assert jobs == 3 and told.count("error: stopped by SIGUSR1: `runs/leaves` is saved at step") == 2
    again = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "was finished already" in again.stderr
    words = ["pretrain", "simclr", "leaves", "--out", "whole", *SMALL.split()]
    assert warm.start(*words, cwd=tmp_path, env=child).wait(120) == 0
    a, b = (load_file(path / "encoder/model.safetensors") for path in (run, tmp_path / "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


def test_the_script_does_not_requeue_what_failed(tmp_path, child):
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", "exit 4"), ("scontrol", "touch requeued")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(script())
    environment = {**child, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    assert subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=environment).returncode == 4
    assert not (tmp_path / "requeued").exists()
