"""What `make soak` judges by: a leak is seen among noise, and what is flat is not taken for one."""

from __future__ import annotations

import random
import sys

import pytest

from tests.chaos.world import HERE

sys.path.insert(0, str(HERE))  # the programs of this folder import one another by name

import soak

NOISE_KIB = 40


@pytest.mark.parametrize(("leak_kib_per_s", "leaks"), [(0, False), (0.1, False), (2, True)])
def test_memory_that_grows_by_more_than_a_hundredth_in_twenty_minutes_is_told_from_noise_and_from_a_start_that_grows(leak_kib_per_s, leaks):
    rng = random.Random(1)
    samples = [(t, round(160_000 + min(t, 300) * 100 + leak_kib_per_s * t + rng.uniform(-NOISE_KIB, NOISE_KIB))) for t in range(0, 1_800, 10)]
    assert (soak.growth(samples, 600) > soak.GROWTH) == leaks


def test_one_sample_has_not_grown():
    assert soak.growth([(700.0, 1_000)], 600) == 0.0
