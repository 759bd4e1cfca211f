"""The C header of the records says what Python's declarations say."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest

from waveos import ring
from waveos.host.bpf import records
from waveos.sched.records import MESSAGE, Message


def test_every_number_of_the_contract_is_there_by_its_name():
    text = records.header()
    for name in ("IDENTITY_AT", "OVERFLOW_AT", "CREDIT_AT", "HEADER_WORDS", "MAGIC"):
        (value,) = re.findall(rf"^#define RING_{name} (\w+)$", text, re.M)
        assert int(value, 0) == getattr(ring, name)
    for member in Message:
        assert f"\tMESSAGE_{member.name} = {member.value}," in text


def test_the_compiler_agrees_on_every_offset_and_refuses_another(tmp_path):
    compiler = next((found for name in ("clang-19", "clang", "cc") if (found := shutil.which(name))), None)
    if not compiler:
        pytest.skip("no C compiler here")

    def accepts(text):
        (tmp_path / "wave_records.h").write_text(text)
        (tmp_path / "try.c").write_text('#include "wave_records.h"\n')
        return subprocess.run([compiler, "-fsyntax-only", "-Wall", "-Werror", tmp_path / "try.c"], capture_output=True, check=False).returncode == 0

    assert accepts(records.header())
    assert not accepts(records.header().replace("__u8 qos;", "__u16 qos;"))


def test_a_struct_has_the_fields_of_the_record_in_order():
    (body,) = re.findall(r"^struct wave_message \{\n(.*?)\}", records.header(), re.M | re.S)
    fields = re.findall(r"__([su])(\d+) (\w+);", body)
    assert tuple(name for *_, name in fields) == MESSAGE.names
    assert [np.dtype(f"{'i' if sign == 's' else 'u'}{int(bits) // 8}") for sign, bits, _ in fields] == [MESSAGE[name] for name in MESSAGE.names]
