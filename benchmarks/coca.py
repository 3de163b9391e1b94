"""CoCa's two losses from one forward against captioning alone: what the contrast costs, and what it brings.

    python benchmarks/coca.py --shards runs/demo/shards/train --test runs/demo/shards/test [--minutes 10] [--quick]

The same tiny network, initial weights, batches and optimizer twice, each trained for the same CPU time by one thread:

    both      contrast and captions from one forward (coca.tiny)
    captions  captions alone: no [CLS], no contrastive query, nothing compared

Steps of both take turns first, so that CPU-minutes become steps. Prints one JSON line:

    step_ratio         CPU-seconds of a step of `both` over those of a step of `captions`, the median over turns
    step_cpu_seconds   of each, the median
    caption_loss       of each, nats a token of the held-out captions
    r1_text_to_image   share of held-out captions whose nearest picture is their own, by the vectors of the shared space
    r1_image_to_text   the same for pictures; `captions` never trained what makes the vectors: about one in `candidates`
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from opt.data.pack import Packer, Part, Place
from opt.data.plan import Plan
from opt.data.record import Sample
from opt.data.shards import ShardReader
from opt.data.tokenizer import Tokenizer
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.coca import CoCa, Poolers, Rows, tiny
from opt.systems.shared.rows import TowerRows
from opt.systems.system import Output, Progress
from pretrain.run import facts
from pretrain.trainer import Trainer

OPTIM = OptimConfig(learning_rate=6e-4)
BATCH_TOKENS = 8192
CANDIDATES = 1000
"""Most held-out scenes."""
WARM_UP = 3
"""Turns that are not counted."""


class WordRows(Rows):
    """Texts without [CLS]."""

    def parts(
        self, packer: Packer, sample: Sample, modalities: Any, rng: np.random.Generator | None = None
    ) -> tuple[dict[str, Part], np.ndarray, dict[str, Place]]:
        return TowerRows.parts(self, packer, sample, modalities, rng)


class Captions(CoCa):
    """The same network, which computes nothing but captions."""

    def preparer(self) -> WordRows:
        return WordRows(self.config, self.tokenizer, self.facts.speech_width, self.modalities)

    def forward(self, batch: Any, progress: Progress) -> Output:
        found = cast(Poolers, self.poolers["image"]).generative(self.encode("image", batch))
        return Output(self.caption(self.encode("text", batch), {"image": found}, batch))


SIDES: dict[str, type[CoCa]] = {"both": CoCa, "captions": Captions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="trained on: spoken scenes with their pictures")
    parser.add_argument("--test", type=Path, required=True, help="held-out shards")
    parser.add_argument("--minutes", type=float, default=10.0, help="CPU-minutes of training of each side")
    parser.add_argument("--turns", type=int, default=20, help="steps of each side that are timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a quarter of a minute each, 8 turns")
    given = parser.parse_args()
    if given.quick:
        given.minutes, given.turns = 0.25, 8
    torch.set_num_threads(1)
    train, test = ShardReader(given.shards), ShardReader(given.test)
    tokenizer = Tokenizer.train(train.captions(), 2000)
    seconds = timed(train, tokenizer, given.turns, given.seed)
    figures: dict[str, Any] = {
        "step_ratio": round(float(np.median(seconds["both"]) / np.median(seconds["captions"])), 4),
        "step_cpu_seconds": {side: round(float(np.median(each)), 4) for side, each in seconds.items()},
    }
    for side in SIDES:
        steps = max(1, int(60 * given.minutes / figures["step_cpu_seconds"][side]))
        for name, value in {"steps": steps, **judged(trained(side, train, tokenizer, steps, given.seed), test)}.items():
            figures.setdefault(name, {})[side] = value
    print(json.dumps({**figures, "candidates": min(len(test), CANDIDATES), "minutes": given.minutes,
                      "turns": given.turns, "seed": given.seed, "torch": torch.__version__}))


def timed(reader: ShardReader, tokenizer: Tokenizer, turns: int, seed: int) -> dict[str, list[float]]:
    """CPU-seconds of steps on the same batches, by turns."""
    with tempfile.TemporaryDirectory() as folder:
        steppers = {side: _steps(_trainer(side, reader, tokenizer, Path(folder) / side, 10**6, seed)) for side in SIDES}
        rounds = [{side: next(stepper) for side, stepper in steppers.items()} for _ in range(WARM_UP + turns)]
    return {side: [each[side] for each in rounds[WARM_UP:]] for side in SIDES}


def _steps(trainer: Trainer) -> Iterator[float]:
    batches = iter(trainer.loader())
    while True:
        batch = next(batches)[0]
        began = time.process_time()
        trainer.train_step(batch)
        trainer.step += 1
        yield time.process_time() - began


def trained(side: str, reader: ShardReader, tokenizer: Tokenizer, steps: int, seed: int) -> CoCa:
    """A whole CoCa, after so many steps of that side."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(side, reader, tokenizer, Path(folder), steps, seed)
        trainer.run()
    whole = CoCa(tiny().model, tokenizer, facts(reader.manifest))
    whole.load_state_dict(trainer.system.state_dict())
    return whole.eval()


def _trainer(side: str, reader: ShardReader, tokenizer: Tokenizer, folder: Path, steps: int, seed: int) -> Trainer:
    torch.manual_seed(seed)
    system = SIDES[side](tiny().model, tokenizer, facts(reader.manifest))
    loop = LoopConfig(steps=steps, seed=seed, batch_tokens=BATCH_TOKENS, workers=0, save_every=steps)
    return Trainer(system, reader, folder, loop, OPTIM, device=torch.device("cpu"))


@torch.inference_mode()
def judged(system: CoCa, test: ShardReader) -> dict[str, float]:
    """Loss of held-out captions, and what finds what among held-out scenes."""
    rows, samples = system.preparer(), [test.sample(number, jpeg=True) for number in range(min(len(test), CANDIDATES))]
    plan = Plan(0, rows.cost(test.lengths), BATCH_TOKENS, rows.tasks, test.key_hash, 1)
    terms = []
    for place, batch in zip(range(16), plan.batches(), strict=False):
        drawn = {int(number): test.sample(int(number), jpeg=True) for number in set(batch.sample)}
        terms.append(system(rows(drawn, batch), Progress(place, 1.0)).terms["caption"])
    text_BE, image_BE = (torch.cat([system.embed(samples[start : start + 64], [name])
                                    for start in range(0, len(samples), 64)]) for name in ("text", "image"))
    scores_BB, own_B = text_BE @ image_BE.T, torch.arange(len(samples))
    return {
        "caption_loss": round(float(sum(term.total for term in terms) / sum(term.count for term in terms)), 4),
        "r1_text_to_image": round(float((scores_BB.argmax(1) == own_B).float().mean()), 4),
        "r1_image_to_text": round(float((scores_BB.argmax(0) == own_B).float().mean()), 4),
    }


if __name__ == "__main__":
    main()
