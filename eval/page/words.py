"""What figures are called on the pages, and in what order they stand. A metric unknown here keeps its own name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from eval.result import Metric

TITLES = {
    "retrieval": "Retrieval",
    "transcribe": "Transcription",
    "caption": "Captions",
    "text_to_image": "Pictures from text",
    "vqa": "Questions",
    "nlvr2": "True or false of two pictures",
    "zero_shot": "Zero-shot classification",
    "classify": "Probes",
}
OPTIONAL = {"vqa", "nlvr2", "zero_shot"}
"""Only a model tuned for them, or with a space for words and pictures, has these."""
HINTS = {
    "retrieval": "A caption, a recording, a picture or two of them are the query. R@k is the share of queries with a "
    "right candidate among the first k; equal scores share their rank.",
    "transcribe": "Lower is better. The text is written by the decoder; chance is handing each recording the caption "
    "of another picture.",
    "caption": "Written from the picture alone. Chance: the same captions dealt to other pictures. CIDEr-D is shown "
    "a hundredfold, as is usual; its bar is full from 100 % on.",
    "text_to_image": "Codes are drawn from the caption alone and decoded to 64 × 64 pixels; the region detector looks "
    "at them. Chance: the same pictures judged by the captions of others. FID and KID are distances between pictures: "
    "lower is better, and FID is too high for few pictures.",
    "vqa": "Chance: always the most frequent answer.",
    "nlvr2": "Is the statement true of the two pictures? Consistency is the share of statements that are judged "
    "rightly of every pair of pictures they are about.",
    "zero_shot": "A class is what its name says in a few sentences; pictures and recordings are sorted by what they "
    "are nearest to. Nothing is learned.",
    "classify": "Mean average precision of a linear classifier on frozen features: which objects are in the picture? "
    "The mean is over classes; micro averages are over all pairs of picture and class.",
}
DIRECTIONS = (
    "text_to_image", "image_to_text", "text_to_audio", "audio_to_text", "text_audio_to_image",
    "image_to_audio", "audio_to_image", "text_image_to_audio", "image_audio_to_text",
    "image_to_text_audio", "audio_to_text_image", "text_to_image_audio",
)  # fmt: skip
"""The paper's five first."""
PAPER = DIRECTIONS[:5]
KINDS = {"": "", "_true_codes": ", true pictures from their codes", "_real": ", true pictures"}
HALVES = {**KINDS, "_real": ", true pictures against others"}
"""Which pictures are judged, by the suffix of a figure's name; distances are between two sets of them."""
WAYS = {"": "by alignment", "_two_stage": "in two stages", "_all_pairs": "by matching all pairs"}
"""How candidates are ordered, by the suffix of a recall's name."""
WORDS = {
    "caption.object_hit": "captions that name an object that is there",
    "caption.object_precision": "named objects that are there",
    "caption.word_f1": "words shared with the reference captions (F1)",
    **{f"caption.bleu{order}": f"BLEU-{order}" for order in (1, 2, 3, 4)},
    "caption.rouge_l": "ROUGE-L",
    "caption.cider_d": "CIDEr-D",
    "caption.meteor": "METEOR",
    "caption.spice": "SPICE",
    "text_to_image.object_found": "a named object is found",
    "text_to_image.clip_score": "CLIPScore",
    "text_to_image.r_precision": "own caption first among 100 (R-precision)",
    "vqa.accuracy": "questions answered rightly (VQA accuracy)",
    "vqa.accuracy.yes_no": "those answered by yes or no",
    "vqa.accuracy.number": "those answered by a number",
    "vqa.accuracy.other": "all others",
    **{f"zero_shot.{name}.{given}": f"{given}: {said}" for given in ("image", "audio") for name, said in (
        ("map", "mean average precision"), ("map_micro", "mean average precision, micro average"),
        ("hit1", "first class is one of the labels"), ("top1", "right class first"),
        ("top5", "right class among the first 5"))},
    "nlvr2.accuracy": "pairs of pictures judged rightly",
    "nlvr2.consistency": "statements judged rightly of all their pairs (consistency)",
    "transcribe.wer_gain.image": "speech alone − speech and picture",
    "retrieval.gain.text_audio_over_text.r1": "R@1 of the picture, by text + audio − by text",
    "retrieval.gain.text_audio_over_text.r5": "R@5",
    "retrieval.gain.text_audio_over_text.r10": "R@10",
    **{f"classify.gain_over.{name}": f"all three − {name} alone" for name in ("text", "image", "audio")},
}
RAW = {"text": "word counts", "image": "mean region", "audio": "mean frame"}
"""Raw features that are probed without any model."""
RATES = {"wer": "word error rate", "cer": "character error rate"}
NORMALISED = {"": "", "_raw": ", as written", "_whisper": ", Whisper's normaliser"}
MODALITIES = ("text", "image", "audio")

RECALL = re.compile(r"retrieval\.(?P<direction>\w+_to_\w+)\.r(?P<depth>\d+)(?P<way>_two_stage|_all_pairs|)")
RATE = re.compile(r"transcribe\.(?P<rate>wer|cer)(?P<picture>_image_audio|)(?P<normalised>_raw|_whisper|)")
MEAN = re.compile(r"retrieval\.image_text\.mean(?P<way>_two_stage|_all_pairs|)")
DRAWN = re.compile(r"(?P<name>text_to_image\.\w+?)(?P<kind>_true_codes|_real|)")
NETWORK = re.compile(r"text_to_image\.(?P<distance>fid|kid)_(?P<network>\w+)")
SUBSET = re.compile(r"classify\.(?P<looked>attention\.|)map(?P<micro>_micro|)\.(?P<subset>\w+)")


def words(metric: Metric) -> str:
    """What a figure is, in words."""
    name = metric.name
    if name in WORDS:
        return WORDS[name]
    if found := RECALL.fullmatch(name):
        return f"{direction(found['direction'])}, R@{found['depth']}{_way(found['way'])}"
    if found := MEAN.fullmatch(name):
        return f"mean recall at 1, 5 and 10 of image and text{_way(found['way'])}"
    if found := RATE.fullmatch(name):
        given = "speech and picture" if found["picture"] else "speech alone"
        return f"{RATES[found['rate']]}, from {given}{NORMALISED[found['normalised']]}"
    if found := DRAWN.fullmatch(name):
        base, kind = found["name"], KINDS[found["kind"]]
        if distance := NETWORK.fullmatch(base):
            return f"{distance['distance'].upper()} by the {distance['network']} network{HALVES[found['kind']]}"
        return f"{WORDS.get(base, base)}{kind}"
    if found := SUBSET.fullmatch(name):
        subset = [word for word in found["subset"].split("_") if word in MODALITIES]
        looked, micro = ", attentional pooler" * bool(found["looked"]), ", micro average" * bool(found["micro"])
        return " + ".join(subset or [found["subset"]]) + looked + micro
    if name.startswith("classify.attention.gain."):
        return f"{' + '.join(metric.modalities)}, pooler over linear"
    if name.startswith("classify.baseline."):
        return f"no model: {raw(metric)}"
    if name.startswith("classify.gain."):
        return gain(metric)
    return name


def _way(suffix: str) -> str:
    return f", {WAYS[suffix]}" if suffix else ""


def direction(name: str) -> str:
    """`text_audio_to_image` as `text + audio → image`."""
    return " → ".join(side.replace("_", " + ") for side in name.split("_to_"))


def raw(metric: Metric) -> str:
    """The raw features of a baseline in words."""
    return " + ".join(RAW.get(modality, modality) for modality in metric.modalities)


def less(metric: Metric) -> list[str] | None:
    """What a gain of the linear probe is measured over: some of its modalities, or None for raw features."""
    over = metric.name.partition("_over_")[2].split("_")
    return over if set(over) < set(metric.modalities) else None


def gain(metric: Metric) -> str:
    """A paired difference of the linear probe in words."""
    over = less(metric)
    return f"{' + '.join(metric.modalities)}, over {raw(metric) if over is None else ' + '.join(over)}"


def is_gain(metric: Metric) -> bool:
    """Whether a figure is a paired difference, shown in points."""
    return re.search(r"[._]gain[._]", metric.name) is not None


def in_order(metrics: Iterable[Metric]) -> list[Metric]:
    """As they are, but recalls by direction, way and depth, the paper's directions first."""

    def place(metric: Metric) -> tuple[int, int, int]:
        found = RECALL.fullmatch(metric.name)
        if found is None:
            return (len(DIRECTIONS) + 1, 0, 0)
        known = found["direction"] in DIRECTIONS
        return (DIRECTIONS.index(found["direction"]) if known else len(DIRECTIONS), list(WAYS).index(found["way"]),
                int(found["depth"]))  # fmt: skip

    return sorted(metrics, key=place)
