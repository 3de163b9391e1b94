"""Opening a model and shards for an evaluation: what does not go together is a sentence, before any work."""

import dataclasses
from pathlib import Path

import pytest
import torch
from fixtures import FACTS, fake_sample, fake_shards, tokenizer

from eval import image_generation, speech
from eval.retrieval import RetrievalConfig, measure
from eval.task import EvalConfig, open_split, open_task
from opt.checkpoint import from_pretrained, save_pretrained
from opt.cli import main
from opt.config import UserError
from opt.systems.system import Sampling, build, load


def system(**facts):
    return build("opt", load("opt.tiny").model, tokenizer(), dataclasses.replace(FACTS, **facts))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A model trained without image codes, and shards with everything."""
    folder = tmp_path_factory.mktemp("eval")
    save_pretrained(system(codebook=0), folder / "model")
    fake_shards(folder / "shards", [fake_sample(number) for number in range(4)])
    return folder / "model", folder / "shards"


def test_other_features_than_those_of_the_training_are_refused(folders):
    with pytest.raises(UserError, match="10 numbers, not 11"):
        open_split(folders[1], None, system(speech_width=11))


def test_a_model_without_image_codes_cannot_draw(folders, tmp_path):
    config = image_generation.TextToImageConfig(*folders, out=tmp_path)
    with pytest.raises(UserError, match="trained without image codes"):
        image_generation.text_to_image(config)


@pytest.mark.parametrize("change", [{"seed": -1}, {"batch": 0}, {"limit": 0}, {"limit": -2}])
def test_numbers_out_of_range_name_their_option(folders, tmp_path, change):
    with pytest.raises(UserError, match=f"--{next(iter(change))}"):
        open_task("transcribe", "transcribe", speech.TranscribeConfig(*folders, out=tmp_path, **change))


def test_a_folder_that_cannot_be_written_is_found_before_any_work(folders, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["eval", "transcribe", *map(str, folders), "--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "transcribe from" not in said


def test_the_command_of_a_result_repeats_its_sampling(folders, tmp_path):
    sampling = Sampling(beams=4, length_penalty=0.5)
    task = open_task("transcribe", "transcribe", speech.TranscribeConfig(*folders, out=tmp_path, sampling=sampling))
    assert task.provenance.command.endswith(f"--out {tmp_path} --sampling.beams 4 --sampling.length-penalty 0.5")


@pytest.mark.parametrize("change", [{"confidence": float("nan")}, {"confidence": 2.0}, {"pictures": 0}])
def test_options_of_drawing_out_of_range_are_refused(folders, tmp_path, change):
    config = image_generation.TextToImageConfig(*folders, out=tmp_path, **change)
    with pytest.raises(UserError, match=f"--{next(iter(change)).replace('_', '-')}"):
        image_generation.text_to_image(config)


def test_a_model_whose_training_diverged_is_refused_not_praised(folders, tmp_path):
    model, shards = folders
    broken = from_pretrained(model)
    with torch.no_grad():
        next(broken.parameters()).view(-1)[0] = float("nan")
    save_pretrained(broken, tmp_path / "model")
    with pytest.raises(UserError, match="holds NaN or infinity"):
        open_task("retrieval", "retrieval", EvalConfig(tmp_path / "model", shards, tmp_path / "results"))


@pytest.mark.parametrize("broken", ["embed", "fuse"])
def test_what_is_not_finite_is_no_hit(make_task, monkeypatch, broken):
    task = make_task((3, 1))
    sound = getattr(task.system, broken)
    monkeypatch.setattr(task.system, broken, lambda *given: sound(*given) * float("nan"))
    with pytest.raises(UserError, match="no finite number for scene-0"):
        measure(task, RetrievalConfig(Path("model"), Path("shards")))


@pytest.mark.parametrize("named", [".", "../model", "../shards/../model", "../model/"])
def test_results_lie_beside_the_model_however_it_is_named(folders, monkeypatch, named):
    model, shards = folders
    monkeypatch.chdir(model)
    folder = open_task("caption", "caption", EvalConfig(Path(named), shards)).folder
    assert folder.resolve() == (model.parent / "results").resolve()
