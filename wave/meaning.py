"""Enums whose members say what they mean: `NAME = number, "meaning"`. Documentation is made from them."""

from __future__ import annotations

from enum import IntEnum
from typing import Self


class Told(IntEnum):
    """An integer with a one-line `meaning`."""

    meaning: str

    def __new__(cls, value: int, meaning: str = "") -> Self:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member
