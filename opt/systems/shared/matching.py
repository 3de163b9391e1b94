"""Matching of a text with a context: its picture, its speech, or both one behind the other; and which pairs learn.

    rows --draw_contexts (preparer)--> host "context" --contexts--> States, one a row
    own texts x all ranks' contexts, own contexts x all ranks' texts --draw_negatives--> Pairing: 3 pairs a row

True pairs and, for each, its text with a wrong context and its context with a wrong text that the contrast takes for
right (ALBEF, section 3.2). Which ones are drawn is known on the host only then: the one point of a step that waits for
the device, as sequences of other lengths are laid out anew.
Shape legend: B rows of this rank, K of all ranks, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opt.data.batch import Batch
from opt.distributed import rank
from opt.nn.states import ABSENT, States, beside
from opt.objectives.matching import draw_negatives
from opt.objectives.term import Term
from opt.systems.shared.momentum import Contrasted, gathered
from opt.systems.shared.rows import TowerRow

CONTEXTS = ("image", "audio")
"""What a text is matched with, in this order."""
TEXT_SALT, CONTEXT_SALT = 1, 2


def draw_contexts(rows: Sequence[TowerRow]) -> np.ndarray:
    """Which of picture and speech each row's text is matched with, or written from, bool (B, 2): what the row has; of
    both the picture, the speech or both, equally often, so that each can be asked for later."""
    has = np.array([[name in row.alone for name in CONTEXTS] for row in rows], bool).reshape(-1, 2)
    choice = np.array([[1, 1], [1, 0], [0, 1]], bool)
    drawn = choice[[int(row.rng.integers(3)) for row in rows]].reshape(-1, 2)
    return np.asarray(np.where(has.all(axis=1, keepdims=True), drawn, has))


def usable(batch: Batch) -> np.ndarray:
    """Rows with a text and a context: bool (B,)."""
    return (batch.host["rows"][:, 0] != ABSENT) & batch.host["context"].any(axis=1)


def contexts(states: Mapping[str, States], batch: Batch) -> States:
    """The context of each row, its picture's states and behind them its speech's, as drawn; empty where it has none."""
    parts = [states[name].take(np.where(batch.host["context"][:, place], batch.host["rows"][:, 1 + place], ABSENT))
             for place, name in enumerate(CONTEXTS) if name in states]
    return beside(parts)


@dataclass(frozen=True)
class Pairing:
    """Pairs to be judged, true ones first. text, context (P,): rows among those of all ranks. true: how many are.
    share (P,) float32: 1 / pairs of the same row of this rank, so that every row counts once."""

    text: np.ndarray
    context: np.ndarray
    true: int
    share: Tensor

    def term(self, odds_P: Tensor, count: Tensor, weight: float = 1.0) -> Term:
        """Binary cross-entropy of the log-odds of "match" (ALBEF, Eq. 4), the mean over each row's pairs."""
        label_P = torch.zeros_like(odds_P, dtype=torch.float32)
        label_P[: self.true] = 1.0
        loss_P = torch.nn.functional.binary_cross_entropy_with_logits(odds_P.float(), label_P, reduction="none")
        return Term((self.share * loss_P).sum(), count, weight)


def odds(logits_P2: Tensor) -> Tensor:
    """Log-odds (P,) of "match", the second class, against "no match"."""
    return logits_P2[:, 1] - logits_P2[:, 0]


def pair_up(contrast: Contrasted, batch: Batch, scale: Tensor) -> Pairing:
    """Each usable row's true pair and its hard negatives of all ranks. scale: 1 / temperature of the contrast by which
    they are drawn; 0 draws evenly."""
    device, own = batch.extra["picture"].device, usable(batch)
    usable_B, used_B2 = torch.from_numpy(own).to(device), torch.from_numpy(batch.host["context"]).to(device)
    usable_K, used_K2, key_K = gathered(usable_B), gathered(used_B2), gathered(batch.extra["row_key"])
    wrong_BK = (batch.extra["picture"][:, None] != contrast.key_picture) & usable_K
    alike_BK = (used_B2[:, None] == used_K2).all(dim=2)  # else the kind of a context would give a wrong one away
    with torch.autocast(device.type, enabled=False):
        to_contexts_BK = scale * contrast.online["text"] @ _mean(contrast.keys, used_K2).T
        to_texts_BK = scale * _mean(contrast.online, used_B2) @ contrast.keys["text"].T
    drawn = [
        torch.stack(draw_negatives(scores_BK, allowed_BK, batch.extra["row_key"], key_K, salt))
        for scores_BK, allowed_BK, salt in ((to_contexts_BK, wrong_BK & alike_BK, TEXT_SALT),
                                            (to_texts_BK, wrong_BK, CONTEXT_SALT))
    ]
    (context_B, has_context_B), (text_B, has_text_B) = np.array(torch.stack(drawn).tolist(), np.int64)
    first = rank() * len(own) + np.arange(len(own))
    with_context, with_text = own & (has_context_B > 0), own & (has_text_B > 0)
    pairs_B = own.astype(np.float32) + with_context + with_text
    of_row = np.concatenate([np.flatnonzero(rows) for rows in (own, with_context, with_text)])
    return Pairing(
        text=np.concatenate([first[own], first[with_context], text_B[with_text]]),
        context=np.concatenate([first[own], context_B[with_context], first[with_text]]),
        true=int(own.sum()), share=torch.from_numpy(1 / pairs_B[of_row]).to(device),
    )  # fmt: skip


def _mean(vectors: Mapping[str, Tensor], used_X2: Tensor) -> Tensor:
    """The mean vector of each row's context: (X, E)."""
    parts = [vectors[name].detach() * used_X2[:, place, None] for place, name in enumerate(CONTEXTS) if name in vectors]
    return torch.stack(parts).sum(0) / used_X2.sum(dim=1, keepdim=True).clamp(min=1)
