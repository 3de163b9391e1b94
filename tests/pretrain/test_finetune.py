"""Fine-tuning: a run as pretraining's, each task falls below its baseline, stop and resume are bit-equal, refusals."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from fixtures import FACTS, WORDS, fake_sample, fake_shards, tokenizer
from stopping import stopped_equals_whole

from eval.vqa import vqa
from opt import cli
from opt.checkpoint import from_pretrained, save_pretrained
from opt.config import UserError
from opt.data.record import Picture
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.opt import OPT, tiny
from opt.systems.system import compose
from pretrain.finetune import FinetuneConfig, finetune

MODEL = dataclasses.replace(
    tiny().model, width=32, layers=2, heads=2, inner=64, decoder_layers=1, alignment_width=16, text_positions=24
)
SAMPLES = [fake_sample(number) for number in range(48)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, one without alignment, shards, and questions: is there a thing of this word? "star" says yes."""
    folder = tmp_path_factory.mktemp("finetune")
    fake_shards(folder / "shards", SAMPLES)
    for name, weight in (("model", 1.0), ("unaligned", 0.0)):
        torch.manual_seed(0)
        config = dataclasses.replace(MODEL, alignment_weight=weight)
        save_pretrained(OPT(config, tokenizer(), FACTS), folder / name)
    lines = [{"image_id": sample.key, "question": f"a {word}", "answers": ["star" if word in caption else "and"]}
             for sample in SAMPLES for caption in [(sample.caption or "").split()] for word in WORDS[:4]]
    (folder / "questions").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = [(sample.caption or "").split()[0] for sample in SAMPLES]
    pairs = [(left, right) for left in range(0, 48, 3) for right in range(0, 48, 5) if left != right]
    lines = [{"image_ids": [SAMPLES[left].key, SAMPLES[right].key], "question": "a star",
              "answers": [str(first[left] == "star" or first[right] == "star").lower()]} for left, right in pairs]
    (folder / "statements").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config(
    folder: Path, task: str, out: Path, steps: int = 12, rate: float = 5e-3, **changes: object
) -> FinetuneConfig:
    loop = LoopConfig(steps=steps, batch_tokens=800, workers=0, log_every=4, save_every=max(4, steps // 2))
    questions = folder / "statements" if task == "nlvr2" else folder / "questions" if task.startswith("vqa") else None
    given = {"model": folder / "model", "shards": folder / "shards", "out": out, "questions": questions, "loop": loop,
             "optim": OptimConfig(learning_rate=rate)}
    return FinetuneConfig(task, **{**given, **changes})  # type: ignore[arg-type]


def last_losses(out: Path) -> dict[str, float]:
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["losses"]


def test_captioning_falls_below_guessing_words(folder: Path, tmp_path: Path) -> None:
    """Baseline: the entropy of a word drawn evenly among six."""
    finetune(config(folder, "captioning", tmp_path, 120))
    assert last_losses(tmp_path)["dtr"] < 0.8 * torch.log(torch.tensor(6.0)).item()


def test_in_batch_retrieval_falls_below_random_order(folder: Path, tmp_path: Path) -> None:
    """Baseline: the right picture of 48 by chance. The model had no shared space: the heads are new."""
    finetune(config(folder, "retrieval-in-batch", tmp_path, 100, model=folder / "unaligned", alignment_width=12))
    system = from_pretrained(tmp_path / "model")
    similar = system.embed(SAMPLES, ["text"]) @ system.embed(SAMPLES, ["image"]).T
    assert similar.shape == (48, 48) and system.config.alignment_width == 12
    assert (similar.argmax(1) == torch.arange(48)).float().mean() > 0.3


def test_margin_retrieval_falls_below_its_margin(folder: Path, tmp_path: Path) -> None:
    """Baseline: a model that tells nothing apart pays the margin for every false pair."""
    finetune(config(folder, "retrieval-margin", tmp_path, 200))
    assert last_losses(tmp_path)["ranking"] < 0.5 * 0.2
    system = from_pretrained(tmp_path / "model")
    true = system.score(SAMPLES, ["text", "image"])
    false = system.score([compose(text=one, image=two) for one, two in zip(SAMPLES, SAMPLES[1:] + SAMPLES[:1],
                                                                           strict=True)], ["text", "image"])
    assert (true > false).float().mean() > 0.75


@pytest.mark.parametrize("task", ["vqa-classes", "vqa-words"])
def test_answers_are_better_than_the_most_frequent_one(folder: Path, tmp_path: Path, task: str) -> None:
    """Baseline: always "and". The evaluation's verb reads the tuned model."""
    finetune(config(folder, task, tmp_path / "run", 250))
    answered = ["eval", "vqa", str(tmp_path / "run/model"), str(folder / "shards"), "--questions",
                str(folder / "questions")]
    assert cli.main(answered) == 0
    result = json.loads((tmp_path / "run/results/vqa.json").read_text())
    metric = result["metrics"][0]
    assert metric["name"] == "vqa.accuracy" and metric["value"] > metric["chance"] + 0.1
    assert result["examples"][0]["question"].startswith("a ")


def test_statements_are_judged_better_than_by_the_majority(folder: Path, tmp_path: Path) -> None:
    finetune(config(folder, "nlvr2", tmp_path / "run", 120, 3e-3))
    judged = ["eval", "nlvr2", str(tmp_path / "run/model"), str(folder / "shards"), "--statements",
              str(folder / "statements")]
    assert cli.main(judged) == 0
    accuracy, consistency = json.loads((tmp_path / "run/results/nlvr2.json").read_text())["metrics"]
    assert (accuracy["name"], consistency["name"]) == ("nlvr2.accuracy", "nlvr2.consistency")
    assert accuracy["value"] > accuracy["chance"] + 0.1 and accuracy["note"].startswith("classified; the sentence")


def test_ranked_answers_are_those_of_the_candidates(folder: Path, tmp_path: Path) -> None:
    finetune(config(folder, "vqa-words", tmp_path / "run", 20))
    ranked = ["eval", "vqa", str(tmp_path / "run/model"), str(folder / "shards"), "--questions",
              str(folder / "questions"), "--rank-answers-of", str(folder / "questions"), "--candidates", "1"]
    assert cli.main(ranked) == 0
    result = json.loads((tmp_path / "run/results/vqa.json").read_text())
    assert {line["answer"] for line in result["examples"]} == {"and"}
    assert result["metrics"][0]["value"] == result["metrics"][0]["chance"]
    assert "the likeliest of 1 candidates: sum of the log-prob" in result["metrics"][0]["note"]


def test_questions_about_another_number_of_pictures_are_refused_at_once(folder: Path, tmp_path: Path) -> None:
    for task, file in (("nlvr2", "questions"), ("vqa-classes", "statements"), ("vqa-words", "statements")):
        with pytest.raises(UserError, match="neither|tells true from false|answers questions about"):
            finetune(config(folder, task, tmp_path / "run", questions=folder / file))
    single = tmp_path / "single"
    single.write_text(json.dumps({"image_id": SAMPLES[0].key, "question": "a", "answers": ["True"]}) + "\n")
    with pytest.raises(UserError, match="has 1 picture; a model tuned for nlvr2 answers questions about 2 pictures"):
        finetune(config(folder, "nlvr2", tmp_path / "run", questions=single))
    assert not (tmp_path / "run").exists()


def test_a_head_for_two_pictures_is_kept_or_renewed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(config(folder, "nlvr2", tmp_path / "first", 2))
    assert "answer_head, over 2 answers" in capsys.readouterr().out
    finetune(config(folder, "captioning", tmp_path / "second", 2, model=tmp_path / "first/model"))
    assert from_pretrained(tmp_path / "second/model").config.tuning.pictures == 2
    finetune(config(folder, "nlvr2", tmp_path / "third", 2, model=tmp_path / "second/model"))
    assert "new in this model" not in capsys.readouterr().out
    finetune(config(folder, "vqa-classes", tmp_path / "fourth", 2, model=tmp_path / "third/model"))
    assert from_pretrained(tmp_path / "fourth/model").config.tuning.pictures == 1
    assert "new in this model: answer_head" in capsys.readouterr().out


def test_a_stopped_run_ends_bit_for_bit_as_one_that_was_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_equals_whole(lambda out: finetune(config(folder, "vqa-words", out)), tmp_path, monkeypatch)
    capsys.readouterr()
    finetune(config(folder, "vqa-words", tmp_path / "stopped"))
    assert "is finished" in capsys.readouterr().out


def test_other_settings_data_or_model_are_refused(folder: Path, tmp_path: Path) -> None:
    finetune(config(folder, "vqa-classes", tmp_path / "run", 2))
    again = config(folder, "vqa-classes", tmp_path / "run", 2)
    for changed in ({"answers": 1}, {"task": "vqa-words"}, {"loop": dataclasses.replace(again.loop, steps=3)}):
        with pytest.raises(UserError, match="another --out"):
            finetune(dataclasses.replace(again, **changed))
    torch.manual_seed(1)
    save_pretrained(OPT(MODEL, tokenizer(), FACTS), tmp_path / "other")
    (tmp_path / "fewer").write_text("".join((folder / "questions").read_text().splitlines(keepends=True)[:100]))
    for changed in ({"model": tmp_path / "other"}, {"questions": tmp_path / "fewer"}):
        with pytest.raises(UserError, match="another --out"):
            finetune(dataclasses.replace(again, **changed))


@pytest.mark.parametrize(("changes", "said"), [
    ({"task": "vqa-words", "questions": None}, "needs --questions"),
    ({"task": "captioning", "questions": Path("q")}, "reads no --questions"),
    ({"answers": 0}, "--answers 0"),
    ({"margin": 1.0}, "--margin 1.0"),
    ({"given": ()}, "--given"),
    ({"given": ("image", "image")}, "--given"),
    ({"loop": LoopConfig(steps=0)}, "--loop.steps 0"),
    ({"model": Path("nowhere")}, "holds no model"),
])
def test_impossible_settings_are_sentences(folder: Path, tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        finetune(dataclasses.replace(config(folder, "captioning", tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_shards_that_do_not_fit_are_sentences(folder: Path, tmp_path: Path) -> None:
    speechless = [fake_sample(number, speech=False) for number in range(8)]
    fake_shards(tmp_path / "shards", speechless)
    with pytest.raises(UserError, match="no sample with text and audio"):
        finetune(config(folder, "captioning", tmp_path / "run", shards=tmp_path / "shards", given=("audio",)))
    save_pretrained(OPT(MODEL, tokenizer(), dataclasses.replace(FACTS, region_width=11)), tmp_path / "narrow")
    with pytest.raises(UserError, match="12 numbers, not 11"):
        finetune(config(folder, "captioning", tmp_path / "run", model=tmp_path / "narrow"))
    bare = [dataclasses.replace(sample, pictures=(Picture(64, 64, codes=sample.pictures[0].codes),))
            for sample in SAMPLES]
    fake_shards(tmp_path / "codes", bare)
    for task in ("vqa-classes", "vqa-words"):  # would learn to answer blindly
        with pytest.raises(UserError, match="holds no regions"):
            finetune(config(folder, task, tmp_path / "run", shards=tmp_path / "codes"))


def test_samples_that_lack_what_the_task_needs_are_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = [fake_sample(number, regions=number % 4 != 0, speech=number % 3 == 0, caption=number % 3 != 0)
             for number in range(40)]
    fake_shards(tmp_path / "shards", mixed)
    for task, lacking in (("captioning", 20), ("retrieval-margin", 20), ("retrieval-in-batch", 10)):
        finetune(config(folder, task, tmp_path / task, 3, shards=tmp_path / "shards"))
        assert f"{lacking} of 40 samples lack" in capsys.readouterr().out


def test_a_model_is_tuned_again_and_keeps_or_renews_its_answers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(config(folder, "vqa-classes", tmp_path / "first", 2))
    assert "new in this model: answer_head, over 2 answers" in capsys.readouterr().out
    finetune(config(folder, "captioning", tmp_path / "second", 2, model=tmp_path / "first/model"))
    second = from_pretrained(tmp_path / "second/model")
    assert second.config.tuning.answers == ("and", "star") and second.config.tuning.task == "captioning"
    assert "new in this model" not in capsys.readouterr().out
    finetune(config(folder, "vqa-classes", tmp_path / "third", 2, model=tmp_path / "first/model", answers=1))
    assert "answer_head, over 1 answers" in capsys.readouterr().out


def test_dry_run_writes_nothing_and_the_help_texts_example_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(re.sub(r"\s+", " ", (finetune.__doc__ or "").partition("opt finetune ")[2]))
    places = {"runs/demo/model": folder / "model", "runs/demo/shards/train": folder / "shards",
              "runs/demo/scenes/train_questions.jsonl": folder / "questions", "runs/vqa": tmp_path / "vqa"}
    words = [str(places.get(word, word)) for word in words]
    assert cli.main(["finetune", *words, "--dry-run"]) == 0
    assert "writes to" in capsys.readouterr().out and not (tmp_path / "vqa").exists()
    words[words.index("--loop.steps") + 1] = "2"
    assert cli.main(["finetune", *words]) == 0
    example = shlex.split((vqa.__doc__ or "").partition("opt eval vqa ")[2])
    places |= {"runs/vqa/model": tmp_path / "vqa/model", "runs/demo/shards/test": folder / "shards",
               "runs/demo/scenes/test_questions.jsonl": folder / "questions"}
    assert cli.main(["eval", "vqa", *[str(places.get(word, word)) for word in example]]) == 0
    assert "vqa.accuracy" in capsys.readouterr().out
