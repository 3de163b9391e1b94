"""BEiT-3: pictures, texts and speech through one multiway transformer; what is hidden is predicted from all the rest.

    image  [class] patches    patch + position  \\                                 hidden patches --> image codes
    text   [CLS] words [SEP]  word + position    > MultiwayStack (sub-LN) --> hidden words   --> words
    audio  [class] frames     frame + position  /   experts by modality        hidden frames  --> speech codes
                                                                               first states   --> contrast, answers

Shape legend: N packed tokens, S sequences, M hidden tokens, G codebooks, D width, E shared space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from opt.config import UserError
from opt.data.batch import Batch
from opt.data.pack import TEXT
from opt.data.record import Sample
from opt.data.tokenizer import Tokenizer
from opt.nn.embed import FrameEmbedder, PatchEmbedder, TextEmbedder
from opt.nn.heads import Pooler, Projection, Temperature
from opt.nn.init import by_width
from opt.nn.multiway import KINDS, MultiwayStack, Switch
from opt.nn.pyramid import STRIDES, PatchMap, Pyramid
from opt.nn.relative import prefix
from opt.nn.sampling import Sampling
from opt.nn.states import States, side_by_side
from opt.nn.writing import write
from opt.objectives.masked import feature_regression, token_cross_entropy
from opt.objectives.term import Term
from opt.systems.beit3.config import BEiT3Config
from opt.systems.beit3.infill import InfillWriter
from opt.systems.beit3.rows import FUSED, SOURCES, CaptionRows, Rows
from opt.systems.shared.asking import ASKING, asked
from opt.systems.shared.codes import require_codes
from opt.systems.shared.multiway import TABLE, MultiwaySystem
from opt.systems.shared.pairs import contrasts
from opt.systems.shared.stages import train_only
from opt.systems.system import DataFacts, Output, Progress


class BEiT3(MultiwaySystem):
    """arXiv 2208.10442."""

    name = "beit3"
    config_type = BEiT3Config
    reads_codes = True
    tunes = (*ASKING, "captioning")

    def __init__(self, config: BEiT3Config, tokenizer: Tokenizer, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.tokenizer, self.facts = config, tokenizer, facts
        self._require(config, facts)
        sizes, epsilon, speech_width = config.encoder, config.norm_epsilon, max(facts.speech_width, 1)
        self.embedders = nn.ModuleDict({
            "text": TextEmbedder(tokenizer.size, config.text_positions, sizes.width, 0.0, bare=True),
            "image": PatchEmbedder(config.sight, sizes.width, masks=True),
        })
        if config.hears:
            self.embedders["audio"] = FrameEmbedder(speech_width, config.frame_positions, sizes.width, 0.0, epsilon,
                                                    first=True)
        own = own_experts(config.reads)
        self.stack = MultiwayStack(sizes.width, sizes.heads, sizes.inner, switches(config),
                                   own if config.sharing == "code" else {}, inner_norm=True, epsilon=epsilon)
        told = {"text": tokenizer.size, "image": facts.codebook, "audio": sum(self.speech_codes) or speech_width}
        self.heads = nn.ModuleDict({name: nn.Linear(sizes.width, told[name]) for name in self.modalities if told[name]})
        self.project = nn.ModuleDict({name: Projection(sizes.width, config.space) for name in self.modalities})
        self.temperature, self.pooler = Temperature(), Pooler(sizes.width)
        self.begin_answering(sizes.width)
        self.apply(by_width)
        self._freeze(config)

    @property
    def speech_codes(self) -> tuple[int, ...]:
        """Sizes of the codebooks by which hidden frames are told; none: by their features."""
        return () if self.config.speech_targets == "features" else self.facts.speech_codebooks

    def preparer(self) -> Any:
        """Samples -> masked rows: `Rows`, or captions or questions, where it is tuned for them."""
        task = self.config.tuning.task
        kind = CaptionRows if task == "captioning" else Rows
        rows = kind(self.config, self.tokenizer, self.facts.speech_width, self.modalities, bool(self.speech_codes))
        return rows if task == "captioning" else asked(rows, self.config.tuning)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """Everything once; then each head is asked about what was hidden."""
        if "answer" in batch.targets:
            return self.answered(batch)
        if "caption" in batch.targets:
            return self.captioned(batch)
        view = batch.views["encoder"]
        hidden_ND = self.read(self.entries(batch, view), view)
        terms: dict[str, Term] = {}
        if "masked" in self.config.asks:
            terms |= {FUSED * fused + name: self.masked(name, FUSED * fused + name, hidden_ND, batch)
                      for name in self.heads for fused in range(2)}
        if "contrast" in self.config.asks:
            first_SD = nn.functional.embedding(view.first, hidden_ND)
            terms |= contrasts(lambda name, sequences: self.project[name](first_SD[sequences]), self.modalities, batch,
                               self.temperature(), self.config.contrast_weight)
        return Output(terms)

    def masked(self, modality: str, name: str, hidden_ND: Tensor, batch: Batch) -> Term:
        """Masked data modelling of one modality (section 2.2): what stood at the targets `name`."""
        target, count = batch.targets[name], batch.counts[name]
        found_MX = self.heads[modality](hidden_ND[target.index])
        if modality != "audio":
            return token_cross_entropy(found_MX, target.label, count)
        if not self.speech_codes:
            return feature_regression(found_MX, batch.frames.features[target.label], count)
        label_MG = target.label.view(-1, len(self.speech_codes))
        terms = [token_cross_entropy(logits_MV, label_M, count) for logits_MV, label_M in
                 zip(found_MX.split(self.speech_codes, dim=1), label_MG.unbind(1), strict=True)]
        return Term(torch.stack([term.total for term in terms]).mean(), count)

    def captioned(self, batch: Batch) -> Output:
        """Hidden words of captions, each from the picture and the words before it; pictures do not see words (section
        3.1.2)."""
        view = batch.views["encoder"]
        writes_N = torch.from_numpy(view.tables == TEXT).to(self.device)
        hidden_ND = self.stack(self.entries(batch, view), view, prefix(writes_N, view.layout))
        target = batch.targets["caption"]
        return Output({"caption": token_cross_entropy(self.heads["text"](hidden_ND[target.index]), target.label,
                                                      batch.counts["caption"], self.config.caption_smoothing)})

    def after_step(self, carries: Sequence[dict[str, Tensor]], kept: Tensor) -> None:
        """Keeps the temperature in its range."""
        self.temperature.clamp()

    def vector(self, modality: str, states: States) -> Tensor:
        """By the first state: (S, E)."""
        return self.project[modality](states.first)

    @torch.inference_mode()
    def generate_text(self, samples: Sequence[Sample], modalities: Sequence[str], sampling: Sampling) -> list[str]:
        """By filling in [MASK] behind what is written, from pictures, speech or both, all pictures of a clip at once.
        A model that was not tuned for captions never learned where a text ends, and writes to the limit."""
        if strange := [name for name in modalities if name not in SOURCES]:
            raise self._cannot(f"write text from {strange[0]}, only from {' and '.join(SOURCES)}")
        given = [name for name in SOURCES if name in modalities]
        entries_ND, view = side_by_side([self.alone(samples, name) for name in given], [TABLE[name] for name in given])
        words, head = cast(TextEmbedder, self.embedders["text"]), cast(nn.Linear, self.heads["text"])
        writer = InfillWriter(self.stack, words, head, self.tokenizer.mask, view)
        ids_BL = write(writer, *States.of(entries_ND, view).padded(), [self.tokenizer.cls], self.tokenizer.sep,
                       min(sampling.limit, self.config.text_positions - 1), sampling.for_text(),
                       [sample.key for sample in samples])
        return [self.tokenizer.decode(ids) for ids in ids_BL.cpu().numpy()]

    def pyramid(self, channels: int = 256, strides: tuple[int, ...] = STRIDES) -> Pyramid:
        """The image tower, weights shared, as a backbone of torchvision's detectors (section 3.2)."""
        embedder = cast(PatchEmbedder, self.embedders["image"])
        return Pyramid(PatchMap(self.config.sight, embedder, self.stack), channels, strides)

    def _require(self, config: BEiT3Config, facts: DataFacts) -> None:
        """Raises UserError for targets that the shards have not."""
        if config.tuning.task != "pretraining" or "masked" not in config.asks:
            return
        if "image" in config.stage.data:
            require_codes(config.sight, facts)
        if config.hears and config.speech_targets == "codes" and not facts.speech_codebooks:
            raise UserError("--model.speech-targets codes: the shards hold no speech codes; `opt shards units` makes "
                            "them, or give auto or features, and frames are predicted by their features")

    def _freeze(self, config: BEiT3Config) -> None:
        """What no objective reaches stays as it is, and what the stage does not move."""
        self.pooler.requires_grad_(self.answer_head is not None)
        if config.tuning.task == "pretraining":
            self.heads.requires_grad_("masked" in config.asks)
            self.project.requires_grad_("contrast" in config.asks)
            self.temperature.requires_grad_("contrast" in config.asks)
            train_only(self, config.stage)


def own_experts(reads: Sequence[str]) -> Mapping[str, str]:
    """By kind of token the expert of its modality; kinds that a system does not read, and never meets, share one."""
    names = {kind: kind.removeprefix("fused ") for kind in KINDS}
    return {kind: name if name in reads else reads[0] for kind, name in names.items()}


def switches(config: BEiT3Config) -> list[Switch]:
    """What is whose own in each layer, as the paper has it or its code (section 8.1 of our notes)."""
    own, layers = own_experts(config.reads), config.encoder.layers
    if config.sharing == "code":
        return [Switch(own, own)] * layers
    upper = {kind: "fused" if kind.startswith("fused ") else expert for kind, expert in own.items()}
    return [Switch(own, {})] * (layers - config.fused_layers) + [Switch(upper, {})] * config.fused_layers
