"""docs/training.md: its commands have options that exist, its job script goes back into the queue when told to stop."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from opt import cli

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/training.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def test_every_command_has_options_that_exist() -> None:
    lines = "".join(blocks("sh")).strip().splitlines()
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line)
        assert words[0] in ("opt", "torchrun")
        words = words[words.index("opt") + 1 :]
        config = cli._parse(cli._function(cli.VERBS[words[0]]), f"opt {words[0]}", words[1:])
        assert getattr(config, "out", None) or config.runs


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
    for path in re.findall(r"`((?:tests|pretrain|opt)/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).exists(), path


def test_every_metric_is_explained() -> None:
    written = {"step", "learning_rate", "validation", "memory_gib"}
    written |= set(re.findall(r'^            "(\w+)": ', (ROOT / "pretrain/metrics.py").read_text(), flags=re.M))
    written |= {"mfu", "peak_flops"}
    rows = re.findall(r"^\| (`.*?) \|", PAGE.partition("## Reading the metrics")[2], flags=re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == written


@pytest.mark.parametrize(("told", "status", "requeued"), [(True, 75, True), (False, 0, False), (False, 2, False)])
def test_the_job_script_queues_again_what_was_stopped(
    tmp_path: Path, told: bool, status: int, requeued: bool
) -> None:
    (script,) = blocks("bash")
    (tmp_path / "job.sh").write_text(script)
    tools = {
        "srun": 'export SLURM_PROCID=3 SLURM_LOCALID=1\nexec "$@"',
        "scontrol": 'echo "$@" >> scontrol.log; [ "$1" = show ] && printf "node7\\nnode8\\n"; true',
        "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" > started\n'
                  + ('trap "sleep 0.2; exit 75" USR1; while :; do sleep 0.05; done' if told else f"exit {status}"),
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "16",
                   "SLURM_JOB_ID": "4711"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment)
    end = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < end:
        time.sleep(0.02)
    if told:
        time.sleep(0.3)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == (0 if requeued else status)
    assert (tmp_path / "started").read_text().startswith("3 1 16 node7 29500 -m opt pretrain opt.paper")
    assert ("requeue 4711" in (tmp_path / "scontrol.log").read_text()) == requeued
