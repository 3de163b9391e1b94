"""The embedded speech network: transformers' wav2vec 2.0, small, at 25 frames a second, with a word-level CTC head.

Trained with the word that is spoken in each frame (the scenes know when each word begins and ends), fading into CTC.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from feature_extract.tiny import weights_file
from feature_extract.tiny.pool import Pool, Schedule

RATE, FRAME_RATE = 16_000, 25


def build(words: int) -> Wav2Vec2ForCTC:
    """The untrained network; class 0 is CTC's blank."""
    return Wav2Vec2ForCTC(Wav2Vec2Config(
        vocab_size=words + 1, hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768,
        feat_extract_norm="layer", do_stable_layer_norm=True, conv_dim=(96, 96, 128, 128, 192),
        conv_stride=(20, 4, 2, 2, 2), conv_kernel=(40, 8, 3, 3, 2), conv_bias=True, num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=8, hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0,
        activation_dropout=0.0, layerdrop=0.0, apply_spec_augment=False, pad_token_id=0,
    ))


def load_audio() -> Wav2Vec2ForCTC:
    """The trained network, in evaluation mode. Its words are `load_words()`."""
    path = weights_file.FOLDER / "audio.safetensors"
    network = build(len(load_words()))
    weights_file.read_into(path, network)
    return network


def load_words() -> list[str]:
    """The words of the CTC head: class i + 1 is word i."""
    return list(weights_file.read_config(weights_file.FOLDER / "audio.safetensors")["words"])


def standardise(waveform: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance, as wav2vec 2.0's own feature extractor does."""
    return ((waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)).astype(np.float32)


def train(pool: Pool, minutes: float, seed: int, out: Path) -> None:
    """AdamW on frame labels, then CTC; prints the greedy word error rate on held-out scenes."""
    torch.manual_seed(seed)
    waveforms = [standardise(waveform) for waveform in pool.recordings()]
    tellings = [_words(telling["caption"]) for telling in pool.tellings]
    words = sorted({word for telling in tellings for word in telling})
    number = {word: place + 1 for place, word in enumerate(words)}
    labels = [torch.tensor([number[word] for word in telling]) for telling in tellings]
    network = build(len(words)).train()
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    lengths = [len(waveform) for waveform in waveforms]
    for batch in Schedule(pool, 16, minutes, seed, optimizer, 1.5e-3, lengths):
        logits_BTV, lengths_B = _logits(network, [waveforms[i] for i in batch.rows])
        log_BTV = logits_BTV.float().log_softmax(-1)
        frame_BT = torch.stack([_frame_labels(pool.tellings[i], number, int(length), log_BTV.shape[1])
                                for i, length in zip(batch.rows, lengths_B, strict=True)])
        spoken = F.nll_loss(log_BTV.flatten(0, 1), frame_BT.flatten(), ignore_index=-100)
        wanted = [labels[i] for i in batch.rows]
        ctc = F.ctc_loss(log_BTV.transpose(0, 1), torch.cat(wanted), lengths_B,
                         torch.tensor([len(label) for label in wanted]), zero_infinity=True)
        batch.step(ctc + 4 * max(0.0, 1 - 1.5 * batch.fraction) * spoken, network, 1.0)
        if batch.save:
            weights_file.write(out, network, {"words": words})
    held = pool.held_out
    heard = [read_words(network.eval(), waveforms[i], words) for i in held]
    print({"word_error_rate": error_rate([tellings[i] for i in held], heard)})


@torch.inference_mode()
def read_words(network: Wav2Vec2ForCTC, waveform: np.ndarray, words: list[str]) -> list[str]:
    """Greedy CTC reading of a standardised waveform (16 kHz)."""
    best = network(torch.from_numpy(waveform)[None]).logits[0].argmax(-1).tolist()
    return [words[label - 1] for place, label in enumerate(best) if label and (not place or best[place - 1] != label)]


def _logits(network: Wav2Vec2ForCTC, waveforms: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    longest = max(len(waveform) for waveform in waveforms)
    padded = torch.stack([F.pad(torch.from_numpy(waveform), (0, longest - len(waveform))) for waveform in waveforms])
    samples = torch.tensor([len(waveform) for waveform in waveforms])
    mask = (torch.arange(longest)[None] < samples[:, None]).long()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(padded, attention_mask=mask).logits
    return logits, network._get_feat_extract_output_lengths(samples)  # type: ignore[arg-type]


def _frame_labels(telling: dict, number: dict[str, int], frames: int, padded: int) -> Tensor:
    """The word spoken in each frame, 0 between words, -100 in padding."""
    labels = torch.full((padded,), -100)
    labels[:frames] = 0
    for timed in telling["timed_caption"]:
        for word in _words(timed["utterance"]):
            start, end = (min(frames, int(timed[name] * FRAME_RATE)) for name in ("start_time", "end_time"))
            labels[start:end] = number[word]
    return labels


def _words(caption: str) -> list[str]:
    return re.sub(r"[^a-z ]", "", caption.lower()).split()


def error_rate(references: list[list[str]], heard: list[list[str]]) -> float:
    """Word error rate: word edits over words of the references."""
    edits = sum(_distance(reference, words) for reference, words in zip(references, heard, strict=True))
    return edits / sum(map(len, references))


def _distance(reference: list[str], words: list[str]) -> int:
    """Edit distance between two word lists."""
    row = list(range(len(words) + 1))
    for i, wanted in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, word in enumerate(words, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (wanted != word))
    return row[-1]
