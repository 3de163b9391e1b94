"""OPT: rows are corrupted as the paper says, the model learns, sees what it may see, and writes what it reads."""

import dataclasses

import numpy as np
import pytest
import torch
from fixtures import FACTS, WORDS, fake_sample, tokenizer

from opt.checkpoint import from_pretrained, save_pretrained
from opt.config import UserError
from opt.data.plan import BatchPlan
from opt.objectives.matching import ALL_MATCH
from opt.objectives.term import loss
from opt.systems.opt import OPT, OPTConfig, Shares, tiny
from opt.systems.opt.tasks import TASKS
from opt.systems.system import Progress, Sampling, compose, load, names

SMALL = dataclasses.replace(tiny().model, width=32, layers=2, heads=2, inner=64, decoder_layers=1, alignment_width=16)
SAMPLES = {number: fake_sample(number) for number in range(12)}


def plan(task: str, rows: int = 12, seed: int = 0) -> BatchPlan:
    """Every row draws `task`; partners are the next two rows."""
    numbers = np.arange(rows)
    return BatchPlan(
        sample=numbers, task=np.full(rows, TASKS.index(task)),
        partners=np.stack([(numbers + 1) % rows, (numbers + 2) % rows], axis=1),
        key=np.random.default_rng(seed).integers(2**62, size=rows).astype(np.uint64),
        epoch=0, position=0, next_position=rows,
    )


def model(config: OPTConfig = SMALL) -> OPT:
    torch.manual_seed(0)
    return OPT(config, tokenizer(), FACTS)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_a_gradient_to_every_parameter_it_should(task: str) -> None:
    system = model()
    output = system(system.preparer()(SAMPLES, plan(task)), Progress(0, 0.0))
    total = loss(output.terms)
    total.backward()
    assert torch.isfinite(total)
    lacking = [name for name, parameter in system.named_parameters() if parameter.grad is None]
    assert not lacking, "every head runs every step, on zero rows if need be"
    own = {"mlm": ["mlm"], "mvm": ["mvfr", "mrc"], "mam": ["mafr", "mac"], "dtr": ["dtr"], "dir": ["dir"],
           "match": ["match"]}[task]
    for name, term in output.terms.items():
        if not name.startswith("align"):
            assert (term.count > 0) == (name in own)


def test_a_masked_batch_hides_what_it_asks_for_and_nothing_else() -> None:
    config = dataclasses.replace(SMALL, modality_rate=0.0, alignment_weight=0.0)
    rows = model(config).preparer()
    for task, target, table in (("mvm", "regions", "regions"), ("mam", "frames", "frames")):
        batch = rows(SAMPLES, plan(task))
        view = batch.views["encoder"]
        offset = len(batch.text.ids) + (len(batch.regions.masked) if table == "frames" else 0)
        entries = view.gather[batch.targets[target].index] - offset
        data = getattr(batch, table)
        assert data.masked[entries].all()
        assert (data.features[entries] == 0).all()
        assert not data.masked[batch.targets[target].label].any(), "targets are the original features"
        assert int(data.masked[view.gather[(view.gather >= offset) & (view.gather < offset + len(data.masked))]
                               - offset].sum()) == len(entries)
    batch = rows(SAMPLES, plan("mlm"))
    words = batch.text.ids[batch.views["encoder"].gather[batch.targets["mlm"].index]]
    assert (words == tokenizer().mask).float().mean() > 0.5


def test_token_rates_lie_within_binomial_bounds_and_never_are_empty() -> None:
    config = dataclasses.replace(SMALL, modality_rate=0.0, alignment_weight=0.0)
    rows, hidden, total = model(config).preparer(), 0, 0
    long = {0: dataclasses.replace(fake_sample(0), caption=" ".join(["red blue green star"] * 12))}
    for seed in range(400):
        one = dataclasses.replace(plan("mlm", 1, seed), partners=np.full((1, 2), -1))
        hidden += len(rows(long, one).targets["mlm"].index)
        total += 48
    assert abs(hidden - 0.15 * total) < 4 * np.sqrt(total * 0.15 * 0.85)


def test_modality_masking_never_hides_everything_and_reaches_every_case() -> None:
    config = dataclasses.replace(SMALL, modality_rate=0.5, drop_rate=1.0, alignment_weight=0.0)
    rows, seen = model(config).preparer(), set()
    for seed in range(60):
        one = dataclasses.replace(plan("mlm", 1, seed), partners=np.full((1, 2), -1))
        batch = rows(SAMPLES, one)
        text, gather = len(batch.text.ids), batch.views["encoder"].gather
        image = bool(((gather >= text) & (gather < text + len(batch.regions.masked))).any())
        audio = bool((gather >= text + len(batch.regions.masked)).any())
        whole = len(batch.targets["mlm"].index) == len(tokenizer().encode(SAMPLES[0].caption or "", 62))
        assert image or audio or not whole
        seen.add((image, audio))
    assert seen == {(True, True), (True, False), (False, True), (False, False)}


def test_five_way_labels_are_true_of_the_sequences_they_name() -> None:
    """Each row's parts are traced back to the samples they came from."""
    config = dataclasses.replace(SMALL, alignment_weight=0.0, pair_rate=0.3)
    rows, seen = model(config).preparer(), set()
    features = {tuple(np.round(s.pictures[0].regions[0].astype(np.float32), 3)): k for k, s in SAMPLES.items()}
    speech = {tuple(np.round(s.speech[0].astype(np.float32), 3)): k for k, s in SAMPLES.items()}
    captions = {tuple(tokenizer().encode(s.caption or "", 62)): k for k, s in SAMPLES.items()}
    for seed in range(30):
        batch = rows(SAMPLES, plan("match", seed=seed))
        text, regions = len(batch.text.ids), len(batch.regions.masked)
        gather, first = batch.views["encoder"].gather, batch.views["encoder"].first
        for number, start in enumerate(first.tolist()):
            end = first[number + 1].item() if number + 1 < len(first) else len(gather)
            entries = gather[start:end]
            ids = batch.text.ids[entries[entries < text]].tolist()
            words = captions.get(tuple(word for word in ids if word not in (tokenizer().cls, tokenizer().sep)))
            image = entries[(entries >= text) & (entries < text + regions)]
            audio = entries[entries >= text + regions]
            who = [words if len(ids) > 1 else None]
            who.append(features[tuple(np.round(batch.regions.features[image[0] - text].float().numpy(), 3))]
                       if len(image) else None)
            who.append(speech[tuple(np.round(batch.frames.features[audio[0] - text - regions].float().numpy(), 3))]
                       if len(audio) else None)
            label = int(batch.targets["match"].label[number])
            present = [one for one in who if one is not None]
            equal = (who[1] == who[2], who[0] == who[2], who[0] == who[1])
            if len(present) == 3:
                wanted = {0: (True, True, True), 1: (True, False, False), 2: (False, True, False),
                          3: (False, False, True), 4: (False, False, False)}[label]
                assert equal == wanted
            else:
                assert label == (0 if present[0] == present[1] else 4)
            seen.add((len(present), label))
    assert seen == {(3, 0), (3, 1), (3, 2), (3, 3), (3, 4), (2, 0), (2, 4)}


def test_a_row_is_the_same_whoever_shares_its_batch() -> None:
    config = dataclasses.replace(SMALL, alignment_weight=0.0)
    system = model(config).eval()
    rows, whole = system.preparer(), plan("mlm")
    together = system(rows(SAMPLES, whole), Progress(0, 0.0)).terms["mlm"].total
    alone = torch.zeros(())
    for row in range(12):
        one = dataclasses.replace(whole, sample=whole.sample[[row]], task=whole.task[[row]],
                                  partners=np.full((1, 2), -1), key=whole.key[[row]])
        alone = alone + system(rows(SAMPLES, one), Progress(0, 0.0)).terms["mlm"].total
    assert together.item() == pytest.approx(alone.item(), rel=1e-4)


def test_a_hidden_modality_cannot_be_seen() -> None:
    """What a decoder writes from speech alone does not depend on the picture or the words."""
    system = model().eval()
    other = compose(text=SAMPLES[3], image=SAMPLES[4], audio=SAMPLES[0])
    first, second = system.features([SAMPLES[0]], ["audio"]), system.features([other], ["audio"])
    assert torch.equal(first, second)
    assert not torch.equal(system.features([SAMPLES[0]], ["text"]), system.features([other], ["text"]))


def test_abilities_do_not_depend_on_the_batch() -> None:
    system, samples = model().eval(), [SAMPLES[number] for number in range(6)]
    for modalities in (["text"], ["image"], ["audio"], ["text", "audio"]):
        for ability in (system.embed, system.features):
            together = ability(samples, modalities)
            alone = torch.cat([ability([sample], modalities) for sample in samples])
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    together = system.score(samples, ["text", "image"])
    torch.testing.assert_close(together, torch.cat([system.score([s], ["text", "image"]) for s in samples]),
                               atol=1e-5, rtol=1e-4)
    for sampling in (Sampling(limit=8), Sampling(limit=8, beams=3), Sampling(limit=8, top_p=0.9, temperature=2.0)):
        for modalities in (["image"], ["text", "audio"], ["text", "image", "audio"]):
            texts = system.generate_text(samples, modalities, sampling)
            assert texts == [system.generate_text([sample], modalities, sampling)[0] for sample in samples]
    codes = system.generate_codes(samples, ["text"], Sampling(top_k=4))
    assert codes.shape == (6, 8, 8)
    alone = [system.generate_codes([sample], ["text"], Sampling(top_k=4)) for sample in samples]
    assert torch.equal(codes, torch.cat(alone)), "what a sample draws is its own"


def test_a_seed_repeats_and_another_differs() -> None:
    system, samples = model().eval(), [SAMPLES[number] for number in range(3)]
    drawn = [system.generate_codes(samples, ["audio"], Sampling(seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and (drawn[0] != drawn[2]).flatten(1).any(1).all()
    texts = [system.generate_text(samples, ["image"], Sampling(top_k=0, temperature=3.0, seed=s)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert system.generate_text(samples, ["image"], Sampling(seed=1)) == system.generate_text(
        samples, ["image"], Sampling(seed=2)), "greedy draws nothing"


@pytest.mark.parametrize("wrong", [
    {"beams": 0}, {"length_penalty": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": float("nan")},
    {"temperature": 0.0}, {"temperature": 1e-300}, {"temperature": 1e300}, {"length_penalty": 1000.0}, {"seed": -1},
    {"limit": 0}, {"beams": 4, "top_k": 5}, {"top_k": 1, "top_p": 0.5},
])  # fmt: skip
def test_sampling_that_makes_no_sense_is_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "-")):
        Sampling(**wrong)


@pytest.mark.parametrize("wrong", [
    {"modality_rate": 1.0}, {"modality_rate": 0.6}, {"modality_rate": 1.5, "modality_masking": "paper"},
    {"token_rate": 2.0}, {"token_rate": -0.1}, {"token_rate": float("nan")}, {"frame_span": 0}, {"frame_span": -3},
    {"drop_rate": 2.0}, {"pair_rate": 7.0}, {"label_smoothing": 1.0}, {"dropout": 1.0}, {"contrast_temperature": 0.0},
    {"norm_epsilon": -1.0}, {"alignment_weight": -1.0}, {"alignment_width": 0}, {"text_positions": 2},
    {"frame_positions": 0}, {"layers": 0}, {"heads": 0}, {"width": 0}, {"inner": 0}, {"decoder_layers": 0},
    {"shares": Shares(mlm=-1.0)}, {"shares": Shares(dir=float("nan"))}, {"shares": Shares(0, 0, 0, 0, 0, 0)},
])  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(wrong: dict) -> None:
    """A rate of 1 hid all modalities again and again, for ever."""
    with pytest.raises(UserError, match=f"{next(iter(wrong)).replace('_', '-')}.* must"):
        dataclasses.replace(SMALL, **wrong)


def test_settings_at_the_edges_train() -> None:
    edges = {"token_rate": 1.0, "frame_span": 10_000, "drop_rate": 0.0, "label_smoothing": 0.0, "text_positions": 3}
    for changes in (edges, {**edges, "modality_rate": 0.9, "modality_masking": "paper", "token_rate": 0.0}):
        system = model(dataclasses.replace(SMALL, **changes))
        for task in TASKS:
            assert torch.isfinite(loss(system(system.preparer()(SAMPLES, plan(task)), Progress(0, 0.0)).terms))


def test_sampling_says_what_it_does() -> None:
    assert Sampling().for_text().protocol == "greedy decoding"
    assert Sampling().for_codes().protocol == "top-32 sampling at temperature 1, seed 0"
    assert Sampling(beams=4, length_penalty=0.6).for_text().protocol == "beam search, 4 beams, length penalty 0.6"
    assert Sampling(top_p=0.9).for_text().protocol == "sampling from the nucleus of 0.9 at temperature 1, seed 0"


def test_samples_without_a_modality_train_and_are_refused_where_it_is_asked_for() -> None:
    system = model()
    mixed = {0: fake_sample(0, regions=False), 1: fake_sample(1, speech=False), 2: fake_sample(2, caption=False),
             3: fake_sample(3), 4: fake_sample(4, regions=False, speech=False)}
    for task in TASKS:
        output = system(system.preparer()(mixed, plan(task, 5)), Progress(0, 0.0))
        assert torch.isfinite(loss(output.terms))
    with pytest.raises(UserError, match="sample0.*image"):
        system.embed([mixed[0]], ["image"])


def test_it_learns_a_batch_by_heart() -> None:
    """After 300 steps on twelve samples it finds partners, and writes and draws better than guessing."""
    config = dataclasses.replace(SMALL, shares=Shares(), modality_rate=0.3)
    system = model(config)
    rows, optimizer = system.preparer(), torch.optim.Adam(system.parameters(), 3e-3)
    numbers, losses = np.arange(12), []
    for step in range(300):
        mixed = plan(TASKS[0], seed=step)
        mixed = dataclasses.replace(mixed, task=np.random.default_rng(step).permutation(numbers % len(TASKS)))
        terms = system(rows(SAMPLES, mixed), Progress(step, 0.0)).terms
        total = loss(terms)
        losses.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert losses[-1] < 0.4 * losses[0]
    assert terms["dtr"].mean() < 0.7 * np.log(len(WORDS)), "below guessing among the words"
    assert terms["dir"].mean() < 0.3 * np.log(len(WORDS)), "below guessing among the codes that occur"
    samples = list(SAMPLES.values())
    similar = system.eval().embed(samples, ["text"]) @ system.embed(samples, ["image"]).T
    assert (similar.argmax(1) == torch.arange(12)).float().mean() > 0.9


def test_a_saved_model_is_the_same_model(tmp_path) -> None:
    system = model().eval()
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_pretrained(system, tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    assert again.config == system.config and again.facts == system.facts
    assert torch.equal(again.embed([SAMPLES[0]], ["text"]), system.embed([SAMPLES[0]], ["text"]))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not the file")
    with pytest.raises(UserError, match="config.json"):
        from_pretrained(tmp_path / "model")


def test_systems_and_presets_are_found_by_name() -> None:
    assert "opt" in names()
    assert load("opt.tiny") == tiny()
    with pytest.raises(UserError, match="opt.tiny"):
        load("opt.giant")
    with pytest.raises(UserError, match="there are"):
        load("unheard.of")


@pytest.mark.parametrize("modalities", [("text", "image"), ("image", "audio"), ("text", "image", "audio")])
def test_fusing_kept_states_scores_pairs_as_encoding_them_whole_does(modalities: tuple[str, ...]) -> None:
    system, samples = model().eval(), [fake_sample(number) for number in range(4)]
    parts = {name: system.alone(samples, name) for name in modalities}
    rows = {name: np.array([2, 3, 0, 0, 0]) for name in modalities} | {modalities[0]: np.array([0, 3, 1, 2, 0])}
    mixed = [compose(**{name: samples[rows[name][pair]] for name in modalities}) for pair in range(5)]
    first_SD = system._encode_samples(mixed, modalities)[2]
    whole = system.match_head(system.pooler(first_SD)).float()[:, ALL_MATCH]
    torch.testing.assert_close(system.fuse(parts, rows), whole, rtol=1e-5, atol=1e-5)
