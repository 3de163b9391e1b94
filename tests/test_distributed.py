"""Two processes, each with half the rows of a batch, against one process with all: the same losses and gradients.

The file run as a program is one of the two processes.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fixtures import FACTS, fake_sample, tokenizer

from opt.data.batch import Batch
from opt.data.plan import BatchPlan, row_keys, split
from opt.distributed import sum_over_ranks
from opt.objectives.term import loss
from opt.systems.opt import OPT, OPTConfig
from opt.systems.system import Progress

TASKS = {
    "even": ["mlm", "mlm", "mvm", "mvm", "mam", "mam", "dtr", "dtr", "dir", "dir", "match", "match"],
    "uneven": ["mlm", "match", "mlm", "mam", "mlm", "mam", "mvm", "mam", "match", "match", "dtr", "mlm"],
    "empty": ["mlm", "mvm", "dtr", "mam", "mlm", "dir", "mlm", "match", "dtr", "mvm", "mlm", "mvm"],
    "absent": ["mlm", "dir"] * 6,
}
"""Rows by turns to the first and the second process."""
TERMS = {"mlm", "mvfr", "mrc", "mafr", "mac", "dtr", "dir", "match"}
ROWS = 12


def system(mixing: str = "rows") -> OPT:
    torch.manual_seed(0)
    config = OPTConfig(width=16, layers=2, heads=2, inner=32, decoder_layers=1, dropout=0.0, mixing=mixing)
    return OPT(config, tokenizer(), FACTS).train()


def rows(model: OPT, case: str) -> BatchPlan:
    """The global batch of a case: samples of different lengths, some without speech or regions."""
    names = model.preparer().tasks.names
    sample = np.arange(ROWS)
    partners = np.stack([(sample + 1) % ROWS, (sample + 2) % ROWS], axis=1)
    task = np.array([names.index(name if name in names else "joint") for name in TASKS.get(case, ["joint"] * ROWS)])
    return BatchPlan(sample, task, partners, row_keys(7, 0, sample), 0, 0, ROWS)


def batch(model: OPT, plan: BatchPlan) -> Batch:
    samples = {number: fake_sample(number, speech=number % 5 != 4, regions=number % 7 != 6) for number in range(ROWS)}
    return model.preparer()(samples, plan)


def step(model: OPT, prepared: Batch) -> dict[str, torch.Tensor]:
    """Losses by term and gradients by parameter of one step."""
    prepared = dataclasses.replace(prepared, counts=sum_over_ranks(prepared.counts))
    terms = model(prepared, Progress(0, 0.0)).terms
    loss(terms).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return {**{f"loss {name}": term.mean().detach() for name, term in terms.items()}, **gradients}


def run_as_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for case in [*TASKS, "joint"]:
        model = system("joint" if case == "joint" else "rows")
        results = step(model, batch(model, split(rows(model, case), rank, 2)))
        for result in results.values():
            dist.all_reduce(result)
        if rank == 0:
            torch.save(results, folder / f"{case}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes computed, summed over both, by case."""
    folder = tmp_path_factory.mktemp("two")
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    command = [sys.executable, __file__]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    return folder


@pytest.mark.parametrize("case", [*TASKS, "joint"])
def test_two_processes_equal_one(two: Path, case: str) -> None:
    model = system("joint" if case == "joint" else "rows")
    plan = rows(model, case)
    prepared = batch(model, plan)
    expected, found = step(model, prepared), torch.load(two / f"{case}.pt", weights_only=True)
    assert {name for name in expected if name.startswith("loss ")} == {f"loss {name}" for name in TERMS}
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}")
    halves = [batch(model, split(plan, rank, 2)).counts for rank in range(2)]
    assert all(float(halves[0][name] + halves[1][name]) == float(count) for name, count in prepared.counts.items())
    if case in ("uneven", "empty"):
        assert any((halves[0][name] == 0) != (halves[1][name] == 0) for name in prepared.counts)
    if case == "absent":
        assert prepared.counts["frames"] == 0 and expected["loss mac"] == 0


def test_a_single_process_keeps_its_counts() -> None:
    counts = {"mlm": torch.tensor(3.0), "match": torch.tensor(0.0)}
    assert sum_over_ranks(counts) is counts


if __name__ == "__main__":
    run_as_rank(int(sys.argv[1]), Path(sys.argv[2]))
