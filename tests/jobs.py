"""Extraction jobs for tests: a configuration with the embedded networks, and all that a finished job left."""

from pathlib import Path

from feature_extract.audio import AudioSettings
from feature_extract.job import ExtractConfig
from feature_extract.regions import RegionSettings
from feature_extract.sources.localized_narratives import Source


def config(corpus: Path, out: Path, **more) -> ExtractConfig:
    """The made-up corpus in shards of three rows, by this process; `more` are fields of the job or its settings."""
    settings = {"shard_size": 3, "workers": 0, "device": "cpu"} | more
    parts = {"region": RegionSettings, "speech": AudioSettings}
    for name, kind in parts.items():
        own = {key: settings.pop(key) for key in list(settings) if key in kind.__dataclass_fields__ and key != "codes"}
        settings[name] = kind(**own)
    return ExtractConfig("localized_narratives", Source(corpus, settings.pop("split", "train")), out, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished job but its locks, and its plan, which notes when the source's files were written."""
    left_out = {".lock", ".turn", "plan.sqlite"}
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in left_out}
