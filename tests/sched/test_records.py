"""The records of scheduling: 64 bytes, the same in every world."""

import numpy as np
import pytest

from waveos.outcome import Outcome
from waveos.record import HEADER_BYTES, RECORD_BYTES, record
from waveos.sched import DECISION, HANDLERS, MESSAGE, OUTCOME, Decision, Message

RECORDS = {"MESSAGE": MESSAGE, "OUTCOME": OUTCOME, "DECISION": DECISION}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_one_cache_line(name):
    assert RECORDS[name].itemsize == RECORD_BYTES == 64


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_is_little_endian_and_naturally_aligned(name):
    for form, offset in RECORDS[name].fields.values():
        assert offset % form.itemsize == 0
        assert form.newbyteorder("<") == form


@pytest.mark.parametrize("name", RECORDS)
def test_the_header_lies_where_every_peer_looks_for_it(name):
    offsets = {field: (form.str.lstrip("|<"), offset) for field, (form, offset) in RECORDS[name].fields.items() if offset < HEADER_BYTES}
    assert offsets == {"mark": ("u4", 0), "version": ("u1", 4), "subsystem": ("u1", 5), "type": ("u2", 6), "seq": ("i8", 8), "time_ns": ("i8", 16)}


@pytest.mark.parametrize("name", RECORDS)
def test_fields_leave_no_gap_and_do_not_overlap(name):
    taken = np.zeros(RECORD_BYTES, int)
    for form, offset in RECORDS[name].fields.values():
        taken[offset : offset + form.itemsize] += 1
    assert taken.tolist() == [1] * RECORD_BYTES


def test_an_outcome_names_its_subject_where_a_message_does():
    for field in ("tid", "cpu", "request_class", "qos", "outcome", "front", "cpu_seq"):
        assert MESSAGE.fields[field] == OUTCOME.fields[field]


def test_a_payload_that_does_not_fit_or_leaves_gaps_is_refused():
    with pytest.raises(ValueError, match="at most 40 bytes"):
        record([(f"word{i}", "<i8") for i in range(6)])
    with pytest.raises(ValueError, match="without gaps"):
        record([("small", "u1"), ("wide", "<i8")])


@pytest.mark.parametrize("kind", [Outcome, Message], ids=lambda kind: kind.__name__)
def test_every_member_says_what_it_means(kind):
    meanings = [member.meaning for member in kind]
    assert all(len(meaning) > 10 for meaning in meanings[1:])
    assert all(meanings)
    assert len(set(meanings)) == len(meanings)


def test_outcomes_are_numbered_without_gaps_and_zero_is_success():
    assert [int(member) for member in Outcome] == list(range(len(Outcome)))
    assert Outcome(0) is Outcome.COMMITTED


def test_a_policy_may_handle_every_message_of_the_host_and_none_of_the_runtimes_own():
    assert {"thread_runnable", "cpu_idle", "timer_expired", "txn_failed"} <= set(HANDLERS)
    assert not {"txn_outcome", "batch_end", "resync"} & set(HANDLERS)
    assert all(HANDLERS[member.name.lower()] == member for member in Message if member < Message.TXN_OUTCOME)


def test_messages_and_decisions_share_no_meaning_with_an_empty_record():
    assert 0 not in set(map(int, Message)) | set(map(int, Decision))
