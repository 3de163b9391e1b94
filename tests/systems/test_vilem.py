"""ViLEM's own promises: what is edited and by whom, what judges it, and that retrieval pays nothing for it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures import FACTS, tokenizer
from shrunken import ROWS, batch_of, lacking, made, rows, sample

from opt.config import UserError
from opt.data.batch import Batch, TextTable
from opt.data.layout import cross_layout, self_layout
from opt.data.plan import BatchPlan
from opt.data.record import Lengths
from opt.data.tokenizer import Tokenizer
from opt.nn.states import States
from opt.objectives.term import loss
from opt.systems.shared.config import Sizes
from opt.systems.shared.matching import CONTEXTS, usable
from opt.systems.shared.proofreading import Proofreader
from opt.systems.system import Progress
from opt.systems.vilem import ViLEM, ViLEMConfig
from opt.systems.vilem.networks import Encoders
from opt.weights import bert

EARLY, LATE = Progress(3, 0.03), Progress(90, 0.9)
KEPT = torch.tensor(True)
SAMPLES = {number: lacking(number) for number in range(ROWS)}
EDIT_TERMS = ("detect_local", "detect_global", "correct_local", "correct_global")


def moved(system: ViLEM) -> ViLEM:
    """With a twin and an editor that are not the model."""
    torch.manual_seed(5)
    with torch.no_grad():
        for value in [*system.twin.parameters(), *system.editor.parameters()]:
            value.add_(0.1 * torch.randn_like(value))
    return system


def texts(batch: Batch, view: str, ids: torch.Tensor | None = None) -> list[np.ndarray]:
    """Ids of all sequences of a view."""
    packed = (batch.text.ids if ids is None else ids)[batch.views[view].gather]
    return [each.numpy() for each in packed.split(batch.views[view].lengths.tolist())]


def reordered(plan: BatchPlan, order: np.ndarray) -> BatchPlan:
    return dataclasses.replace(plan, sample=plan.sample[order], task=plan.task[order], partners=plan.partners[order],
                               key=plan.key[order])


@pytest.mark.parametrize("progress", [EARLY, LATE])
@pytest.mark.parametrize("preset", ["vilem.tiny", "vilem.trimodal"])
def test_the_order_of_rows_changes_nothing(preset: str, progress: Progress) -> None:
    system = moved(made(preset))
    plan, preparer = rows(system, SAMPLES), system.preparer()
    order = np.random.default_rng(0).permutation(len(plan.sample))
    expected, found = (system(preparer(SAMPLES, each), progress).terms for each in (plan, reordered(plan, order)))
    for name, term in expected.items():
        torch.testing.assert_close(found[name].total, term.total, rtol=1e-5, atol=1e-5)
        assert found[name].count == term.count and (term.total > 0 or name == "edit")


def test_retrieval_never_asks_cross_attention() -> None:
    system = made("vilem.tiny").eval()
    samples = [sample(number) for number in range(4)]
    before = system.embed(samples, ["text"]), system.features(samples, ["text"])
    said = system.wrong_words(samples, ["image"])
    with torch.no_grad():
        for block in system.encoders.lower.stack.blocks:
            for value in block.cross_attention.parameters():
                value.normal_()
    assert torch.equal(system.embed(samples, ["text"]), before[0])
    assert torch.equal(system.features(samples, ["text"]), before[1])
    assert system.wrong_words(samples, ["image"]) != said
    assert all(block.cross_attention is None for block in system.encoders.upper.blocks)


@pytest.mark.parametrize("edits", ["one", "all"])
def test_words_are_masked_by_themselves_or_all_at_once(edits: str) -> None:
    system = made("vilem.tiny", edits=edits, token_rate=0.5)
    batch, mask = batch_of(system), tokenizer().mask
    masked, target = texts(batch, "masked"), batch.targets["edit"]
    clean = texts(batch, "edited")
    assert len(clean) == usable(batch).sum() and batch.counts["edit"] == len(target.label) > ROWS
    holes = [int((text == mask).sum()) for text in masked]
    assert (set(holes) == {1}) == (edits == "one") and sum(holes) == len(target.label)
    flat, filled = np.concatenate(masked), np.concatenate(masked).copy()
    assert np.array_equal(np.flatnonzero(flat == mask), target.index.numpy())
    filled[target.index.numpy()] = target.label.numpy()
    assert {tuple(text) for text in np.split(filled, np.cumsum([len(text) for text in masked])[:-1])} <= {
        tuple(text) for text in clean}
    assert np.array_equal(np.concatenate(clean)[batch.extra["edit_place"]], target.label.numpy())
    assert torch.equal(batch.text.ids[batch.extra["edit_entry"]], target.label)


def test_no_special_or_unknown_word_or_mark_is_edited_and_not_too_many() -> None:
    words = Tokenizer.train(["red star , blue star ."] * 3, 60)
    system = ViLEM(dataclasses.replace(made("vilem.tiny").config, token_rate=1.0, most_edits=3), words, FACTS)
    given = {number: dataclasses.replace(sample(number), caption=text) for number, text in enumerate((
        "red , star . ☃ blue", "☃ , .", "red red red red red red", "star"))}
    batch = batch_of(system, given)
    asked = [words.decode([word]) for word in batch.targets["edit"].label.tolist()]
    assert len(asked) == 3 + 0 + 3 + 1 and set(asked) <= {"red", "star", "blue"}
    _, edited = system._edit(batch, False)
    assert all(words.decode([word]).isalnum() for word in edited.tolist())
    assert not (edited == batch.targets["edit"].label).any()


def reference(reader: Encoders, system: ViLEM, seer: Encoders, batch: Batch, ids: torch.Tensor, branch: str
              ) -> tuple[float, float]:
    """Detection and correction, each text by itself: sums of cross entropy over its words, and over wrong ones."""
    seen = {name: seer.see(name, batch) for name in system.modalities if name != "text"}
    detected = corrected = 0.0
    own = np.flatnonzero(usable(batch))
    for row, clean, text in zip(own, texts(batch, "edited"), texts(batch, "edited", ids), strict=True):
        table = TextTable(torch.from_numpy(text), torch.arange(len(text)))
        hidden = reader.lower.embedder(table)
        (name,) = [name for column, name in enumerate(CONTEXTS) if batch.host["context"][row, column]]
        number = batch.host["rows"][row, 1 + CONTEXTS.index(name)]
        states, layout = seen[name].states, self_layout(np.array([len(text)]))
        start, length = states.starts[number], states.lengths[number]
        if branch == "global":
            hidden = hidden + system.gist.project[name](states.hidden[start])
        for block, depth in zip(reader.lower.stack.blocks, seen[name].depths, strict=True):
            patches = depth[start + 1 : start + length]  # not the class token
            looks = cross_layout(np.array([0]), np.array([len(text)]), np.array([0]), np.array([len(patches)]))
            hidden = block(hidden, layout, patches, looks) if branch == "local" else block(hidden, layout)
        for place in range(1, len(text) - 1):
            wrong = int(text[place]) != int(clean[place])
            detected -= reader.detect(hidden[place]).log_softmax(0)[0 if wrong else 1].item()
            if wrong:
                logits = reader.word_head(hidden[place], reader.lower.embedder.token.weight)
                corrected -= logits.log_softmax(0)[int(clean[place])].item()
    return detected, corrected


@pytest.mark.parametrize("preset", ["vilem.tiny", "vilem.trimodal"])
def test_both_branches_are_those_of_plain_loops(preset: str) -> None:
    system = moved(made(preset, token_rate=0.4))
    batch = batch_of(system)
    terms = system(batch, LATE).terms
    _, drawn = system._edit(batch, False)
    ids = batch.text.ids.scatter(0, batch.extra["edit_entry"], drawn)
    for branch, weight in (("local", 0.8), ("global", 0.2)):
        pairs = ((system.encoders, system.kept), (system.kept, system.encoders))
        both = np.mean([reference(reader, system, seer, batch, ids, branch) for reader, seer in pairs], axis=0)
        for name, total in zip((f"detect_{branch}", f"correct_{branch}"), both, strict=True):
            assert terms[name].total.item() == pytest.approx(total, rel=1e-4)
            assert terms[name].weight == pytest.approx(weight) and terms[name].count == len(drawn)


def test_each_text_layer_looks_at_another_depth() -> None:
    system = made("vilem.tiny", image=Sizes(16, 5, 2, 32))
    batch, tower = batch_of(system), system.encoders.towers["image"]
    seen, layout = system.encoders.see("image", batch), batch.views["image"].layout
    entries = tower.entries(batch.patches, batch.views["image"])
    second = tower.stack.blocks[1](tower.stack.blocks[0](entries, layout), layout)
    assert len(seen.depths) == 2 and torch.equal(seen.depths[0], entries) and torch.equal(seen.depths[1], second)
    assert torch.equal(seen.states.hidden, system.encode("image", batch).hidden)


def test_mistakes_teach_the_towers_and_never_the_twin_or_the_frozen_editor() -> None:
    system = moved(made("vilem.trimodal"))
    terms = system(batch_of(system), LATE).terms
    loss({name: terms[name] for name in (*EDIT_TERMS, "edit")}).backward()
    for name in ("text", "image", "audio"):
        assert all(value.grad is not None and value.grad.any() for value in
                   system.encoders.towers[name].stack.blocks[0].parameters()), name
    assert all(value.grad is None for value in [*system.twin.parameters(), *system.editor.parameters()])
    assert all(value.grad is not None and not value.grad.any() for value in system.learner.parameters())
    assert all(value.grad is None for value in system.encoders.upper.parameters())


def test_the_editor_learns_at_first_and_then_stands_still() -> None:
    system = made("vilem.tiny")

    def step(progress: Progress, kept: bool = True) -> bool:
        """Whether the editor moved, and if so to what has learned."""
        before = [value.clone() for value in system.editor.parameters()]
        output = system(batch_of(system), progress)
        loss(output.terms).backward()
        with torch.no_grad():
            for value in system.learner.parameters():
                value.add_(0.01)
        system.after_step([output.carry], torch.tensor(kept))
        now = [*system.editor.parameters()]
        same = all(torch.equal(value, other) for value, other in zip(now, before, strict=True))
        assert same or all(map(torch.equal, now, system.learner.parameters()))
        return not same

    assert not step(EARLY, kept=False) and step(EARLY) and not step(LATE) and not step(LATE)
    assert system(batch_of(system), EARLY).terms["edit"].total > 0
    assert system(batch_of(system), LATE).terms["edit"].total == 0
    assert not any(value.requires_grad for value in system.editor.parameters())


def test_while_it_learns_it_is_told_what_stood_there() -> None:
    system = made("vilem.tiny")
    batch = batch_of(system)
    target = batch.targets["edit"]
    logits = system.learner(batch.text, batch.views["masked"], target.index)
    expected = F.cross_entropy(logits, target.label, reduction="sum")
    torch.testing.assert_close(system(batch, EARLY).terms["edit"].total, expected)


@pytest.mark.parametrize("progress", [EARLY, LATE])
def test_without_an_edit_the_loss_is_that_of_the_contrast(progress: Progress) -> None:
    system = made("vilem.tiny", token_rate=0.0)
    terms = system(batch_of(system), progress).terms
    value = loss(terms)
    value.backward()
    assert all(terms[name].total == 0 for name in EDIT_TERMS)
    assert value == terms["align_text_image"].mean() and value.isfinite()


def test_edits_may_be_left_out() -> None:
    system, whole = made("vilem.tiny", edits="none"), made("vilem.tiny")
    output = system(batch_of(system), LATE)
    assert output.terms.keys() == {"align_text_image"}
    system.after_step([output.carry], KEPT)
    assert not [name for name in system.state_dict() if "editor" in name or "cross" in name or "detect" in name]
    assert {*system.state_dict()} < {*whole.state_dict()}
    with pytest.raises(UserError, match="cannot find wrong words without --model.edits"):
        system.wrong_words([sample(0)], ["image"])


def test_a_row_is_judged_by_its_picture_or_its_speech() -> None:
    system = made("vilem.trimodal")
    context = np.concatenate([batch_of(system, turn=turn).host["context"] for turn in range(6)])
    both = [number for number in range(ROWS) if SAMPLES[number].pictures and SAMPLES[number].speech is not None]
    assert context.sum(axis=1).max() == 1 and 0.25 < context[:, 1].mean() < 0.75
    assert len(both) > ROWS / 2


def test_an_editor_that_never_learns_must_be_filled() -> None:
    system = made("vilem.tiny", editor_share=0.0)
    assert system.learner is None
    with pytest.raises(UserError, match="--start bert:FOLDER"):
        system.after_step([system(batch_of(system), EARLY).carry], KEPT)
    system.editor.copy.taught.fill_(True)
    output = system(batch_of(system), EARLY)
    system.after_step([output.carry], KEPT)
    assert "edit" not in output.terms and loss(output.terms).isfinite()


def test_words_are_judged_as_in_training_whoever_stands_beside_them() -> None:
    system = moved(made("vilem.trimodal").eval())
    assert isinstance(system, Proofreader)
    samples = [sample(number) for number in range(6)]
    by_image, by_audio = (system.wrong_words(samples, [name]) for name in ("image", "audio"))
    for each, image, audio in zip(samples, by_image, by_audio, strict=True):
        assert [word.text for word in image] == each.caption.split() == [word.text for word in audio]
        assert all(0 < word.wrong < 1 and word.proposed not in (word.text, "") for word in image)
        (alone,) = system.wrong_words([each], ["image"])
        np.testing.assert_allclose([word.wrong for word in alone], [word.wrong for word in image], atol=1e-5)
    assert by_image != by_audio
    batch = system.preparer().inputs(samples[:1], ["text"])
    seen = {"image": system.kept.see("image", system.preparer().inputs(samples[:1], ["image"]))}
    entries: States = system.encoders.entries(batch.text, batch.views["text"])
    hidden, patches = entries.hidden, len(seen["image"].states.hidden) - 1
    looks = cross_layout(np.array([0]), np.array([len(hidden)]), np.array([0]), np.array([patches]))
    for block, depth in zip(system.encoders.lower.stack.blocks, seen["image"].depths, strict=True):
        hidden = block(hidden, entries.layout, depth[1:], looks)
    expected = system.encoders.detect(hidden[1:-1]).softmax(1)[:, 0]
    np.testing.assert_allclose([word.wrong for word in by_image[0]], expected.tolist(), atol=1e-5)
    for named in (["image", "audio"], ["text"]):
        with pytest.raises(UserError, match="nor by more or less than a picture or speech"):
            system.wrong_words(samples, named)


def test_an_edited_caption_differs_in_one_word_and_is_always_the_same() -> None:
    system = made("vilem.tiny").eval()
    samples = [sample(number) for number in range(8)]
    samples.insert(3, dataclasses.replace(sample(9), caption="☃"))
    edits = system.edited_captions(samples, 0)
    assert edits[3] is None and sum(edit is None for edit in edits) < 5
    for each, edit in zip(samples, edits, strict=True):
        if edit is not None:
            before, after = each.caption.split(), edit.caption.split()
            assert [place for place in range(len(before)) if before[place] != after[place]] == [edit.place]
            assert (before[edit.place], after[edit.place]) == (edit.original, edit.edited)
        assert system.edited_captions([each], 0) == [edit]
    assert system.edited_captions(samples, 1) != edits


def test_cost_is_about_the_tokens_of_a_batch() -> None:
    for edits in ("one", "all", "none"):
        system = made("vilem.tiny", edits=edits)
        given = {number: lacking(number) for number in range(60)}
        lengths = Lengths(*(np.array([count(each) for each in given.values()]) for count in (
            lambda each: len((each.caption or "").split()), lambda each: 0, lambda each: 0, lambda each: 0,
            lambda each: len(each.pictures))))
        tokens = np.mean([batch_of(system, given, turn=turn).tokens for turn in range(4)])
        assert system.preparer().cost(lengths).sum() == pytest.approx(tokens, rel=0.1 if edits != "none" else 0)


def test_settings_out_of_range_are_named_together() -> None:
    with pytest.raises(UserError, match=r"most-edits 0 must be at least 1; beta 2 must be from 0 to 1; ramp 0"):
        ViLEMConfig(most_edits=0, beta=2, ramp=0)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random BertForMaskedLM of three layers, and its folder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "star", "a", "."]
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=len(lines), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=20, initializer_range=0.3)).eval()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    return model, folder


def begun(folder: Path, **changes: Any) -> ViLEM:
    config = dataclasses.replace(made("vilem.tiny").config, text_positions=20, upper_layers=1, editor_share=0.0)
    config = dataclasses.replace(config, editor=dataclasses.replace(config.editor, layers=3))
    system = ViLEM(dataclasses.replace(config, **changes), Tokenizer.from_bert(folder), FACTS).eval()
    assert {"encoders", "editor", "twin"} <= {*bert.begin(system, bert.describe(folder))}
    return system


def test_a_bert_edits_and_reads(published: tuple[Any, Path]) -> None:
    model, folder = published
    system = begun(folder)
    ids = np.array([2, 5, 4, 8, 3])  # [CLS] red [MASK] a [SEP]
    packer = system.preparer().packer()
    packer.sequence("masked", [packer.text(ids)])
    packer.sequence("text", [packer.text(ids)])
    batch = packer.batch([""], {}, {}, {})
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None], output_hidden_states=True)
        found = system.editor(batch.text, batch.views["masked"], torch.tensor([2]))
        torch.testing.assert_close(found[0, :10], expected.logits[0, 2], rtol=0, atol=1e-4)
        torch.testing.assert_close(system.encode("text", batch).hidden, expected.hidden_states[-1][0], rtol=0,
                                   atol=1e-4)
    given = {number: dataclasses.replace(sample(number), caption="red star a blue") for number in range(4)}
    assert loss(system(batch_of(system, given), EARLY).terms).isfinite()


def test_a_bert_that_cannot_edit_is_refused(published: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = published
    with pytest.raises(UserError, match="--model.editor.layers 3"):
        begun(folder, editor=dataclasses.replace(made("vilem.tiny").config.editor, layers=2))
    model.bert.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text((folder / "vocab.txt").read_text())
    with pytest.raises(UserError, match="no word head"):
        begun(tmp_path)
