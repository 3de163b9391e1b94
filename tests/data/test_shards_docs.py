"""docs/shards.md: the code on the page reads what it says, and the tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored_records import full_record, write_folder

from opt.data.encoding import named_arrays
from opt.data.stored import INDEX

PAGE = (Path(__file__).parents[2] / "docs" / "shards.md").read_text()


@pytest.mark.parametrize("int8", [False, True])
def test_the_code_on_the_page_reads_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, int8: bool) -> None:
    reader = write_folder(tmp_path, [[full_record("a", 0, pictures=2, narrations=2)]], int8)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    stored = named_arrays(reader.record(0))
    assert names["arrays"].keys() == stored.keys()
    for name, array in stored.items():
        assert names["arrays"][name].dtype == array.dtype and np.array_equal(names["arrays"][name], array)
    assert names["record"]["narrations"][1]["caption"] == "A red cube, number 1."


def test_the_tables_name_every_array_and_every_column() -> None:
    for name in named_arrays(full_record("a", 0)):
        assert f"`{name}`" in PAGE or f"`.{name.split('.')[2]}`" in PAGE
    assert all(f"`{name}`" in PAGE for name in INDEX.names or ())
