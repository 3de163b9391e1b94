"""The end of a job: what was lost, as a file; the manifest, which says that the folder is complete; a summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from feature_extract.extractors import Extractors
from feature_extract.runners.supervise import Tally
from opt.config import UserError
from opt.data.manifest import Manifest, Origin, read_receipt, write_manifest
from opt.files import open_atomic
from opt.lock import remove_unfinished
from opt.progress import counted

FAILURES = "failures.jsonl"


def commit(
    out: Path, names: list[str], extractors: Extractors, descriptions: dict[str, Any], origin: Origin
) -> Manifest:
    """failures.jsonl from the receipts, then the manifest. Raises UserError when nothing could be used."""
    receipts = [receipt for name in names if (receipt := read_receipt(out, name)) is not None]
    with open_atomic(out / FAILURES, "w") as file:
        for failure in (failure for receipt in receipts for failure in receipt.failures):
            part, _, reason = failure.reason.partition(": ")
            line = {"key": failure.key, "part": part, "reason": reason}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if not any(receipt.records for receipt in receipts):
        raise UserError(f"{out}: not one row could be used; {out / FAILURES} says why for each; when that is mended, "
                        "run the same command with --retry-failed")
    regions, audio, codes = extractors
    remove_unfinished(out)
    return write_manifest(
        out, names, descriptions, regions.classes if regions is not None else (),
        codes.codebook if codes is not None else 0, regions.attributes if regions is not None else (),
        audio.codebooks if audio is not None else (), (origin,),
    )


def summary(out: Path, manifest: Manifest, already: int) -> str:
    """Counts, networks, bytes a sample, failures by reason."""
    size = sum(receipt.bytes for receipt in manifest.shards)
    networks = [f"{kind} {about['weights']}" for kind, about in manifest.extractors.items()]
    tiny = any(about["weights"] == "tiny" for about in manifest.extractors.values())
    lines = [
        f"{out}: {counted(manifest.records, 'record')}, {counted(manifest.samples, 'sample')} in "
        f"{counted(len(manifest.shards), 'shard')} ({already:,} were there already), "
        f"{size / max(1, manifest.samples):,.0f} bytes a sample",
        f"networks: {', '.join(networks) or 'none'}{'; the tiny ones know spoken scenes only' if tiny else ''}",
    ]
    tally = Tally()
    tally.add(manifest.failures)
    if tally.kinds:
        lines += [f"failures: {tally.kinds.total():,}, listed in {out / FAILURES}", *tally.table()]
    return "\n".join(lines)
