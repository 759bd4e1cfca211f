"""Wave leaves the standard library's module of that name alone, and its own packages carry their types."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import wave
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_import_wave_is_the_standard_librarys():
    assert Path(wave.__file__) == Path(sysconfig.get_path("stdlib")) / "wave.py"
    assert hasattr(wave, "Wave_read")


def test_it_is_so_beside_the_checkout_and_before_waveos_is_imported(tmp_path):
    code = "import wave, waveos; print(wave.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert found == str(Path(sysconfig.get_path("stdlib")) / "wave.py")


def test_the_import_root_is_waveos_and_it_is_typed():
    assert (files("waveos") / "py.typed").is_file()
    assert distribution("waveos").metadata["Name"] == "waveos"


def test_every_declared_entry_point_can_be_loaded():
    mine = [entry for entry in distribution("waveos").entry_points if entry.group.startswith("waveos.") or entry.name == "wave"]
    assert {entry.group for entry in mine} == {"console_scripts", "waveos.policies", "waveos.links"}
    for entry in mine:
        assert callable(entry.load())


def test_the_version_is_declared_once_and_told_twice():
    import waveos

    assert distribution("waveos").version == waveos.__version__


def test_the_licence_is_apache_2_with_its_appendix():
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text
