"""The end of a job: what was lost, as a file; the manifest, which says that the folder is complete; a summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from feature_extract.extractors import Extractors
from feature_extract.runners.supervise import Tally
from opt.config import UserError
from opt.data.manifest import Manifest, read_receipt, write_manifest
from opt.files import open_atomic
from opt.lock import remove_unfinished

FAILURES = "failures.jsonl"


def commit(out: Path, names: list[str], extractors: Extractors, descriptions: dict[str, Any]) -> Manifest:
    """failures.jsonl from the receipts, then the manifest. Raises UserError when nothing could be used."""
    receipts = [receipt for name in names if (receipt := read_receipt(out, name)) is not None]
    with open_atomic(out / FAILURES, "w") as file:
        for failure in (failure for receipt in receipts for failure in receipt.failures):
            part, _, reason = failure.reason.partition(": ")
            line = {"key": failure.key, "part": part, "reason": reason}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if not any(receipt.records for receipt in receipts):
        raise UserError(f"{out}: not one row could be used; {out / FAILURES} says why for each")
    regions, audio, codes = extractors
    remove_unfinished(out)
    return write_manifest(
        out, names, descriptions, regions.classes if regions is not None else (),
        codes.codebook if codes is not None else 0, regions.attributes if regions is not None else (),
        audio.codebooks if audio is not None else (),
    )


def summary(out: Path, manifest: Manifest, already: int) -> str:
    """Counts, networks, bytes a sample, failures by reason."""
    size = sum(receipt.bytes for receipt in manifest.shards)
    networks = ", ".join(f"{kind} {about['weights']}" for kind, about in manifest.extractors.items())
    lines = [
        f"{out}: {manifest.records} records, {manifest.samples} samples in {len(manifest.shards)} shards "
        f"({already} were there already), {size / max(1, manifest.samples):,.0f} bytes a sample",
        f"networks: {networks or 'none'}",
    ]
    tally = Tally()
    tally.add([failure.reason for failure in manifest.failures])
    if tally.reasons:
        lines += [f"failures: {tally.reasons.total()}, listed in {out / FAILURES}", *tally.table()]
    return "\n".join(lines)
