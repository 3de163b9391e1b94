"""Box AP of benchmarks/detection.py, by hand."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BOXES = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 30.0]])


@pytest.fixture
def detection(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("detection")


def found(boxes: Tensor, labels: list[int]) -> dict[str, Tensor]:
    return {"boxes": boxes, "labels": torch.tensor(labels), "scores": torch.linspace(0.9, 0.8, len(labels))}


def test_box_ap(detection: Any) -> None:
    target = [{"boxes": BOXES, "labels": torch.tensor([1, 2])}] * 2
    both, none = found(BOXES, [1, 2]), found(BOXES[:0], [])
    assert detection.average_precision([both, both], target) == {"ap": 1.0, "ap50": 1.0}
    assert detection.average_precision([none, none], target) == {"ap": 0.0, "ap50": 0.0}
    # 101 recalls from 0 to 1: one of two of each class is found, precision 1 up to a recall of 0.5
    assert detection.average_precision([both, none], target) == {"ap": round(51 / 101, 4), "ap50": round(51 / 101, 4)}
    assert detection.average_precision([found(BOXES, [2, 1])] * 2, target) == {"ap": 0.0, "ap50": 0.0}
    # 10 x 7 of 10 x 10: right for IoU from 0.5 to 0.7, five of ten thresholds, for one class of two
    shorter = torch.tensor([[0.0, 0.0, 10.0, 7.2]])
    assert detection.average_precision([found(shorter, [1])] * 2, target) == {"ap": 0.25, "ap50": 0.5}
