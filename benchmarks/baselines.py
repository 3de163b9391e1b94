"""OPT as one writes it with transformers: BertModel on padded rows, BertLMHeadModel as decoders.

    Batch of the preparer --regroup--> the same sequences in four runs: fused rows, text, pictures, speech; what is
                                       written as rows beside the context they look at
    Padded      BertModel once a run, BertLMHeadModel a decoder; logits at all positions, or at targets only
    Runs        our own blocks on packed tokens, in the same four runs

A baseline is given what would cost a careful user little: every input is embedded once and unpadded, heads without
targets do not run, no mask stands where causality is enough, no cache is kept, there is no dropout inside attention
(ours has none), word vectors are shared as ours are, and `attention` may be either kernel of transformers. What one
would not notice stays: a row that is one modality alone is encoded beside that modality's own sequence.
Shape legend: N packed tokens, B rows, L padded length, C padded context, D width, V words or codes, M targets.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, BertModel

from opt.data.batch import Batch, Targets, View, Writing
from opt.data.layout import self_layout
from opt.data.tokenizer import Tokenizer
from opt.objectives.masked import feature_regression, frame_contrast, token_cross_entropy
from opt.objectives.term import Term
from opt.systems.opt import OPT, OPTConfig
from opt.systems.opt.model import CODES
from opt.systems.shared.pairs import PAIRS
from opt.systems.system import DataFacts, Output, Progress

IGNORED = -100


def regroup(batch: Batch, padded: bool) -> Batch:
    """The batch with a view for each of four encoder runs, the packed or padded tokens of which lie end to end.

    Targets, contexts and first tokens point there. A row that is one modality alone and looked at by a decoder is a
    row of the fused run like any other. padded: adds to `extra` which tokens of a run are real, KIND_valid (B, L), and
    every writing and the hidden words as padded rows (`_padded_writing`, `_word_label`).
    """
    view = batch.views["encoder"]
    first, gather = view.first.numpy(), view.gather.numpy()
    lengths = np.diff(first, append=len(gather))
    views, extra, offset = {"encoder": view}, dict(batch.extra), 0
    place, seen_place = np.zeros(len(gather), np.int64), np.zeros(len(gather), np.int64)
    for kind, numbers in _kinds(batch).items():
        token, valid = _grid(first[numbers], lengths[numbers])
        kept = np.ones_like(valid) if padded else valid
        place[token[valid]] = offset + np.flatnonzero(valid[kept])
        if kind == "fused":
            seen_place = place.copy()
        views[kind] = View(torch.from_numpy(gather[token[kept]]), torch.from_numpy(place[first[numbers]]),
                           self_layout(kept.sum(1)), kept.sum(1), view.tables[token[kept]])
        if padded:
            extra[f"{kind}_valid"] = torch.from_numpy(valid)
        offset += int(kept.sum())
    places, seen = torch.from_numpy(place), torch.from_numpy(seen_place)
    views["encoder"] = replace(view, first=places[view.first])
    targets = {name: replace(target, index=places[target.index]) for name, target in batch.targets.items()}
    writings = {name: replace(writing, seen=seen[writing.seen]) for name, writing in batch.writings.items()}
    if padded:
        if len(targets["mlm"].index):
            extra["word_label"] = _word_label(targets["mlm"], extra["fused_valid"].shape)
        for name, writing in batch.writings.items():
            extra.update({f"{name}_{part}": value for part, value in _padded_writing(writing, first, seen).items()})
    return replace(batch, views=views, extra=extra, targets=targets, writings=writings)


class Runs(OPT):
    """Ours, in four encoder runs: fused rows, and each modality alone."""

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States of the regrouped tokens, and those of each sequence's [CLS]."""
        entries = torch.cat([self.text(batch.text), self.regions(batch.regions), self.frames(batch.frames)])
        hidden = torch.cat([self.run_once(kind, F.embedding(view.gather, entries), batch)
                            for kind, view in batch.views.items() if kind != "encoder"])
        return hidden, hidden[batch.views["encoder"].first]

    def run_once(self, kind: str, hidden_ND: Tensor, batch: Batch) -> Tensor:
        """One run over all sequences of a kind: (N, D)."""
        return self.encoder(hidden_ND, batch.views[kind].layout)


class Padded(Runs):
    """transformers' BERT in place of our encoder and decoders.

    everywhere: logits and predictions at all positions of the rows, from which the loss picks its own; otherwise at
    targets only.
    """

    def __init__(self, config: OPTConfig, tokenizer: Tokenizer, facts: DataFacts, everywhere: bool) -> None:
        super().__init__(config, tokenizer, facts)
        self.everywhere = everywhere
        del self.encoder, self.text_decoder, self.code_decoder
        self.bert = BertModel(_bert(config, config.layers, 1, 1), add_pooling_layer=False)
        self.bert.embeddings = _Given()  # type: ignore[assignment]  # our embedders have added positions and modalities, and normalised
        self.text_writer, self.code_writer = (
            BertLMHeadModel(_bert(config, config.decoder_layers, table.num_embeddings, positions, True))
            for table, positions in ((self.text.token, config.text_positions), (self.code_table, CODES))
        )
        for writer, table in ((self.text_writer, self.text.token), (self.code_writer, self.code_table)):
            writer.set_input_embeddings(table)
            writer.get_output_embeddings().weight = table.weight
        self.use("sdpa")

    def use(self, attention: str) -> Padded:
        """The same model with attention computed by transformers' "sdpa" (its default) or "eager"."""
        for model in (self.bert, self.text_writer, self.code_writer):
            model.set_attn_implementation(attention)
        return self

    def run_once(self, kind: str, hidden_ND: Tensor, batch: Batch) -> Tensor:
        """One padded run: (B L, D)."""
        valid_BL = batch.extra[f"{kind}_valid"]
        hidden_BLD = hidden_ND.view(*valid_BL.shape, -1)
        return self.bert(inputs_embeds=hidden_BLD, attention_mask=valid_BL).last_hidden_state.flatten(0, 1)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """The terms that have targets."""
        hidden_ND, first_SD = self.encode(batch)
        targets, terms = batch.targets, self._alignment(first_SD, batch)
        if len(targets["mlm"].index):
            terms.update(self._words_everywhere(hidden_ND, batch) if self.everywhere
                         else self._masked_words(hidden_ND, batch))
        if len(targets["regions"].index):
            terms.update(self._regions_everywhere(hidden_ND, batch) if self.everywhere
                         else self._masked_regions(hidden_ND, batch))
        if len(targets["frames"].index):
            terms.update(self._frames_everywhere(hidden_ND, batch) if self.everywhere
                         else self._masked_frames(hidden_ND, batch))
        if len(targets["match"].index):
            terms.update(self._matching(hidden_ND, batch))
        for name, written, writer in (("dtr", "text", self.text_writer), ("dir", "codes", self.code_writer)):
            if len(batch.writings[written].ids):
                terms[name] = self._write_padded(written, writer, hidden_ND, batch)
        return Output(terms)

    def _write_padded(self, written: str, writer: BertLMHeadModel, hidden_ND: Tensor, batch: Batch) -> Term:
        """DTR, DIR."""
        ids_BL, label_BL, seen_BC, valid_BC = (
            batch.extra[f"{written}_{part}"] for part in ("ids", "label", "seen", "seen_valid"))
        state_BLD = writer.bert(
            ids_BL, encoder_hidden_states=F.embedding(seen_BC, hidden_ND), encoder_attention_mask=valid_BC,
            use_cache=False,
        ).last_hidden_state
        if self.everywhere:
            return _cross_entropy(writer.cls(state_BLD), label_BL, batch.counts[written])
        index_N = batch.extra[f"{written}_index"]
        logits_NV = writer.cls(state_BLD.flatten(0, 1)[index_N])
        return token_cross_entropy(logits_NV, batch.writings[written].label, batch.counts[written])

    def _words_everywhere(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """MLM: words at every position of the text of fused rows."""
        label_BL = batch.extra["word_label"]
        hidden_BLD = self._fused(hidden_ND, batch)[:, : label_BL.shape[1]]
        return {"mlm": _cross_entropy(self.word_head(hidden_BLD, self.text.token.weight), label_BL,
                                      batch.counts["mlm"])}

    def _regions_everywhere(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """MVFR and MRC: predictions at every position of fused rows."""
        target, count = batch.targets["regions"], batch.counts["regions"]
        hidden_BLD = self._fused(hidden_ND, batch)
        feature_MF = self.region_head(hidden_BLD).flatten(0, 1)[target.index]
        logits_MV = self.class_head(hidden_BLD).flatten(0, 1)[target.index]
        return {
            "mvfr": feature_regression(feature_MF, batch.regions.features[target.label], count),
            "mrc": token_cross_entropy(logits_MV, batch.extra["region_classes"], count),
        }

    def _frames_everywhere(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """MAFR and MAC: predictions at every position of fused rows."""
        target, count, extra = batch.targets["frames"], batch.counts["frames"], batch.extra
        predicted_MF = self.frame_head(self._fused(hidden_ND, batch)).flatten(0, 1)[target.index]
        return {
            "mafr": feature_regression(predicted_MF, batch.frames.features[target.label], count),
            "mac": frame_contrast(predicted_MF, batch.frames.features[extra["contrast_frames"]], extra["contrast_own"],
                                  extra["contrast_row_own"], extra["contrast_row"], count,
                                  self.config.contrast_temperature),
        }

    @staticmethod
    def _fused(hidden_ND: Tensor, batch: Batch) -> Tensor:
        """States of fused rows, the first of the runs: (B, L, D)."""
        valid_BL = batch.extra["fused_valid"]
        return hidden_ND[: valid_BL.numel()].view(*valid_BL.shape, -1)


class _Given(nn.Module):
    """In place of BERT's embeddings: what was given is embedded already."""

    def forward(self, inputs_embeds: Tensor, **rest: object) -> Tensor:
        return inputs_embeds


def _bert(config: OPTConfig, layers: int, vocabulary: int, positions: int, decoder: bool = False) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary, hidden_size=config.width, num_hidden_layers=layers, num_attention_heads=config.heads,
        intermediate_size=config.inner, hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=0.0,
        max_position_embeddings=positions, layer_norm_eps=config.norm_epsilon, pad_token_id=None, type_vocab_size=1,
        is_decoder=decoder, add_cross_attention=decoder,
    )


def _cross_entropy(logits_BLV: Tensor, label_BL: Tensor, count: Tensor) -> Term:
    return Term(F.cross_entropy(logits_BLV.flatten(0, 1).float(), label_BL.flatten(), ignore_index=IGNORED,
                                reduction="sum"), count)


def _kinds(batch: Batch) -> dict[str, np.ndarray]:
    """Numbers of the sequences of each run: rows that targets or decoders look at, then each modality alone."""
    alone: dict[str, np.ndarray] = {}
    for names in PAIRS:
        for name, numbers in zip(names, batch.extra["align_{}_{}".format(*names)].numpy().T, strict=False):
            alone[name] = np.union1d(alone.get(name, np.zeros(0, np.int64)), numbers)
    first = batch.views["encoder"].first.numpy()
    fused = np.setdiff1d(np.arange(len(first)), np.concatenate(list(alone.values())))
    seen = [np.searchsorted(first, writing.seen.numpy(), side="right") - 1 for writing in batch.writings.values()]
    return {"fused": np.union1d(fused, np.concatenate(seen)), **alone}


def _grid(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat tokens of sequences as padded rows (B, L), padding repeating a row's last token, and which are real."""
    steps = np.arange(lengths.max(initial=0))[None, :]
    return starts[:, None] + np.minimum(steps, lengths[:, None] - 1), steps < lengths[:, None]


def _padded_writing(writing: Writing, first: np.ndarray, places: Tensor) -> dict[str, Tensor]:
    """ids and label (B, L), index (N,) of the real ones among those B L; seen (B, C): places of the states that a
    row looks at, and seen_valid (B, C), which of them are real."""
    starts = np.flatnonzero(writing.positions.numpy() == 0)
    token, real = _grid(starts, np.diff(starts, append=len(writing.ids)))
    sequence = np.searchsorted(first, writing.seen.numpy(), side="right")
    begins = np.flatnonzero(np.diff(sequence, prepend=-1))  # no two rows look at the same sequence
    seen, valid = _grid(begins, np.diff(begins, append=len(sequence)))
    if len(begins) != len(starts):
        raise ValueError(f"{len(starts)} rows are written that look at {len(begins)} sequences")
    return {
        "ids": writing.ids[torch.from_numpy(token)], "index": torch.from_numpy(np.flatnonzero(real)),
        "label": torch.where(torch.from_numpy(real), writing.label[torch.from_numpy(token)], IGNORED),
        "seen": places[writing.seen][torch.from_numpy(seen)], "seen_valid": torch.from_numpy(valid),
    }


def _word_label(target: Targets, shape: torch.Size) -> Tensor:
    """What stands at the hidden words of fused rows, (B, L) up to the last hidden word of the batch; else IGNORED."""
    label_BL = torch.full(shape, IGNORED)
    label_BL.view(-1)[target.index] = target.label
    return label_BL[:, : int((label_BL != IGNORED).any(0).nonzero().max()) + 1]
