"""VLMo: who an expert serves, what a stage moves, and that dual and fusion encoder are one set of weights."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures import FACTS, tokenizer
from shrunken import batch_of, made, sample, small

import opt.systems.vlmo.model as module
from opt.config import UserError
from opt.data.batch import Batch
from opt.data.record import Sample
from opt.nn.multiway import Route, sorted_layout
from opt.nn.states import States
from opt.objectives.contrastive import in_batch
from opt.objectives.term import loss
from opt.recipe import OptimConfig, Stage
from opt.systems.shared.matching import Pairing
from opt.systems.shared.multiway import PARTS
from opt.systems.system import Progress, build, compose
from opt.systems.vlmo import VLMo, tiny
from opt.systems.vlmo.config import LANGUAGE, OBJECTIVES, PAIRS, VISION
from pretrain.optim import adamw

SAMPLES = [sample(number) for number in range(6)]
EARLY = Progress(3, 0.03)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def vlmo(preset: str = "vlmo.trimodal", **changes: Any) -> VLMo:
    """Small, away from its beginning, so that what it sees changes what it says."""
    system = made(preset, **changes)
    assert isinstance(system, VLMo)
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return system


def rows_of(system: VLMo, samples: list[Sample], turn: int = 0) -> Batch:
    return batch_of(system, dict(enumerate(samples)), turn=turn)


def trained(system: VLMo) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in system.named_parameters() if parameter.requires_grad}


def fused(system: VLMo, texts: list[Sample], contexts: list[Sample], *names: str) -> torch.Tensor:
    parts = {"text": system.alone(texts, "text"), **{name: system.alone(contexts, name) for name in names}}
    return system.fuse(parts, dict.fromkeys(parts, np.arange(len(texts))))


def without(*objectives: str) -> Stage:
    return dataclasses.replace(PAIRS, objectives=tuple(name for name in PAIRS.objectives if name not in objectives))


@pytest.mark.parametrize("contrasts", ["paper", "code"])
def test_pictures_do_not_know_what_the_other_experts_hold(contrasts: str) -> None:
    """Invariant (e) of the specification."""
    system = vlmo(contrasts=contrasts).eval()
    before = system.embed(SAMPLES, ["image"]), system.features(SAMPLES, ["image"])
    pair = fused(system, SAMPLES, SAMPLES, "image")
    with torch.no_grad():
        for name, parameter in system.named_parameters():
            if any(f".each.{expert}." in name for expert in ("text", "audio", "fused")):
                parameter.add_(torch.randn_like(parameter))
    assert torch.equal(system.embed(SAMPLES, ["image"]), before[0])
    assert torch.equal(system.features(SAMPLES, ["image"]), before[1])
    assert not torch.allclose(fused(system, SAMPLES, SAMPLES, "image"), pair)


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_learning_language_leaves_pictures_as_they_are_to_the_bit(positions: str) -> None:
    system = vlmo(stage=LANGUAGE, positions=positions)
    pictures, texts = system.embed(SAMPLES, ["image"]), system.embed(SAMPLES, ["text"])
    optimizer = adamw(system, OptimConfig(learning_rate=1e-2, weight_decay=0.1))
    values = []
    for turn in range(4):
        value = loss(system(rows_of(system, SAMPLES, turn % 2), EARLY).terms)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(value.item())
    assert values[2] < values[0]
    assert torch.equal(system.embed(SAMPLES, ["image"]), pictures)
    assert not torch.allclose(system.embed(SAMPLES, ["text"]), texts, atol=1e-2)


@pytest.mark.parametrize("changes", [{}, {"positions": "absolute"}, {"experts": False}, {"contrasts": "code"}])
@pytest.mark.parametrize("stage", [VISION, LANGUAGE, PAIRS, without("contrast"), without("match"), without("mlm"),
                                   Stage("all")])
def test_all_that_a_stage_trains_gets_a_gradient_and_nothing_else(stage: Stage, changes: dict[str, Any]) -> None:
    system, found = vlmo("vlmo.tiny" if changes else "vlmo.trimodal", stage=stage, **changes), set()
    for turn in range(3):
        batch = batch_of(system, turn=turn)
        output = system(batch, EARLY)
        assert all(term.total.requires_grad for term in output.terms.values())
        loss(output.terms).backward()
        found |= {name for name, parameter in system.named_parameters()
                  if parameter.grad is not None and parameter.grad.any()}
    unread = set() if "contrast" in system.config.asks else {  # nothing is by itself so far up, but texts
        name for name in trained(system) if name.startswith("stack.blocks.1.feed") and PAIRS.trains == stage.trains
        and any(f".each.{expert}." in name for expert in ("text", "image", "audio"))}
    assert found | unread == set(trained(system))


def test_stages_move_what_they_name() -> None:
    moved = {stage.name: set(trained(vlmo(stage=stage))) for stage in (VISION, LANGUAGE, PAIRS)}
    assert not moved["vision"] & moved["language"]
    assert all("text" in name or name.startswith("word_head") for name in moved["language"])
    assert {name for name in moved["vision"] if "self_attention" in name} == {
        name for name in moved["pairs"] if "self_attention" in name}
    assert not any(name.startswith("code_head") for name in moved["pairs"])
    assert tiny().stages[-1] == tiny().model.stage
    assert sum(stage.share for stage in tiny().stages) == 1


def test_what_the_contrast_learns_is_what_embeds() -> None:
    """The training rows' vectors, in one run with masked sequences, are those of each sample by itself."""
    system = vlmo()
    batch = rows_of(system, SAMPLES)
    states = system._read(system.entries(batch, batch.views["encoder"]), batch.views["encoder"])
    vectors, _ = system._contrast(states, batch)
    for place, name in enumerate(("text", "image", "audio")):
        for key, number in zip(batch.keys, batch.host["rows"][:, place], strict=True):
            one = system.embed([each for each in SAMPLES if each.key == key], [name])
            torch.testing.assert_close(vectors[name][number][None], one, **CLOSE)


def test_matching_is_that_of_each_pair_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    system, drawn = vlmo(), []
    real = module.pair_up

    def watched(*given: Any) -> Pairing:
        drawn.append(real(*given))
        return drawn[0]

    monkeypatch.setattr(module, "pair_up", watched)
    batch = rows_of(system, SAMPLES, turn=2)
    term = system(batch, EARLY).terms["match"]
    by_key = {each.key: each for each in SAMPLES}
    (pairs,), found = drawn, []
    kinds = set()
    for text, context in zip(pairs.text, pairs.context, strict=True):
        has = batch.host["context"][context]
        names = [name for name, used in zip(("image", "audio"), has, strict=True) if used]
        kinds.add(tuple(names))
        given, seen = by_key[batch.keys[text]], by_key[batch.keys[context]]
        whole = compose(given, seen if "image" in names else None, seen if "audio" in names else None)
        found.append(system.score([whole], ["text", *names])[0])
    assert kinds == {("image",), ("audio",), ("image", "audio")} and len(found) > 2 * len(SAMPLES)
    right = torch.arange(len(found)) < len(SAMPLES)
    expected = F.binary_cross_entropy_with_logits(torch.stack(found), right.float(), reduction="none")
    torch.testing.assert_close(term.total, (expected * pairs.share).sum(), **CLOSE)


@pytest.mark.parametrize("objectives", [(), ("contrast",)])
def test_a_negative_is_never_of_the_same_picture(monkeypatch: pytest.MonkeyPatch, objectives: tuple[str, ...]) -> None:
    system, drawn = vlmo(stage=without(*objectives)), []
    real = module.pair_up
    monkeypatch.setattr(module, "pair_up", lambda *given: drawn.append(real(*given)) or drawn[-1])
    twins = [dataclasses.replace(sample(number), key=f"picture{number // 3}") for number in range(9)]
    seen = set()
    for turn in range(8):
        batch = rows_of(system, twins, turn)
        system(batch, EARLY)
        wrong = slice(drawn[-1].true, None)
        for text, context in zip(drawn[-1].text[wrong], drawn[-1].context[wrong], strict=True):
            assert batch.keys[text] != batch.keys[context]
            seen.add((batch.keys[text], batch.keys[context]))
    assert len(seen) == 6


def test_the_order_of_a_batch_changes_nothing() -> None:
    system, order = vlmo().eval(), [4, 2, 0, 5, 1, 3]
    shuffled = [SAMPLES[place] for place in order]
    for name in ("text", "image", "audio"):
        torch.testing.assert_close(system.embed(shuffled, [name]), system.embed(SAMPLES, [name])[order], **CLOSE)
    torch.testing.assert_close(fused(system, shuffled, shuffled, "image", "audio"),
                               fused(system, SAMPLES, SAMPLES, "image", "audio")[order], **CLOSE)


@torch.no_grad()
def test_the_codes_contrast_goes_on_through_the_fused_experts() -> None:
    system = vlmo(contrasts="code", stage=without("match", "mlm"), fused_layers=1)
    batch = rows_of(system, SAMPLES)
    terms = system(batch, EARLY).terms
    by_key = {each.key: each for each in SAMPLES}
    ordered, vectors = [by_key[key] for key in batch.keys], {}
    for name in ("text", "image", "audio"):
        one_by_one = []
        for each in ordered:
            inputs = system.preparer().inputs([each], [name])
            view = inputs.views["encoder"]
            route, bias, entries = Route.of(view), system.bias(view), system.entries(inputs, view)
            layout, (lower, upper) = sorted_layout(view, route), system.stack.blocks
            hidden = lower(entries[route.order], layout, route, bias(0))
            hidden = upper(hidden, layout, route.as_fused(), bias(1))
            first = system.stack.final_norm(hidden, route)[route.place][:1]
            one_by_one.append(system.space("fused").project[name](first))
        vectors[name] = torch.cat(one_by_one)
    for a, b in (("text", "image"), ("text", "audio"), ("image", "audio")):
        expected = in_batch(vectors[a], vectors[b], batch.extra["picture"], system.space("fused").temperature(),
                            torch.tensor(6.0), 6)
        found = terms[f"align_{a}_{b}_fused"]
        torch.testing.assert_close(found.total, expected.total, **CLOSE)
        assert found.weight == terms[f"align_{a}_{b}"].weight == 0.5


def test_without_a_contrast_nothing_is_encoded_by_itself() -> None:
    system = vlmo(stage=without("contrast"))
    batch = rows_of(system, SAMPLES)
    assert len(batch.views["encoder"].lengths) == len(SAMPLES)  # hidden words
    assert len(batch.views[PARTS].lengths) == 3 * len(SAMPLES)
    assert set(system(batch, EARLY).terms) == {"match", "mlm"}
    everything = vlmo()
    everything.load_state_dict(system.state_dict())
    torch.testing.assert_close(system.eval().embed(SAMPLES, ["text"]), everything.embed(SAMPLES, ["text"]), **CLOSE)


def test_hidden_patches_are_blocks_and_their_targets_the_stored_codes() -> None:
    system = vlmo(stage=VISION)
    batch = rows_of(system, SAMPLES)
    target, view = batch.targets["mim"], batch.views["encoder"]
    assert len(target.label) == len(SAMPLES) * round(0.4 * 64) == int(batch.patches.masked.sum())
    entries = view.gather[target.index] - len(batch.text.ids) - 1  # tables: words, the class token, patches
    assert batch.patches.masked[entries].all() and view.lengths.tolist() == [65] * len(SAMPLES)
    by_key = {each.key: each.pictures[0].codes for each in SAMPLES}
    for number, key in enumerate(batch.keys):
        codes, start = by_key[key], int(view.first[number])
        assert codes is not None
        own = (target.index >= start) & (target.index < start + 65)
        assert target.label[own].tolist() == codes.ravel()[(target.index[own] - start - 1).numpy()].tolist()


def test_hidden_words_of_a_text_alone_are_the_language_experts() -> None:
    """A row without context in the stage of pairs, as all rows in that of language."""
    alone = [sample(number, image=False, speech=False) for number in range(6)]
    for stage in (LANGUAGE, PAIRS):
        system = vlmo(stage=stage)
        system(rows_of(system, alone), EARLY).terms["mlm"].total.backward()
        used = {name.split(".each.")[1].split(".")[0] for name, parameter in system.stack.named_parameters()
                if "feed_forward" in name and parameter.grad is not None and parameter.grad.any()}
        assert used == {"text"}


def test_words_have_an_order_by_either_kind_of_positions() -> None:
    there, back = (dataclasses.replace(SAMPLES[0], caption=text) for text in ("red blue star", "star blue red"))
    for changes, told in (({"positions": "absolute"}, True), ({}, True), ({"zero": True}, False)):
        zero = changes.pop("zero", False)
        system = vlmo("vlmo.tiny", **changes).eval()
        if zero:
            assert system.positions is not None
            with torch.no_grad():
                for table in system.positions.table.values():
                    table.zero_()
        assert torch.allclose(system.embed([there], ["text"]), system.embed([back], ["text"]), **CLOSE) != told


def test_each_modality_owns_its_piece_of_the_table() -> None:
    """Where a modality stands by itself, only its own piece of relative positions counts, and no other does."""
    system = vlmo().eval()
    assert system.positions is not None
    names = ("text", "image", "audio")

    def outcomes() -> dict[str, torch.Tensor]:
        alone = {name: system.embed(SAMPLES, [name]) for name in names}
        return alone | {"across": fused(system, SAMPLES, SAMPLES, "image", "audio")}

    before = outcomes()
    for piece, table in system.positions.table.items():
        with torch.no_grad():
            table.add_(torch.randn_like(table))
            changed = {name for name, value in outcomes().items() if not torch.equal(value, before[name])}
            assert changed == {piece, "across"}
            before = outcomes()


def test_without_experts_there_is_one_of_everything() -> None:
    system = vlmo(experts=False)
    assert {name.split(".each.")[1].split(".")[0] for name, _ in system.stack.named_parameters()
            if ".each." in name} == {"shared"}
    experts = {name.split(".each.")[1].split(".")[0] for name, _ in vlmo().stack.blocks[-1].named_parameters()
               if ".each." in name}
    assert experts == {"shared", "text", "image", "audio", "fused"}


def test_image_codes_are_needed_where_hidden_patches_are_asked() -> None:
    assert "codes" in vlmo(stage=VISION).extractors
    assert "codes" not in vlmo().extractors
    facts = dataclasses.replace(FACTS, codebook=0, codes_grid=0)
    build("vlmo", small("vlmo.tiny"), tokenizer(), facts)
    with pytest.raises(UserError, match="the shards hold none"):
        build("vlmo", small("vlmo.tiny", stage=VISION), tokenizer(), facts)
    with pytest.raises(UserError, match="8 x 8 codes, the model sees it in 4 x 4"):
        config = small("vlmo.tiny", stage=VISION)
        build("vlmo", dataclasses.replace(config, sight=dataclasses.replace(config.sight, patch=8)), tokenizer(), FACTS)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match="'captions'; objectives are contrast, match, mlm, mim"):
        dataclasses.replace(tiny().model, stage=Stage("mine", objectives=("captions",)))
    with pytest.raises(UserError, match="from 1 to 4, the layers there are"):
        dataclasses.replace(tiny().model, fused_layers=5)
    with pytest.raises(UserError, match="trains 'decoder.*', which no parameter is called"):
        vlmo(stage=Stage("mine", trains=("decoder.*",)))
    with pytest.raises(UserError, match="trains 'word_head.*', which no parameter is called"):  # that is not asked
        vlmo(stage=Stage("mine", ("image",), ("mim",), ("word_head.*",)))
    with pytest.raises(UserError, match="two modalities or three, not text"):
        vlmo().score(SAMPLES[:1], ["text"])
    assert vlmo(stage=Stage()).config.asks == OBJECTIVES


@pytest.mark.parametrize(("changes", "said"), [
    ({"data": ()}, "shows nothing of text, image, from which"),
    ({"data": ("audio",)}, "shows nothing of text, image, from which"),
    ({"data": ("smell",)}, "shows 'smell'; there are text, image and audio"),
    ({"data": ("text",), "objectives": ("mlm", "contrast")}, "shows text of text, image, from which 'contrast' learns"),
    ({"data": ("image",), "objectives": ("mlm",)}, "from which 'mlm' learns nothing"),
    ({"data": ("image",), "objectives": ("match", "mim")}, "from which 'match' learns nothing"),
    ({"trains": ()}, "trains nothing; name patterns"),
])
def test_a_stage_that_could_teach_nothing_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dataclasses.replace(tiny().model, stage=Stage("mine", **changes))


def test_states_of_parts_are_kept_for_many_pairs() -> None:
    """Every text beside every picture, from one reading of each."""
    system = vlmo().eval()
    text, image = system.alone(SAMPLES, "text"), system.alone(SAMPLES, "image")
    rows = {"text": np.repeat(np.arange(6), 6), "image": np.tile(np.arange(6), 6)}
    found = system.fuse({"text": text, "image": image}, rows).view(6, 6)
    for one in range(6):
        for other in range(6):
            score = system.score([compose(SAMPLES[one], SAMPLES[other])], ["text", "image"])
            torch.testing.assert_close(found[one, other], score[0], **CLOSE)
    assert isinstance(text, States) and system.cosine_weight == pytest.approx(
        float(system.space("own").temperature().detach()))
