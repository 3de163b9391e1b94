"""Many small files from the web into a folder, several at a time; what cannot be had is listed and ends nothing.

names --fetch_all--> files in the folder, a receipt of each, and the Outcome: what did not come and why
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice

from feature_extract.download.receipts import Receipt, Receipts
from feature_extract.fetch import FetchError, Patience, fetch_checked
from feature_extract.media import MAX_FILE_BYTES
from opt.files import write_atomic
from opt.lock import remove_unfinished
from opt.progress import progress

STOP_AFTER = 50
"""So many failures in a row, each of which might have passed: the server is down, and is left alone."""


@dataclass
class Outcome:
    """What a run got. passing: failures that another run may not have; in_a_row: such since the last file that came."""

    there: int
    failures: list[dict[str, str]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    passing: int = 0
    in_a_row: int = 0

    def fail(self, name: str, reason: str, lasting: bool) -> None:
        """Note a file that did not come."""
        self.failures.append({"file": name, "reason": reason})
        self.reasons[reason.split(" (")[0]] += 1
        self.passing += not lasting
        self.in_a_row += not lasting

    def came(self) -> None:
        """Note one that did."""
        self.there += 1
        self.in_a_row = 0

    def summary(self) -> str:
        """For example `3 missing file, 1 server busy`."""
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())


def fetch_all(
    names: list[str], url: Callable[[str], str], receipts: Receipts, connections: int, patience: Patience
) -> Outcome:
    """Fetch the files that the folder of the receipts has not got yet."""
    for folder in {(receipts.folder / name).parent for name in names}:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
    missing = [name for name in names if not receipts.has(name)]
    outcome = Outcome(there=len(names) - len(missing))

    def get(name: str) -> tuple[str, Receipt | FetchError]:
        try:
            fetched = fetch_checked(url(name), MAX_FILE_BYTES, patience)
        except FetchError as error:
            return name, error
        write_atomic(receipts.folder / name, fetched.content)
        sha256 = hashlib.sha256(fetched.content).hexdigest()
        return name, Receipt(name, url(name), len(fetched.content), sha256, fetched.checked)

    with progress("download", total=len(names), done=outcome.there, unit="files") as bar:
        for name, got in _as_they_come(get, missing, connections):
            if isinstance(got, Receipt):
                receipts.add(got)
                outcome.came()
            else:
                outcome.fail(name, str(got), got.lasting)
            bar.advance(note=outcome.summary())
            if outcome.in_a_row == STOP_AFTER:
                break
    return outcome


def _as_they_come(
    get: Callable[[str], tuple[str, Receipt | FetchError]], names: list[str], connections: int
) -> Iterator[tuple[str, Receipt | FetchError]]:
    """What `get` gives for each name. A few are begun ahead of those that are waited for, never all of them."""
    ahead = iter(names)
    with ThreadPoolExecutor(connections) as pool:
        try:
            begun: set[Future[tuple[str, Receipt | FetchError]]]
            begun = {pool.submit(get, name) for name in islice(ahead, 2 * connections)}
            while begun:
                done, begun = wait(begun, return_when=FIRST_COMPLETED)
                begun |= {pool.submit(get, name) for name in islice(ahead, len(done))}
                yield from (future.result() for future in done)
        finally:
            pool.shutdown(cancel_futures=True)
