"""A model says what it was trained on, through every stage and every stop; and what that makes of a test."""

import dataclasses
import json
from pathlib import Path

import pytest
from fixtures import fake_sample, fake_shards
from training import config

from opt.checkpoint import read_history
from opt.config import RunAgain, UserError
from opt.data.manifest import UNKNOWN, Origin, write_manifest
from opt.history import Corpus, Stage, regime
from opt.recipe import LoopConfig
from pretrain.finetune import FinetuneConfig, finetune
from pretrain.run import pretrain
from pretrain.trainer import Trainer

COCO, SCENES = Origin("coco", "train"), Origin("spoken_scenes", "train")


def named(folder: Path, origin: Origin, samples: range) -> Path:
    made = fake_shards(folder, [fake_sample(number) for number in samples]).manifest
    write_manifest(folder, [shard.name for shard in made.shards], made.extractors, made.region_classes, made.codebook,
                   origins=(origin,))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora, a model pretrained on both, and one tuned on the second."""
    root = tmp_path_factory.mktemp("history")
    scenes, coco = named(root / "scenes", SCENES, range(24)), named(root / "coco", COCO, range(30, 46))
    begin = config(scenes, root / "run", steps=3, save_every=1)
    pretrain(dataclasses.replace(begin, shards=(str(scenes), str(coco))))
    loop = LoopConfig(steps=2, batch_tokens=400, workers=0)
    finetune(FinetuneConfig("captioning", root / "run/model", coco, root / "tuned", loop=loop))
    return root


def test_every_stage_is_kept_with_its_corpora(runs: Path) -> None:
    first, second = read_history(runs / "tuned" / "model")
    assert (first,) == read_history(runs / "run" / "model")
    assert (first.verb, first.task, first.start, first.steps) == ("pretrain", "opt.tiny", "", 3)
    assert [(corpus.origins, corpus.samples) for corpus in first.corpora] == [((SCENES,), 24), ((COCO,), 16)]
    model = json.loads((runs / "run" / "model" / "config.json").read_text())["sha256"]
    assert (second.verb, second.task, second.start) == ("finetune", "captioning", f"model {model}")
    assert [corpus.origins for corpus in second.corpora] == [(COCO,)]
    assert first.samples_seen > 0 and second.steps == 2


def test_a_run_begun_with_a_model_keeps_its_history_over_a_stop(runs: Path, tmp_path: Path, monkeypatch) -> None:
    begin = dataclasses.replace(config(runs / "coco", tmp_path / "next", steps=4, save_every=1),
                                start=(f"model:{runs / 'run' / 'model'}",))
    real = Trainer._log_and_save

    def stop(trainer: Trainer, *arguments: object) -> None:
        real(trainer, *arguments)
        if trainer.step == 2:
            trainer.states.join()
            raise RunAgain("stopped")

    monkeypatch.setattr(Trainer, "_log_and_save", stop)
    with pytest.raises(RunAgain):
        pretrain(begin)
    monkeypatch.setattr(Trainer, "_log_and_save", real)
    pretrain(dataclasses.replace(begin, start=("model:moved away",)))
    first, second = read_history(tmp_path / "next" / "model")
    assert (first,) == read_history(runs / "run" / "model")
    assert second.start.startswith("model ") and second.steps == 4 and second.corpora[0].origins == (COCO,)


def test_a_damaged_history_is_named(runs: Path, tmp_path: Path) -> None:
    for history in ({}, [3], [{"verb": "watch"}]):
        (tmp_path / "config.json").write_text(json.dumps(
            {"system": "opt", "sha256": "", "config": {}, "facts": {}, "history": history}))
        with pytest.raises(UserError, match="config.json, history"):
            read_history(tmp_path)


def stage(verb: str, *origins: Origin, start: str = "") -> Stage:
    return Stage(verb, "", (Corpus(origins, "", 1),), start)


@pytest.mark.parametrize(
    ("history", "asked", "expected"),
    [
        ((stage("pretrain", COCO),), SCENES, "zero-shot"),
        ((stage("pretrain", COCO, SCENES),), SCENES, "in-domain"),
        ((stage("pretrain", COCO), stage("finetune", SCENES)), SCENES, "fine-tuned"),
        ((stage("pretrain", SCENES), stage("finetune", COCO)), SCENES, "in-domain"),
        ((stage("pretrain", COCO, start="bert x"), stage("finetune", COCO)), SCENES, "zero-shot"),
        ((stage("pretrain", UNKNOWN), stage("finetune", SCENES)), SCENES, "fine-tuned"),
        ((stage("pretrain", UNKNOWN),), SCENES, "unknown"),
        ((stage("pretrain", SCENES, UNKNOWN),), SCENES, "in-domain"),
        ((stage("pretrain", SCENES), stage("finetune", UNKNOWN)), SCENES, "unknown"),
        ((stage("pretrain", COCO),), UNKNOWN, "unknown"),
        ((stage("pretrain", UNKNOWN),), UNKNOWN, "unknown"),
        ((stage("finetune", COCO, start="model x"),), SCENES, "unknown"),
        ((), SCENES, "unknown"),
    ],
)
def test_the_regime_is_what_the_stages_say_of_the_corpus(history, asked, expected) -> None:
    assert regime(history, (dataclasses.replace(asked, split="test") if asked is not UNKNOWN else asked,)) == expected
