"""`opt doctor` names every backend, and turns every failure into a reason and a command."""

import pkgutil
import sys
import types

from rich.console import Console

from feature_extract import backends
from opt import doctor


def test_examine_says_what_works_and_how_to_mend_the_rest():
    findings = {finding.name: finding for finding in doctor.examine()}
    for name in ("Python", "torch", "--regions torchvision_detector", "--audio transformers_speech", "sound files"):
        assert findings[name].works, findings[name]
    assert "MP3 yes" in findings["sound files"].detail
    for word in ("espeak", "tiny", "--runner ray", "Parquet", "Java"):
        assert any(word in name for name in findings), word
    for entry in pkgutil.iter_modules(backends.__path__):
        assert any(name.endswith(f" {entry.name}") for name in findings), entry.name
    assert all(finding.works != bool(finding.mend) for finding in findings.values())


def test_a_package_that_fails_at_import_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "broken_backend.py").write_text("raise OSError('libfoo.so: undefined symbol\\nlong tail')")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._package("broken", "broken_backend", "broken-backend", "pip install broken-backend")
    assert finding == doctor.Finding(
        "broken", False, "OSError: libfoo.so: undefined symbol", "pip install broken-backend"
    )


def test_a_probe_that_fails_is_a_finding(monkeypatch):
    def probe(module: types.ModuleType) -> str:
        raise RuntimeError("wrong answers")

    finding = doctor._package("json", "json", "json", "mend", probe)
    assert (finding.works, finding.detail) == (False, "RuntimeError: wrong answers")


def test_shown_as_plain_lines_or_as_a_table_with_commands_whole(capsys):
    findings = [
        doctor.Finding("a", True, "1.0"),
        doctor.Finding("b", False, "missing", 'pip install ".[b]" ' + "x" * 200),
    ]
    doctor.show(findings, Console(file=sys.stdout, force_terminal=False))
    assert capsys.readouterr().out.splitlines()[0] == "a: yes, 1.0"
    doctor.show(findings, Console(file=sys.stdout, force_terminal=True, width=60))
    assert 'pip install ".[b]" ' + "x" * 200 in capsys.readouterr().out
