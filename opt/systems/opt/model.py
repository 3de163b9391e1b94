"""OPT: three embedders, one cross-modal encoder, heads, a text decoder and an image-code decoder (paper Figure 1).

Shape legend: N packed encoder tokens, S sequences, M targets, C tokens that decoders look at, D width, E shared space,
B samples, K codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from opt.config import UserError
from opt.data.batch import Batch, TextTable
from opt.data.record import CODE_GRID, Sample
from opt.data.tokenizer import Tokenizer
from opt.nn.block import Stack
from opt.nn.compiled import uncompiled
from opt.nn.decoder import Decoder, TiedDecoder
from opt.nn.embed import FrameEmbedder, RegionEmbedder, TextEmbedder
from opt.nn.heads import AnswerHead, Pooler, Projection, Temperature, TokenHead
from opt.nn.init import normal
from opt.nn.ranking import rank
from opt.nn.states import States, side_by_side
from opt.nn.writing import write
from opt.objectives.masked import feature_regression, frame_contrast, token_cross_entropy
from opt.objectives.matching import ALL_MATCH, five_way, margin_ranking, soft_classes
from opt.objectives.term import Term
from opt.systems.opt.config import OPTConfig
from opt.systems.opt.downstream import OTHER_PICTURE, TRUE, DownstreamRows
from opt.systems.opt.rows import Rows
from opt.systems.opt.sequences import highest_region, padded, part
from opt.systems.shared.matching import pair_up
from opt.systems.shared.momentum import Contrasted, by_row, gathered
from opt.systems.shared.pairs import contrasts
from opt.systems.system import MODALITIES, DataFacts, Output, Progress, Sampling, System

CODES = CODE_GRID[0] * CODE_GRID[1]
ANSWERING = ("vqa-classes", "vqa-words", "nlvr2")


class OPT(System):
    """arXiv 2107.00249. `facts` gives the widths that the extractors fixed."""

    name = "opt"
    config_type = OPTConfig

    def __init__(self, config: OPTConfig, tokenizer: Tokenizer, facts: DataFacts) -> None:
        super().__init__()
        if facts.codes_grid not in (0, CODE_GRID[0]):
            raise UserError(f"the shards tell a picture in {facts.codes_grid} x {facts.codes_grid} codes, OPT draws "
                            f"{CODE_GRID[0]} x {CODE_GRID[1]}; extract again with --codes-grid {CODE_GRID[0]}, or with "
                            "--codes none")
        self.config, self.tokenizer, self.facts = config, tokenizer, facts
        width, dropout, epsilon = config.width, config.dropout, config.norm_epsilon
        region_width, speech_width = max(facts.region_width, 1), max(facts.speech_width, 1)
        self.text = TextEmbedder(tokenizer.size, config.text_positions, width, dropout, epsilon)
        self.regions = RegionEmbedder(region_width, width, dropout, epsilon)
        self.frames = FrameEmbedder(speech_width, config.frame_positions, width, dropout, epsilon)
        self.encoder = Stack(config.layers, width, config.heads, config.inner, dropout, config.post_norm,
                             epsilon=epsilon)
        self.pooler = Pooler(width)
        self.word_head = TokenHead(width, tokenizer.size, epsilon)
        self.region_head = nn.Linear(width, region_width)
        self.class_head = nn.Linear(width, len(facts.region_classes) + 1)
        self.frame_head = nn.Linear(width, speech_width)
        self.match_head = nn.Linear(width, 5)
        self.code_table = nn.Embedding(facts.codebook + 1, width)
        self.text_decoder, self.code_decoder = (
            Decoder(config.decoder_layers, width, config.heads, config.inner, vocabulary, positions, dropout)
            for vocabulary, positions in ((tokenizer.size, config.text_positions), (facts.codebook, CODES))
        )
        self.align = nn.ModuleDict({name: Projection(width, config.alignment_width) for name in
                                    ("text", "image", "audio")}) if config.alignment_weight > 0 else None
        self.temperature = Temperature() if config.alignment_weight > 0 else None
        answers = len(config.tuning.answers)
        self.answer_head = AnswerHead(width * config.tuning.pictures, answers) if answers else None
        self.apply(normal)

    def preparer(self) -> Rows:
        """Samples -> packed rows: corrupted in pretraining, clean in fine-tuning."""
        kind, facts = Rows if self.config.tuning.task == "pretraining" else DownstreamRows, self.facts
        return kind(self.config, self.tokenizer, max(facts.region_width, 1), max(facts.speech_width, 1), facts.codebook)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """Encode everything once, then ask each head about its own rows."""
        hidden_ND, first_SD = self.encode(batch)
        terms = {
            **self._masked_words(hidden_ND, batch),
            **self._masked_regions(hidden_ND, batch),
            **self._masked_frames(hidden_ND, batch),
            **self._matching(hidden_ND, batch),
            **self._denoising(hidden_ND, batch),
            **self._alignment(first_SD, batch),
            **self._ranking(first_SD, batch),
            **self._hard_pairs(first_SD, batch),
            **self._answering(hidden_ND, batch),
        }
        return Output(terms)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-modal states M of every token (N, D) (Eq. 1), and those of each sequence's [CLS] (S, D)."""
        view = batch.views["encoder"]
        hidden_ND = self.encoder(nn.functional.embedding(view.gather, self._entries(batch)), view.layout)
        return hidden_ND, hidden_ND[view.first]

    def _entries(self, batch: Batch) -> Tensor:
        """Every word, region and frame of the batch's tables, embedded."""
        return torch.cat([self.text(batch.text), self.regions(batch.regions), self.frames(batch.frames)])

    def _masked_words(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """MLM (Eq. 2)."""
        target = batch.targets["mlm"]
        logits_MV = self.word_head(hidden_ND[target.index], self.text.token.weight)
        return {"mlm": token_cross_entropy(logits_MV, target.label, batch.counts["mlm"])}

    def _masked_regions(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """MVFR (Eq. 4) and MRC (Eq. 5)."""
        target, count = batch.targets["regions"], batch.counts["regions"]
        hidden_MD = hidden_ND[target.index]
        feature_MF = batch.regions.features[target.label]
        return {
            "mvfr": feature_regression(self.region_head(hidden_MD), feature_MF, count),
            "mrc": token_cross_entropy(self.class_head(hidden_MD), batch.extra["region_classes"], count),
        }

    def _masked_frames(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """MAFR (Eq. 7) and MAC (Eq. 8), which share one head."""
        target, count, extra = batch.targets["frames"], batch.counts["frames"], batch.extra
        predicted_MF = self.frame_head(hidden_ND[target.index])
        contrast = frame_contrast(
            predicted_MF, batch.frames.features[extra["contrast_frames"]], extra["contrast_own"],
            extra["contrast_row_own"], extra["contrast_row"], count, self.config.contrast_temperature,
        )
        return {"mafr": feature_regression(predicted_MF, batch.frames.features[target.label], count), "mac": contrast}

    def _matching(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """Five-way matching (Eq. 11)."""
        target = batch.targets["match"]
        logits_S5 = self.match_head(self.pooler(hidden_ND[target.index]))
        return {"match": five_way(logits_S5, target.label, batch.counts["match"], self.config.matching)}

    def _denoising(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """DTR (Eq. 9) and DIR (Eq. 10)."""
        terms = {}
        decoders = {"dtr": ("text", self.text_decoder, self.text.token), "dir": ("codes", self.code_decoder,
                                                                                 self.code_table)}
        for name, (written, decoder, table) in decoders.items():
            writing = batch.writings[written]
            context_CD = nn.functional.embedding(writing.seen, hidden_ND)
            hidden_MD = decoder(writing.ids, writing.positions, writing.layout, context_CD, writing.context,
                                table.weight)
            logits_MV = decoder.logits(hidden_MD, table.weight)
            terms[name] = token_cross_entropy(logits_MV, writing.label, batch.counts[written],
                                              self.config.label_smoothing)
        return terms

    def _alignment(self, first_SD: Tensor, batch: Batch) -> dict[str, Term]:
        """Text, picture and speech of one sample close in one space, all three pairs (ours). A row has at most one
        pair of each kind."""
        if self.align is None or self.temperature is None:
            return {}
        align = self.align
        return contrasts(lambda name, sequences: align[name](first_SD[sequences]), MODALITIES, batch,
                         self.temperature(), self.config.alignment_weight)

    def _ranking(self, first_SD: Tensor, batch: Batch) -> dict[str, Term]:
        """Fine-tuning for retrieval: true pairs above false ones (gap A18)."""
        if "ranked" not in batch.extra:
            return {}
        logits_S5 = self.match_head(self.pooler(first_SD))
        logits_M3 = logits_S5[batch.extra["ranked"], ALL_MATCH]
        return {"ranking": margin_ranking(logits_M3[:, TRUE], logits_M3[:, OTHER_PICTURE:], batch.counts["ranked"],
                                          self.config.tuning.margin)}

    def _hard_pairs(self, first_SD: Tensor, batch: Batch) -> dict[str, Term]:
        """Fine-tuning for retrieval: each true pair, its text with the picture and its picture with the text of another
        that the alignment takes for right (ALBEF, section 3.2), of all ranks."""
        if self.align is None or self.temperature is None or "context" not in batch.host:
            return {}
        rows, entries = batch.host["rows"], self._entries(batch)
        online = {name: self.align[name](by_row(first_SD, rows[:, MODALITIES.index(name)])) for name in MODALITIES}
        keys = {name: gathered(vectors) for name, vectors in online.items()}
        pairs = pair_up(Contrasted({}, online, keys, gathered(batch.extra["picture"]), {}), batch, self.temperature())
        text, image = part(batch, entries, rows[:, 0], 0), part(batch, entries, rows[:, 1], 1)
        with uncompiled():
            logits_P5 = self._matched({"text": text.of_ranks(pairs.text), "image": image.of_ranks(pairs.context)})
        return {"hard": pairs.term(logits_P5[:, ALL_MATCH], batch.counts["hard"])}

    def _answering(self, hidden_ND: Tensor, batch: Batch) -> dict[str, Term]:
        """Fine-tuning for questions: how right each answer of the list is (gap A22), by [CLS] of each picture."""
        if self.answer_head is None or "answer" not in batch.targets:
            return {}
        target = batch.targets["answer"]
        logits_MA = self.answer_head(self.pooler(hidden_ND[target.index]).flatten(1))
        target_MA = torch.zeros(logits_MA.shape, device=logits_MA.device)
        target_MA[target.label[:, 0], target.label[:, 1]] = batch.extra["answer_scores"]
        return {"answer": soft_classes(logits_MA, target_MA, batch.counts["answer"])}

    def after_step(self, carries: Sequence[dict[str, Tensor]], kept: Tensor) -> None:
        """Keeps the temperature in its range."""
        if self.temperature is not None:
            self.temperature.clamp()

    def _encode_samples(self, samples: Sequence[Sample], modalities: Sequence[str]) -> tuple[Batch, Tensor, Tensor]:
        batch = self.preparer().inputs(samples, modalities).to(self.device)
        return batch, *self.encode(batch)

    @torch.inference_mode()
    def embed(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Tensor:
        """Each modality alone through the encoder and its alignment head; several are averaged, then unit length."""
        if self.align is None:
            raise self._cannot("embed (it was trained with alignment_weight 0; score pairs by matching instead)")
        vectors = [self.align[name](self._encode_samples(samples, [name])[2]) for name in modalities]
        return nn.functional.normalize(torch.stack(vectors).sum(0), dim=-1)

    @torch.inference_mode()
    def alone(self, samples: Sequence[Sample], modality: str) -> States:
        """Embedded words, regions or frames. The encoder mixes modalities from its first layer on, so that this is all
        that pairs can share."""
        batch = self.preparer().inputs(samples, [modality]).to(self.device)
        cls = 0 if modality == "text" else 1  # it stands before whole sequences only: see `fuse`
        return part(batch, self._entries(batch), np.arange(len(samples)), cls)

    @torch.inference_mode()
    def fuse(self, parts: Mapping[str, States], rows: Mapping[str, np.ndarray]) -> Tensor:
        """The matching head's logit for "all match"."""
        return self._matched({name: parts[name].take(rows[name]) for name in parts})[:, ALL_MATCH].float()

    @property
    def cosine_weight(self) -> float:
        """1 / temperature: the logit of the contrast, a log-likelihood as matching's is."""
        return 0.0 if self.temperature is None else float(self.temperature().detach())

    def _matched(self, parts: Mapping[str, States]) -> Tensor:
        """Five logits (P, 5) for each sample of all parts, side by side through the encoder."""
        ordered = [parts[name] for name in MODALITIES if name in parts]
        if "text" not in parts:
            ordered = [self._lone_cls(len(ordered[0])), *ordered]
        entries_ND, view = side_by_side(ordered)
        return self.match_head(self.pooler(self.encoder(entries_ND, view.layout)[view.first]))

    def _lone_cls(self, count: int) -> States:
        """[CLS] alone, `count` times."""
        cls = torch.tensor([self.tokenizer.cls], device=self.device)
        return States(self.text(TextTable(cls, torch.zeros_like(cls))).expand(count, -1), np.ones(count, np.int64))

    @torch.inference_mode()
    def features(self, samples: Sequence[Sample], modalities: Sequence[str]) -> Tensor:
        """[CLS] of all modalities together, [CLS] of each alone, and the highest state over the regions, side by side.

        Words and frames are sequences that [CLS] sums up; regions are a set of things, each of which may be an object.
        """
        batch, hidden_ND, together_SD = self._encode_samples(samples, modalities)
        parts = [together_SD]
        if len(modalities) > 1:
            parts += [self._encode_samples(samples, [name])[2] for name in modalities]
        if "image" in modalities:
            parts.append(highest_region(batch, hidden_ND))
        return torch.cat(parts, dim=1).float()

    @torch.inference_mode()
    def answer(
        self, samples: Sequence[Sample], candidates: Sequence[str] | None = None, shortlist: int = 0
    ) -> list[str]:
        """The likeliest of the list of answers, or words, as the model was tuned for; vqa-words ranks candidates."""
        rows, tuning = self.preparer(), self.config.tuning
        if not isinstance(rows, DownstreamRows) or tuning.task not in ANSWERING:
            raise self._cannot(f"answer before it is tuned for that (`opt finetune` {' or '.join(ANSWERING)})")
        for sample in samples:
            tuning.require(sample)
        if tuning.task == "vqa-words":
            if candidates is None:
                return self.generate_text(samples, ("text", "image"), Sampling())
            return self._ranked(samples, candidates, shortlist)
        if candidates is not None:
            raise self._cannot(f"rank candidates when tuned for {tuning.task}: it answers from its own list of "
                               f"{len(tuning.answers):,}, vqa-words ranks")
        assert self.answer_head is not None
        first_SD = self.encode(rows.questions(samples).to(self.device))[1]
        best_B = self.answer_head(self.pooler(first_SD).view(len(samples), -1)).argmax(dim=-1)
        return [tuning.answers[place] for place in best_B.tolist()]

    def _ranked(self, samples: Sequence[Sample], candidates: Sequence[str], shortlist: int) -> list[str]:
        """The candidate that the text decoder would write with the highest probability. Equals: the first."""
        ids = [np.append(self.tokenizer.encode(each, self.config.text_positions - 2), self.tokenizer.eos)
               for each in candidates]
        batch, hidden_ND, _ = self._encode_samples(samples, ("text", "image"))
        context = padded(batch, hidden_ND)
        writer = TiedDecoder(self.text_decoder, self.text.token.weight)
        best_B = rank(writer, *context, self.tokenizer.bos, ids, shortlist)
        return [candidates[place] for place in best_B.tolist()]

    @property
    def answering(self) -> str:
        """How `answer` answers without candidates."""
        tuning = self.config.tuning
        return {
            "vqa-words": f"written by the decoder, {Sampling().for_text().protocol}",
            "vqa-classes": f"classified among {len(tuning.answers):,} answers",
            "nlvr2": "classified; the sentence beside each picture by itself, both readings side by side",
        }.get(tuning.task, "")

    @torch.inference_mode()
    def generate_text(self, samples: Sequence[Sample], modalities: Sequence[str], sampling: Sampling) -> list[str]:
        """The text decoder, looking at the named modalities."""
        limit = min(sampling.limit, self.config.text_positions - 1)
        ids_BL = self._write(self.text_decoder, self.text.token, samples, modalities, self.tokenizer.bos,
                             self.tokenizer.eos, limit, sampling.for_text())
        return [self.tokenizer.decode(ids) for ids in ids_BL.cpu().numpy()]

    @torch.inference_mode()
    def generate_codes(self, samples: Sequence[Sample], modalities: Sequence[str], sampling: Sampling) -> Tensor:
        """The code decoder, looking at the named modalities: (B, 8, 8)."""
        codes_BK = self._write(self.code_decoder, self.code_table, samples, modalities, self.facts.codebook, None,
                               CODES, sampling.for_codes())
        return codes_BK.unflatten(1, CODE_GRID)

    def _write(self, decoder: Decoder, table: nn.Embedding, samples: Sequence[Sample], modalities: Sequence[str],
               start: int, end: int | None, length: int, sampling: Sampling) -> Tensor:
        batch, hidden_ND, _ = self._encode_samples(samples, modalities)
        context = padded(batch, hidden_ND)
        writer = TiedDecoder(decoder, table.weight)
        return write(writer, *context, [start], end, length, sampling, [each.key for each in samples])
