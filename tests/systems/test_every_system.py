"""What every system must do, found by its file in opt/systems: learn a batch, use every parameter, be the same in two
processes as in one, bear what is missing, and come back from disk as it was."""

import dataclasses
from pathlib import Path

import pytest
import torch
from shrunken import EVERY, ROWS, batch_of, lacking, made, sample
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from training import Job

from opt.checkpoint import from_pretrained, save_pretrained
from opt.data.batch import Batch
from opt.distributed import rank, sum_over_ranks, world
from opt.objectives.term import loss
from opt.recipe import OptimConfig
from opt.systems.system import Progress, System
from pretrain.optim import adamw
from pretrain.parallel import processes
from pretrain.state import States, load_state, newest_state

EARLY = Progress(3, 0.03)
KEPT = torch.tensor(True)


def step(system: System, optimizer: torch.optim.Optimizer, batch: Batch, progress: Progress = EARLY) -> float:
    """One step of training: the loss before it."""
    output = system(batch, progress)
    value = loss(output.terms)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    system.after_step([output.carry], KEPT)
    return value.item()


def trained(system: System) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in system.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("preset", EVERY)
def test_it_learns_a_batch_by_heart(preset: str) -> None:
    system = made(preset)
    batch = batch_of(system, {number: sample(number) for number in range(8)})
    optimizer = adamw(system, OptimConfig(learning_rate=4e-3, weight_decay=0.0))
    values = [step(system, optimizer, batch, Progress(number, number / 120)) for number in range(120)]
    assert min(values[-10:]) < 0.6 * values[0], values[::20]


@pytest.mark.parametrize("preset", EVERY)
def test_its_sizes_are_known_before_its_memory_is_taken(preset: str) -> None:
    with torch.device("meta"):
        sizes = made(preset)
    there = {name: value.shape for name, value in made(preset).state_dict().items()}
    assert {name: value.shape for name, value in sizes.state_dict().items()} == there


@pytest.mark.parametrize("preset", EVERY)
def test_every_trained_parameter_gets_a_gradient(preset: str) -> None:
    system, found = made(preset), set()
    for turn in range(3):  # a row draws one of several tasks
        loss(system(batch_of(system, turn=turn), EARLY).terms).backward()
        found |= {name for name, parameter in trained(system) if parameter.grad is not None and parameter.grad.any()}
        assert all(parameter.grad is not None for _, parameter in trained(system))
    assert not [name for name, _ in trained(system) if name not in found]


@pytest.mark.parametrize("missing", ["image", "speech", "caption"])
@pytest.mark.parametrize("preset", EVERY)
def test_a_modality_that_nobody_has_leaves_the_loss_finite(preset: str, missing: str) -> None:
    if preset.startswith("dvae"):
        pytest.skip("a dVAE reads nothing but pictures")
    system = made(preset)
    batch = batch_of(system, {number: sample(number, **{missing: False}) for number in range(6)})
    value = loss(system(batch, EARLY).terms)
    value.backward()
    assert value.isfinite()
    for name, parameter in trained(system):
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("preset", EVERY)
def test_it_comes_back_from_its_training_state(preset: str, tmp_path: Path) -> None:
    system = made(preset)
    optimizer = adamw(system, OptimConfig())
    for turn in range(2):
        step(system, optimizer, batch_of(system, turn=turn))
    before = {name: value.clone() for name, value in system.state_dict().items()}
    states = States(tmp_path, 1)
    states.save(2, lambda: dict(zip(("model", "optimizer"), get_state_dict(system, optimizer), strict=True)))
    states.join()
    torch.manual_seed(1)  # a dVAE draws
    expected = step(system, optimizer, batch_of(system, turn=2))
    with torch.no_grad():
        for value in system.state_dict().values():
            value.copy_(torch.zeros_like(value))
    model, moments = get_state_dict(system, optimizer)
    newest = newest_state(tmp_path)
    assert newest is not None
    load_state(newest, {"model": model, "optimizer": moments})
    set_state_dict(system, optimizer, model_state_dict=model, optim_state_dict=moments)
    for name, value in system.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.manual_seed(1)
    assert step(system, optimizer, batch_of(system, turn=2)) == expected


@pytest.mark.parametrize("preset", EVERY)
def test_its_exported_folder_is_the_same_model(preset: str, tmp_path: Path) -> None:
    system = made(preset)
    step(system, adamw(system, OptimConfig()), batch_of(system))
    save_pretrained(system, tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    assert again.config == system.config and again.name == system.name
    batch = batch_of(again)
    system.eval()
    torch.manual_seed(1)
    expected = {name: term.total for name, term in system(batch, EARLY).terms.items()}
    torch.manual_seed(1)
    found = {name: term.total for name, term in again(batch, EARLY).terms.items()}
    assert found == expected
    for name, value in again.state_dict().items():
        assert torch.equal(value, system.state_dict()[name]), name


def steps(preset: str) -> dict[str, torch.Tensor]:
    """Two steps of this process's rows: losses and gradients of all processes, and what the model then holds."""
    system, found = made(preset), {}
    samples = {number: lacking(number) for number in range(ROWS)}
    for turn in range(2):
        batch = batch_of(system, samples, rank(), world(), turn)
        batch = dataclasses.replace(batch, counts=sum_over_ranks(batch.counts))
        torch.manual_seed(0)
        output = system(batch, EARLY)
        share = loss(output.terms)
        share.backward()
        found |= sum_over_ranks({f"{turn} loss {name}": term.total.detach() for name, term in output.terms.items()})
        gradients = {name: parameter.grad for name, parameter in trained(system)}
        for name, gradient in gradients.items():
            assert gradient is not None
            found[f"{turn} gradient {name}"] = sum_over_ranks({"": gradient.clone()})[""]
        with torch.no_grad():
            for name, parameter in trained(system):
                parameter -= 0.01 * found[f"{turn} gradient {name}"]
                parameter.grad = None
        system.after_step([output.carry], KEPT)
    return found | {name: value.clone() for name, value in system.state_dict().items()}


def save_steps(presets: list[str], folder: Path) -> None:
    """What each of two processes does."""
    with processes():
        for preset in presets:
            found = steps(preset)
            if rank() == 0:
                torch.save(found, folder / f"{preset}.pt")


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By preset that is asked for, what two processes found."""
    folder = tmp_path_factory.mktemp("two")
    asked = [item.callspec.params["preset"] for item in request.session.items
             if getattr(item, "originalname", "") == "test_two_processes_are_one"]
    assert Job(2, save_steps, asked, folder).wait(200) == [0, 0]
    return folder


@pytest.mark.parametrize("preset", [preset for preset in EVERY if not preset.startswith("dvae")])
def test_two_processes_are_one(preset: str, two: Path) -> None:
    """A dVAE draws on the device, each process for itself: tests/test_distributed.py has what holds of it."""
    expected, found = steps(preset), torch.load(two / f"{preset}.pt", weights_only=True)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, at=name: f"{at}: {text}")
