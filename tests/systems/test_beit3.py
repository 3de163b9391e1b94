"""BEiT-3: what is hidden and asked for, whose weights see what, and captions written by filling in."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import FACTS, fake_shards, tokenizer
from shrunken import batch_of, made, rows, sample

from opt.checkpoint import from_pretrained, save_pretrained
from opt.config import UserError
from opt.data.batch import Batch
from opt.data.pack import FRAME, PATCH, TEXT
from opt.data.record import Lengths
from opt.nn.relative import prefix
from opt.nn.sampling import Sampling
from opt.nn.states import States, side_by_side
from opt.objectives.term import loss
from opt.recipe import LoopConfig, OptimConfig, Stage
from opt.systems.beit3 import BEiT3, BEiT3Config, base
from opt.systems.beit3.infill import InfillWriter
from opt.systems.beit3.model import switches
from opt.systems.beit3.rows import TOGETHER
from opt.systems.shared.tuning import Tuning
from opt.systems.system import Progress, build
from pretrain.finetune import FinetuneConfig, finetune
from pretrain.optim import adamw

SAMPLES = {number: sample(number) for number in range(12)}
EARLY = Progress(0, 0.0)
NAMES = {TEXT: "text", PATCH: "image", FRAME: "audio"}
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
MASKED, CONTRAST = Stage("masked", objectives=("masked",)), Stage("contrast", objectives=("contrast",))


def beit3(preset: str = "beit3.trimodal", facts: Any = FACTS, moved: bool = True, **changes: Any) -> BEiT3:
    """Small, in evaluation mode, away from its beginning, so that what it sees changes what it says."""
    system = build("beit3", dataclasses.replace(made(preset).config, **changes), tokenizer(), facts).eval()
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) * moved)
    assert isinstance(system, BEiT3)
    return system


def sequences(batch: Batch) -> list[tuple[int, tuple[str, ...]]]:
    """Where each begins, and the modalities in it, in order."""
    view, found = batch.views["encoder"], []
    for start, length in zip(view.first.tolist(), view.lengths.tolist(), strict=True):
        tables = view.tables[start : start + length]
        found.append((start, tuple(dict.fromkeys(NAMES[int(table)] for table in tables))))
    return found


def hidden(batch: Batch, name: str, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets of that name within a sequence: tokens and labels."""
    target = batch.targets[name]
    inside = (target.index >= start) & (target.index < start + length)
    return target.index[inside], target.label[inside]


def test_each_sample_is_hidden_by_modality_and_together() -> None:
    """Targets are the words, the codes of the hidden patches and frames; 40 % of the patches, to the patch."""
    system, together, share = beit3(), set(), {"text": [], "fused_text": [], "audio": [], "fused_audio": []}
    for turn in range(10):
        batch = batch_of(system, SAMPLES, turn=turn)
        view, words, frames = batch.views["encoder"], len(batch.text.ids), len(batch.frames.masked)
        starts = sequences(batch)
        assert len(starts) == 7 * len(SAMPLES), "whole by itself, hidden by itself, and one of several"
        for row, key in enumerate(batch.keys):
            own = SAMPLES[int(key.removeprefix("sample"))]
            codes = torch.from_numpy(own.pictures[0].codes.ravel().astype(np.int64))
            ids = torch.from_numpy(tokenizer().encode(own.caption))
            for place, (start, names) in enumerate(starts[7 * row : 7 * row + 7]):
                length, fused = int(view.lengths[7 * row + place]), "fused_" * (len(names) > 1)
                together |= {names} if fused else set()
                assert names == tuple(name for name in ("image", "text", "audio") if name in names)
                for name in names:
                    index, label = hidden(batch, fused + name, start, length)
                    assert bool(len(index)) == (place >= 3), "the first three are whole"
                    at = start + np.flatnonzero(view.tables[start : start + length] == {v: k for k, v in NAMES.items()}[
                        name])[0] + 1
                    entries, where = view.gather[index], index - at
                    if name == "text" and place >= 3:
                        assert torch.equal(label, ids[where])
                        share[fused + name].append(len(where) / len(ids))
                    elif name == "image" and place >= 3:
                        assert len(where) == round(0.4 * 64) and torch.equal(label, codes[where])
                        assert batch.patches.masked[entries - words - 1].all()
                        assert torch.equal(batch.patches.places[entries - words - 1, 0] - 1, where)
                    elif place >= 3:
                        told = torch.from_numpy(own.speech_codes.astype(np.int64))
                        assert torch.equal(label, told[where])
                        masked = entries - words - len(batch.patches.masked) - 2
                        assert batch.frames.masked[masked].all()
                        assert torch.equal(batch.frames.positions[masked], where)
                        share[fused + name].append(len(where) / len(told))
        assert frames == len(batch.frames.positions)
    assert together == {tuple(name for name in ("image", "text", "audio") if name in names) for names in TOGETHER}
    assert np.mean(share["text"]) < 0.4 < np.mean(share["fused_text"]) < 0.65
    assert all(0.35 < np.mean(share[name]) < 0.65 for name in ("audio", "fused_audio"))


def test_a_stage_shows_and_asks_no_more_than_it_names() -> None:
    batch = batch_of(beit3(stage=MASKED), SAMPLES)
    assert len(sequences(batch)) == 4 * len(SAMPLES) and not len(batch.extra["align_text_image"])
    batch = batch_of(beit3(stage=CONTRAST), SAMPLES)
    assert len(sequences(batch)) == 3 * len(SAMPLES) and not len(batch.targets["image"].index)
    assert not batch.patches.masked.any() and len(batch.extra["align_text_image"]) == len(SAMPLES)
    batch = batch_of(beit3(stage=dataclasses.replace(MASKED, data=("image",))), SAMPLES)
    assert {names for _, names in sequences(batch)} == {("image",)}


@pytest.mark.parametrize("stage", [MASKED, CONTRAST], ids=["masked", "contrast"])
def test_what_a_stage_does_not_reach_does_not_move(stage: Stage) -> None:
    system = beit3(stage=stage)
    frozen = {name.partition(".")[0] for name, parameter in system.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pooler", *(("project", "temperature") if stage is MASKED else ("heads",))}
    terms = system(batch_of(system, SAMPLES), EARLY).terms
    loss(terms).backward()
    assert all(parameter.grad is not None for parameter in system.parameters() if parameter.requires_grad)
    assert set(terms) == ({"text", "image", "audio", "fused_text", "fused_image", "fused_audio"} if stage is MASKED else
                          {"align_text_image", "align_text_audio", "align_image_audio"})


def test_a_picture_without_codes_is_shown_whole() -> None:
    bare = {number: dataclasses.replace(each, pictures=(dataclasses.replace(each.pictures[0], codes=None),))
            for number, each in SAMPLES.items()}
    batch = batch_of(beit3("beit3.tiny", stage=MASKED), bare)
    assert not batch.patches.masked.any() and batch.counts["image"] == batch.counts["fused_image"] == 0
    assert batch.counts["fused_text"] > 0


def test_frames_are_told_by_features_where_there_are_no_codes() -> None:
    system = beit3(facts=dataclasses.replace(FACTS, speech_codebooks=()))
    batch = batch_of(system, SAMPLES)
    target, words = batch.targets["audio"], len(batch.text.ids) + len(batch.patches.masked) + 1
    entries = batch.views["encoder"].gather[target.index] - words - 1
    assert batch.frames.masked[entries].all() and not batch.frames.masked[target.label].any()
    assert torch.equal(batch.frames.positions[entries], batch.frames.positions[target.label])
    assert system.heads["audio"].out_features == FACTS.speech_width
    assert system(batch, EARLY).terms["audio"].mean() > 0


def test_each_codebook_is_asked() -> None:
    system = beit3(facts=dataclasses.replace(FACTS, speech_codebooks=(12, 7)))
    two = {number: dataclasses.replace(each, speech_codes=np.repeat(each.speech_codes % 7, 2, axis=1))
           for number, each in SAMPLES.items()}
    batch = batch_of(system, two)
    first = system(batch, EARLY).terms["audio"].mean()
    with torch.no_grad():
        system.heads["audio"].bias[12:] += torch.arange(7.0)
    assert batch.targets["audio"].label.shape[1] == 2
    assert not torch.isclose(system(batch, EARLY).terms["audio"].mean(), first)


@torch.no_grad()
@pytest.mark.parametrize("sharing", ["paper", "code"])
def test_whose_weights_a_token_comes_to(sharing: str) -> None:
    """Pictures alone are the same whatever the experts of text, speech and several modalities hold."""
    system, some = beit3(sharing=sharing, fused_layers=1), list(SAMPLES.values())[:3]
    names = {name.split(".each.")[1].split(".")[0] for name in system.state_dict() if ".each." in name}
    assert names == {"text", "image", "audio", "shared", "fused"} if sharing == "paper" else {"text", "image", "audio"}
    fused = [name for name in system.state_dict() if ".fused." in name]
    assert all(name.startswith("stack.blocks.1.feed") for name in fused) and bool(fused) == (sharing == "paper")
    alone, both = system.features(some, ["image"]), system.features(some, ["image", "text"])
    for name, parameter in system.named_parameters():
        if name.startswith("stack.") and {"text", "audio", "fused"} & set(name.split(".")):
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(system.features(some, ["image"]), alone)
    assert (system.features(some, ["image", "text"]) - both).abs().max() > 0.1


@torch.no_grad()
def test_rows_do_not_see_each_other() -> None:
    system, some = beit3(), list(SAMPLES.values())[:5]
    order = [3, 0, 4, 2, 1]
    for names in (["image"], ["text"], ["audio"], ["image", "text", "audio"]):
        for ability in (system.embed, system.features):
            torch.testing.assert_close(ability([some[at] for at in order], names), ability(some, names)[order], **CLOSE)
    assert system.embed(some, ["image"]).shape == (5, 16)


@torch.no_grad()
def test_pictures_do_not_see_the_captions_that_are_written_from_them() -> None:
    system = beit3(tuning=Tuning("captioning", given=("audio", "image")), stage=Stage(data=("text",)))
    batch = batch_of(system, SAMPLES)
    view = batch.views["encoder"]
    assert {names for _, names in sequences(batch)} == {("image", "audio", "text")}
    writes = torch.from_numpy(view.tables == TEXT)
    states = system.stack(system.entries(batch, view), view, prefix(writes, view.layout))
    others = dataclasses.replace(batch, text=dataclasses.replace(batch.text, ids=batch.text.ids.flip(0)))
    changed = system.stack(system.entries(others, view), view, prefix(writes, view.layout))
    assert torch.equal(states[~writes], changed[~writes]) and not torch.isclose(states, changed)[writes].all()
    target = batch.targets["caption"]
    expected = torch.nn.functional.cross_entropy(system.heads["text"](states[target.index]), target.label,
                                                 label_smoothing=0.1)
    torch.testing.assert_close(system(batch, EARLY).terms["caption"].mean(), expected)


def test_captions_hide_words_and_their_end() -> None:
    system, hidden_words, all_words = beit3("beit3.tiny", tuning=Tuning("captioning")), 0, 0
    for turn in range(20):
        batch = batch_of(system, SAMPLES, turn=turn)
        for (start, _), length, key in zip(sequences(batch), batch.views["encoder"].lengths.tolist(), batch.keys,
                                           strict=True):
            caption = SAMPLES[int(key.removeprefix("sample"))].caption
            ids = torch.tensor([*tokenizer().encode(caption), tokenizer().sep])
            index, label = hidden(batch, "caption", start, length)
            assert torch.equal(ids[index - (start + 65 + 1)], label)
            hidden_words, all_words = hidden_words + len(label), all_words + len(ids)
    assert 0.65 < hidden_words / all_words < 0.75


@torch.no_grad()
@pytest.mark.parametrize("sharing", ["paper", "code"])
@pytest.mark.parametrize("given", [["image"], ["audio"], ["image", "audio"]])
def test_filling_in_from_a_cache_is_filling_in_anew(given: list[str], sharing: str) -> None:
    """Two beams a sample, which change places on the way."""
    system, some = beit3(sharing=sharing), [SAMPLES[number] for number in (0, 1, 2)]
    tables, mask = {"image": PATCH, "audio": FRAME}, tokenizer().mask
    parts = [system.alone(some, name) for name in given]
    entries, view = side_by_side(parts, [tables[name] for name in given])
    writer = InfillWriter(system.stack, system.embedders["text"], system.heads["text"], mask, view)
    caches = writer.start(*States.of(entries, view).padded(), 4, 2)
    written, parents = [[tokenizer().cls] for _ in range(6)], None
    for position in range(4):
        logits = writer.step(torch.tensor([ids[-1] for ids in written]), position, caches, parents)
        for row, ids in enumerate(written):
            masked = torch.tensor([*ids, mask])
            text = States(system.embedders["text"].at(masked, torch.arange(len(masked))), np.array([len(masked)]))
            own = [part.take(np.array([row // 2])) for part in parts]
            whole, one = side_by_side([*own, text], [*(tables[name] for name in given), TEXT])
            writes = torch.from_numpy(one.tables == TEXT)
            state = system.stack(whole, one, prefix(writes, one.layout))[-1]
            torch.testing.assert_close(logits[row], system.heads["text"](state), **CLOSE)
        parents = torch.tensor([1, 0, 2, 2, 5, 4])
        written = [[*written[parent], 7 + row] for row, parent in enumerate(parents.tolist())]


def test_captions_are_learned_and_written() -> None:
    """Every search finds them again, from pictures of their own and beside others."""
    torch.manual_seed(0)
    system = beit3("beit3.tiny", moved=False, tuning=Tuning("captioning"), caption_smoothing=0.0).train()
    some = {number: SAMPLES[number] for number in range(6)}
    optimizer = adamw(system, OptimConfig(learning_rate=4e-3, weight_decay=0.0))
    for turn in range(250):
        loss(system(batch_of(system, some, turn=turn), EARLY).terms).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    system.eval()
    captions = [each.caption for each in some.values()]
    for sampling in (Sampling(limit=10), Sampling(limit=10, beams=3), Sampling(limit=10, top_p=0.5)):
        assert system.generate_text(list(some.values()), ["image"], sampling) == captions
    assert system.generate_text([some[3]], ["image"], Sampling(limit=10)) == captions[3:4]


@pytest.mark.parametrize("task", ["captioning", "vqa-classes"])
def test_fine_tuning_begins_with_the_pretrained_weights(task: Any, tmp_path: Path) -> None:
    """Those that the task does not reach stay as they are."""
    start = beit3("beit3.trimodal")
    save_pretrained(start, tmp_path / "model")
    fake_shards(tmp_path / "shards", list(SAMPLES.values()))
    (tmp_path / "questions").write_text("".join(json.dumps({
        "image_id": each.key, "question": "a star", "answers": [(each.caption or "").split()[0]]}) + "\n"
        for each in SAMPLES.values()))
    finetune(FinetuneConfig(
        task, tmp_path / "model", tmp_path / "shards", tmp_path / "out",
        questions=None if task == "captioning" else tmp_path / "questions",
        loop=LoopConfig(steps=2, batch_tokens=400, workers=0), optim=OptimConfig(learning_rate=1e-3)))
    tuned = from_pretrained(tmp_path / "out/model").state_dict()
    moved = {name.split(".")[0] for name, weight in start.state_dict().items() if not torch.equal(tuned[name], weight)}
    assert moved == {"embedders", "stack", "heads" if task == "captioning" else "pooler"}
    assert ("answer_head.0.weight" in tuned) == (task != "captioning")


@torch.no_grad()
@pytest.mark.parametrize("task", ["vqa-classes", "nlvr2"])
def test_questions_are_answered_by_the_pooled_state_of_the_picture(task: str) -> None:
    count = 2 if task == "nlvr2" else 1
    system = beit3("beit3.tiny", tuning=Tuning(task, answers=("yes", "no", "red"), pictures=count))
    assert all(parameter.requires_grad for parameter in system.pooler.parameters())
    asked = [dataclasses.replace(sample(number), answers=("no",), pictures=tuple(
        picture for each in range(count) for picture in sample(number + each).pictures)) for number in range(6)]
    batch = system.preparer()(dict(enumerate(asked)), rows(system, dict(enumerate(asked))))
    assert system(batch, EARLY).terms.keys() == {"answer"}
    answers = system.answer(asked)
    assert set(answers) <= {"yes", "no", "red"} and system.answer(asked[::-1]) == answers[::-1]


def test_a_model_that_was_only_masked_tries_to_write() -> None:
    system = beit3(stage=MASKED)
    for names in (["image"], ["audio"], ["image", "audio"]):
        assert len(system.generate_text(list(SAMPLES.values())[:2], names, Sampling(limit=5))) == 2


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="opt shards units"):
        beit3(facts=dataclasses.replace(FACTS, speech_codebooks=()), speech_targets="codes")
    with pytest.raises(UserError, match="--codes"):
        beit3("beit3.tiny", facts=dataclasses.replace(FACTS, codebook=0))
    with pytest.raises(UserError, match="8 x 8"):
        config = made("beit3.tiny").config
        beit3("beit3.tiny", sight=dataclasses.replace(config.sight, patch=16))
    with pytest.raises(UserError, match="'matching'"):
        beit3(stage=Stage(objectives=("matching",)))
    with pytest.raises(UserError, match="shows nothing of image, text, from which 'masked' learns nothing"):
        beit3("beit3.tiny", stage=Stage(data=("audio",)))
    with pytest.raises(UserError, match="shows text of image, text, audio, from which 'contrast' learns nothing"):
        beit3(stage=Stage(data=("text",), objectives=("contrast",)))
    with pytest.raises(UserError, match="trains nothing"):
        beit3(stage=Stage(trains=()))
    beit3("beit3.tiny", facts=dataclasses.replace(FACTS, codebook=0), stage=CONTRAST)
    with pytest.raises(UserError, match="write text from text"):
        beit3().generate_text([sample(0)], ["text"], Sampling())
    with pytest.raises(UserError, match="cannot match"):
        beit3().score([sample(0)], ["text", "image"])
    with pytest.raises(UserError, match="retrieval-margin"):
        beit3(tuning=Tuning("retrieval-margin"))
    with pytest.raises(UserError) as error:
        BEiT3Config(image_rate=0.0, fused_layers=13, text_positions=2, caption_smoothing=1.0)
    for said in ("image-rate 0.0", "fused-layers 13", "text-positions 2", "caption-smoothing 1.0"):
        assert said in str(error.value)


@pytest.mark.parametrize("preset", ["beit3.tiny", "beit3.trimodal"])
def test_a_batch_has_no_more_tokens_than_it_costs(preset: str) -> None:
    system, each = beit3(preset), list(SAMPLES.values())
    words = np.array([len((one.caption or "").split()) for one in each])
    frames = np.array([len(one.speech) for one in each if one.speech is not None])
    cost = system.preparer().cost(Lengths(words, 0 * words, frames, 0 * words, 0 * words + 9)).sum()
    most = max(batch_of(system, SAMPLES, turn=turn).tokens for turn in range(8))
    assert 0.6 * cost < most <= cost


def test_base_is_as_large_as_the_published_model() -> None:
    """222 million parameters with heads for retrieval; it has 64,010 words and 1,024 positions of them."""
    with torch.device("meta"):
        config = dataclasses.replace(base().model, sharing="code", stage=CONTRAST, text_positions=1024)
        system = BEiT3(config, tokenizer(), FACTS)
    parts = (system.embedders, system.stack, system.project)
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert round((count + (64_010 - tokenizer().size) * 768) / 1e6) == 222
    assert base().model.stage.objectives == ("masked",) and base().model.sight.grid == 14
    assert ["fused" in switch.feed.values() for switch in switches(base().model)] == [False] * 9 + [True] * 3
