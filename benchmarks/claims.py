"""The paper's claims on scenes nobody has seen, as paired differences with 95 % intervals, and baselines beside them.

    python benchmarks/claims.py [--run runs/demo]        after `make demo`

    fresh scenes --opt extract--> shards --opt eval retrieval, transcribe, classify--> paired differences
             \\--words drowned in noise--> is it those words that the picture helps to transcribe?
    pictures of the training shards --ResNet-18 from scratch--> its own scores, and a probe of its pooled features

Everything goes to --out; a stage that is done is not done again. Prints one JSON line, the same as OUT/claims.json.
Shape legend: N samples, P pictures, C classes, D feature width.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from eval import classification, probing
from eval.naming import read_labels
from eval.result import Metric, measured, read_result
from eval.speech import TRANSCRIPTS
from eval.task import Split, Task, open_split, open_task
from eval.words import align, normalise
from feature_extract.sources.spoken_scenes import CLASSES, draw
from opt import cli
from opt.data.shards import ShardReader
from opt.files import write_atomic

PIXELS, EPOCHS, BATCH, RATE, DECAY = 128, 10, 32, 2e-3, 0.05
TRAIN_SAMPLES = 4000
"""Most samples the probes are fitted on: all of the demo's."""
VISIBLE = {form for label in CLASSES for word in label.split() for form in (word, f"{word}s", f"{word}es")}
"""Words a picture can supply for certain: colours and shapes. (Sizes and grounds have synonyms.)"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="holds model, shards/train, scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--test", type=int, default=1000, help="fresh scenes")
    parser.add_argument("--seed", type=int, default=7, help="of the fresh scenes; the demo's is 1")
    given = parser.parse_args()
    torch.set_num_threads(1)
    _verbs(given.run, given.out, given.test, given.seed)
    task, exam = _open(given.run, given.out)
    metrics = [
        metric
        for name in ("retrieval", "transcribe", "classify")
        for metric in read_result(given.out / "results" / f"{name}.json").metrics
    ]
    metrics += _kept(given.out / "drowned.json", lambda: _drowned(task, given.seed))
    metrics += _kept(given.out / "regions_max.json", lambda: _regions_max(task, exam))
    metrics += _kept(given.out / "resnet.json", lambda: _resnet(task, exam, given.out))
    figures = {
        metric.name: [round(value, 4) for value in (metric.value, *(metric.interval or ()))] for metric in metrics
    }
    line = json.dumps(figures | {"scenes": given.test, "seed": given.seed, "epochs": EPOCHS, "pixels": PIXELS})
    write_atomic(given.out / "claims.json", (line + "\n").encode())
    print(line)


def _verbs(run: Path, out: Path, test: int, seed: int) -> None:
    """Fresh scenes, their features with the training shards' settings, and the three evaluations."""
    scenes, shards, results = str(out / "scenes"), str(out / "shards"), out / "results"
    rate = ShardReader(run / "shards" / "train").manifest.frame_rate
    labels = [str(run / "scenes" / "train_scenes.jsonl"), f"{scenes}/test_scenes.jsonl"]
    evaluate = [str(run / "model"), shards, "--out", str(results)]
    _verb("scenes", "--out", scenes, "--train", 0, "--val", 0, "--test", test, "--seed", seed, "--workers", 1)
    _verb("extract", "localized_narratives", scenes, "--split", "test", "--out", shards, "--workers", 1,
          "--frames-per-second", rate)  # fmt: skip
    options = {
        "retrieval": ["--by", "alignment"],
        "transcribe": [],
        "classify": ["--train-shards", run / "shards" / "train", "--train-limit", TRAIN_SAMPLES, "--labels", *labels],
    }
    for name, more in options.items():
        if not (results / f"{name}.json").exists():
            _verb("eval", name, *evaluate, *more)


def _verb(*words: object) -> None:
    """One verb as a user would type it. Ends the program when it fails: the verb has said why."""
    if status := cli.main([str(word) for word in words]):
        raise SystemExit(status)


def _open(run: Path, out: Path) -> tuple[Task, probing.Exam]:
    """The model on the fresh scenes, and the samples that `opt eval classify` fits on and judges."""
    files = [run / "scenes" / "train_scenes.jsonl", out / "scenes" / "test_scenes.jsonl"]
    labels = {key: names for path in files for key, names in read_labels(path).items()}
    config = classification.ClassifyConfig(run / "model", out / "shards", out=out / "results")
    task = open_task("classify", "classify", config)
    train = open_split(run / "shards" / "train", TRAIN_SAMPLES, task.system)
    return task, probing.open_exam(train, task.split, labels, task.provenance.seed)


def _kept(path: Path, measure: Callable[[], list[Metric]]) -> list[Metric]:
    """`measure()`, or what it gave before."""
    if not path.exists():
        found = [{"name": m.name, "value": m.value, "n": m.n, "interval": m.interval, "note": m.note}
                 for m in measure()]  # fmt: skip
        write_atomic(path, (json.dumps(found, indent=1) + "\n").encode())
    return [Metric(**entry) for entry in json.loads(path.read_text())]


# ---- the words drowned in noise -------------------------------------------------------------------------------------


def _drowned(task: Task, seed: int) -> list[Metric]:
    """Share of words written wrongly or left out, drowned and clear, visible and not, without and with the picture.

    Scenes are pure in (seed, index), so that speaking a caption again says which of its words were drowned.
    """
    rows: list[tuple[int, bool, bool, bool, bool]] = []  # picture, drowned, visible, wrong by ear, wrong with picture
    for line in (task.folder / TRANSCRIPTS).read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        narration = task.split.sample(told["sample"]).narration
        telling = draw(seed, int(told["key"].rpartition("-")[2])).tellings[narration]
        drowned = set(telling.speech().drowned)
        words = normalise(told["reference"]).split()
        if words != telling.caption.text.split():
            raise SystemExit(f"{told['key']} was not drawn with seed {seed}: delete the scenes, or give their --seed")
        wrong = [_wrong(words, normalise(told[given]).split()) for given in ("audio", "image + audio")]
        group = int(task.split.groups[told["sample"]])
        rows += [
            (group, number in drowned, word in VISIBLE, wrong[0][number], wrong[1][number])
            for number, word in enumerate(words)
        ]
    group, drowned, visible, alone, both = np.array(rows).T
    chosen = {
        "drowned": drowned == 1,
        "clear": drowned == 0,
        "drowned_visible": (drowned & visible) == 1,
        "drowned_other": (drowned == 1) & (visible == 0),
        "clear_visible": (drowned == 0) & (visible == 1),
    }
    return [
        measured(f"words.{name}.{what}", values[which], task.provenance.seed, groups=group[which])
        for name, which in chosen.items()
        for what, values in {"wrong_audio": alone, "wrong_image_audio": both, "gain.image": alone - both}.items()
    ]


def _wrong(reference: list[str], hypothesis: list[str]) -> list[bool]:
    """Whether each word of the reference is replaced or missing."""
    return [edit.kind != "equal" for edit in align(reference, hypothesis) if edit.kind != "insert"]


# ---- baselines of the probe -----------------------------------------------------------------------------------------


def _regions_max(task: Task, exam: probing.Exam) -> list[Metric]:
    """Raw regions pooled by the maximum: as the model's own features pool its region states, so the fairer rival."""
    sides = [
        np.stack([np.asarray(split.sample(n).pictures[0].regions, np.float32).max(0) for n in numbers.tolist()])
        for split, numbers in ((exam.train, exam.train_numbers), (exam.test, exam.test_numbers))
    ]
    raw, model, n = exam.probe(*sides), classification.probe(task, exam, ("image",)), len(exam.test_numbers)
    return [
        raw.metric("classify.baseline.regions_max", n=n),
        model.minus(raw).metric("classify.gain.image_over_regions_max", n=n),
    ]


def _resnet(task: Task, exam: probing.Exam, out: Path) -> list[Metric]:
    """A ResNet-18 trained on the pictures of the training shards: its classifier, a probe of its pooled features."""
    network, minutes = _trained(exam, out / "resnet.safetensors")
    (_, train_features), (test_scores, test_features) = (
        _look(network, split, numbers) for split, numbers in
        ((exam.train, exam.train_numbers), (exam.test, exam.test_numbers))
    )  # fmt: skip
    own, probed = exam.judge(test_scores), exam.probe(train_features, test_features)
    model = classification.probe(task, exam, ("image",))
    n = len(exam.test_numbers)
    note = f"ResNet-18 from scratch, {EPOCHS} epochs at {PIXELS} pixels, {minutes:.1f} CPU-minutes of one thread"
    return [
        own.metric("classify.baseline.resnet", n=n, note=note),
        probed.metric("classify.baseline.resnet_probe", n=n, note=note),
        model.minus(own).metric("classify.gain.image_over_resnet", n=n, note=note),
        model.minus(probed).metric("classify.gain.image_over_resnet_probe", n=n, note=note),
        Metric("resnet.cpu_minutes", minutes, n),
    ]


def _trained(exam: probing.Exam, path: Path) -> tuple[torchvision.models.ResNet, float]:
    """The network with the weights at `path`, trained first where there are none, and its CPU-minutes.

    The architecture that ImageNet made known, stem and all, from random weights; multi-label cross-entropy over the
    exam's classes. The pictures are those of the probe's training samples, each once.
    """
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=len(exam.classes)).to(memory_format=torch.channels_last)
    if path.exists():
        weights = load_file(path)
        minutes = float(weights.pop("cpu_minutes"))
        network.load_state_dict(weights)
        return network.eval(), minutes
    rows = np.unique(exam.train.groups[exam.train_numbers], return_index=True)[1]
    pictures_PHW3 = _pictures(exam.train, exam.train_numbers[rows])
    labels_PC = torch.from_numpy(exam.train_labels[rows]).float()
    began = time.process_time()
    torch.nn.init.constant_(network.fc.bias, float(torch.logit(labels_PC.mean())))
    steps = len(rows) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps * EPOCHS, pct_start=0.2)
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(rows))[: steps * BATCH].reshape(steps, BATCH):
            scores = _scores(network, _moved(_input(pictures_PHW3[batch])))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels_PC[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / steps
        minutes = (time.process_time() - began) / 60
        print(f"resnet: epoch {epoch + 1}/{EPOCHS}, loss {total:.4f}, {minutes:.1f} CPU-minutes", flush=True)
    weights = {name: weight.contiguous() for name, weight in network.state_dict().items()}
    save_file({**weights, "cpu_minutes": torch.tensor(minutes, dtype=torch.float64)}, path)
    return network.eval(), minutes


def _scores(network: torchvision.models.ResNet, input: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
        return network(input).float()


def _moved(input_B3HW: torch.Tensor) -> torch.Tensor:
    """Half of the pictures mirrored, all shifted by up to a tenth: neither changes what is in them."""
    mirrored = torch.rand(len(input_B3HW), 1, 1, 1) < 0.5
    shift = torch.randint(-PIXELS // 10, PIXELS // 10 + 1, (2,)).tolist()
    moved = torch.roll(torch.where(mirrored, input_B3HW.flip(3), input_B3HW), shift, (2, 3))
    return moved.contiguous(memory_format=torch.channels_last)


def _look(network: torchvision.models.ResNet, split: Split, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N, C) and pooled features (N, D) of the samples' pictures, in float32."""
    pooled: list[torch.Tensor] = []
    handle = network.avgpool.register_forward_hook(lambda module, given, output: pooled.append(output.flatten(1)))
    with torch.inference_mode():
        parts = np.array_split(numbers, max(1, len(numbers) // 100))
        scores = [network(_input(_pictures(split, part))) for part in parts]
    handle.remove()
    return torch.cat(scores).numpy(), torch.cat(pooled).numpy()


def _pictures(split: Split, numbers: np.ndarray) -> torch.Tensor:
    """The stored pictures of the samples, (P, H, W, 3) uint8."""
    pictures: list[Any] = []
    for number in numbers.tolist():
        jpeg = split.sample(number, jpeg=True).pictures[0].jpeg
        with Image.open(io.BytesIO(jpeg or b"")) as picture:
            pictures.append(np.asarray(picture.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(pictures))


def _input(pictures_PHW3: torch.Tensor) -> torch.Tensor:
    return (pictures_PHW3.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


if __name__ == "__main__":
    main()
