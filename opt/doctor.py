"""`opt doctor`: what works on this machine, and for what does not, the reason and the command that mends it.

Every package is really imported and tried on a tiny input, since packages that are installed may still clash.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opt.config import extra

CORE = "pip install -c constraints.txt -e ."
DETECTRON2 = (
    "git clone https://github.com/facebookresearch/detectron2 && pip install --no-build-isolation ./detectron2"
)


@dataclass
class DoctorConfig:
    """Nothing to set."""


@dataclass(frozen=True)
class Finding:
    """One line of the answer. `detail` is a version or a reason; `mend` a command, empty when all is well."""

    name: str
    works: bool
    detail: str
    mend: str = ""


def doctor(config: DoctorConfig) -> None:
    """List what works here: Python, torch, every backend of feature extraction, what pretraining can use, the machine.

    opt doctor
    """
    show(examine(), Console())


def examine() -> list[Finding]:
    """Try everything, core first. Never raises: what fails becomes a finding with its reason."""
    return [
        _machine(),
        Finding("Python", True, platform.python_version()),
        _package("torch", "torch", "torch", CORE, _torch),
        _package("--regions torchvision_detector", "torchvision", "torchvision", CORE, _torchvision),
        _package("--regions bottom_up", "torchvision", "torchvision", CORE, _torchvision),
        _package("--regions detectron2_detector", "detectron2", "detectron2", DETECTRON2),
        _package("--audio transformers_speech", "transformers", "transformers", CORE, _transformers),
        _package("--audio torchaudio_speech", "torchaudio", "torchaudio", CORE, _torchaudio),
        _package("--audio fairseq_speech", "transformers", "transformers", CORE, _transformers),
        _package("--codes dvae", "torch", "torch", CORE),
        _package("--codes dalle", "torch", "torch", CORE),
        _package("--codes vqkd", "torch", "torch", CORE),
        _tiny_networks(),
        _package("--runner ray", "ray", "ray", extra("ray")),
        _package("tables in Parquet", "pyarrow", "pyarrow", extra("parquet")),
        _package("shards units", "sklearn", "scikit-learn", extra("units")),
        _package("pretrain --tensorboard", "tensorboard", "tensorboard", extra("tensorboard")),
        _package("pretrain --shards https://", "aiohttp", "aiohttp", extra("remote")),
        _package("pretrain --shards s3://", "s3fs", "s3fs", extra("remote")),
        _package("pretrain --shards gs://", "gcsfs", "gcsfs", extra("remote")),
        _package("opt index --faiss", "faiss", "faiss-cpu", extra("eval")),
        _package("eval text-to-image --fid-network inception", "torch_fidelity", "torch-fidelity", extra("eval")),
        _package("eval transcribe, Whisper's words", "whisper_normalizer", "whisper-normalizer", extra("eval")),
        _package("eval caption, METEOR (needs Java)", "pycocoevalcap", "pycocoevalcap", extra("eval")),
        _package("torchrun", "torch.distributed", "torch", CORE, _processes),
        _package("sound files", "soundfile", "soundfile", CORE, _soundfile),
        _package("espeak-ng voices", "espeakng_loader", "espeakng-loader", CORE, _espeak),
        _package("DALL-E (only to compare)", "dall_e", "DALL-E", extra("dalle")),
        _package("fairseq (only to compare)", "fairseq", "fairseq-fixed", extra("fairseq")),
        _java(),
    ]


def show(findings: list[Finding], console: Console) -> None:
    """A table and beneath it the commands on a terminal, one plain line a finding elsewhere."""
    if not console.is_terminal:
        for finding in findings:
            mend = f" | mend: {finding.mend}" if finding.mend else ""
            print(f"{finding.name}: {'yes' if finding.works else 'no'}, {finding.detail}{mend}")
        return
    table = Table("", "works", "version, or reason")
    for finding in findings:
        table.add_row(finding.name, "[green]yes[/]" if finding.works else "[red]no[/]", escape(finding.detail))
    console.print(table)
    for finding in findings:
        if finding.mend:  # not in the table, where a command would be folded and could not be copied
            console.print(f"{finding.name}:\n    {escape(finding.mend)}", soft_wrap=True, highlight=False)


def _package(
    name: str, module: str, distribution: str, mend: str, probe: Callable[[Any], str] | None = None
) -> Finding:
    """Import `module` and run `probe` on it, which returns what is worth knowing beside the version."""
    if importlib.util.find_spec(module) is None:
        return Finding(name, False, f"{distribution} is not installed", mend)
    try:
        imported = importlib.import_module(module)
        more = probe(imported) if probe is not None else ""
    except Exception as error:  # any package may fail in any way; the reason is the answer
        reason = str(error).strip().splitlines() or [""]
        return Finding(name, False, f"{type(error).__name__}: {reason[0]}", mend)
    return Finding(name, True, ", ".join(part for part in (_version(module, distribution), more) if part))


def _version(module: str, distribution: str) -> str:
    for known_as in (distribution, module):
        try:
            return importlib.metadata.version(known_as)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "version unknown"


def _torch(torch: Any) -> str:
    if torch.cuda.is_available():
        bfloat16 = "with" if torch.cuda.is_bf16_supported() else "without"
        devices = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
        return f"CUDA {torch.version.cuda}, {devices} {bfloat16} bfloat16"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    bfloat16 = "with" if any(key.endswith("bf16") and value for key, value in capabilities.items()) else "without"
    return f"no CUDA, {torch.backends.cpu.get_cpu_capability()} {bfloat16} fast bfloat16"


def _processes(distributed: Any) -> str:
    there = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    return ", ".join(f"{name} {'yes' if found else 'no'}" for name, found in there.items())


def _torchvision(torchvision: Any) -> str:
    import torch

    boxes_R4, scores_R = torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 1, 1]]), torch.tensor([1.0, 0.5])
    if torchvision.ops.nms(boxes_R4, scores_R, 0.5).tolist() != [0]:
        raise RuntimeError("its non-maximum suppression gives wrong answers")
    if torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), [boxes_R4[:1]], 1, aligned=True).tolist() != [[[[1.0]]]]:
        raise RuntimeError("its RoIAlign gives wrong answers")
    return ""


def _torchaudio(torchaudio: Any) -> str:
    import torch

    torchaudio.functional.resample(torch.zeros(1, 441), 44_100, 16_000)
    return ""


def _transformers(transformers: Any) -> str:
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 1}
    transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**tiny, **convolutions, **positions))
    return ""


def _soundfile(soundfile: Any) -> str:
    known = soundfile.available_formats()
    codecs = {
        label: "yes" if key in known else "no" for label, key in (("Ogg", "OGG"), ("FLAC", "FLAC"), ("MP3", "MP3"))
    }
    return ", ".join(f"{label} {answer}" for label, answer in codecs.items())


def _espeak(espeakng_loader: Any) -> str:
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_Info.restype = ctypes.c_char_p
    return f"espeak-ng {library.espeak_Info(None).decode()}"


def _tiny_networks() -> Finding:
    """The embedded networks, found as files: the library imports none of the applications."""
    name = "embedded tiny networks"
    found = importlib.util.find_spec("feature_extract")
    folders = (
        [Path(folder) / "tiny" / "weights" for folder in (found.submodule_search_locations or [])] if found else []
    )
    files = sorted(file for folder in folders for file in folder.glob("*.safetensors"))
    if not files:
        return Finding(name, False, "no weights beside feature_extract/tiny", "git checkout -- feature_extract/tiny")
    return Finding(name, True, ", ".join(f"{file.stem} {file.stat().st_size / 1e6:.1f} MB" for file in files))


def _java() -> Finding:
    name = "Java (optional: METEOR, SPICE)"
    program = shutil.which("java")
    mend = "apt-get install default-jre-headless"
    if program is None:
        return Finding(name, False, "no java on the path", mend)
    try:
        answer = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(name, False, str(error), mend)
    return Finding(name, True, (answer.stderr or answer.stdout).splitlines()[0])


def _machine() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding(
        "this machine", True, f"{platform.system()} {platform.machine()}, {cores} cores, {memory:.0f} GiB memory"
    )
