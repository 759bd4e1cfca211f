"""Binding a policy: compiled or plain it decides the same, and compiled code is never older than its source."""

import ctypes
import sys
from contextlib import nullcontext

import numpy as np
import pytest

from waveos import sched
from waveos.errors import PolicyError
from waveos.policy import bind, load_policy, policy_names
from waveos.sched.orders import ORDERS
from waveos.testing import Replayed, interpreted, record_stream

TEMPLATE = """\
import enum
import numpy as np
from waveos import sched
from waveos.policy import Policy, array, jitable, pop, push, ring, size

WEIGHT = 3
TABLE = np.array([5, 6, 7])

@jitable
def helper(x):
    return x + 1

@jitable
def caller(x):
    return helper(x)

class Mine(Policy, subsystem=sched, name="bound_mine"):
    runq = ring(64)
    def thread_runnable(self, msg, txns):
        push(self.runq, BODY)
    def cpu_idle(self, msg, txns):
        if size(self.runq): sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)
"""


@pytest.fixture
def fingerprint(tmp_path, monkeypatch):
    """The fingerprint of the template with these replacements."""
    monkeypatch.setenv("WAVE_JIT", "0")

    def of(*replacements, body="msg.tid"):
        text = TEMPLATE.replace("BODY", body)
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "bound_mine.py"
        path.write_text(text)
        return load_policy(str(path)).bind(n_cpus=2).fingerprint

    return of


def test_equal_sources_have_equal_fingerprints(fingerprint):
    assert fingerprint() == fingerprint()


@pytest.mark.parametrize(
    ("body", "old", "new"),
    [
        ("msg.tid", "push(self.runq, msg.tid)", "push(self.runq, msg.tid, front=1)"),
        ("msg.tid + WEIGHT", "WEIGHT = 3", "WEIGHT = 4"),
        ("helper(msg.tid)", "return x + 1", "return x + 2"),
        ("caller(msg.tid)", "return x + 1", "return x - 1"),
        ("msg.tid", "ring(64)", "ring(128)"),
        ("msg.tid", "if size(self.runq): ", "if size(self.runq) > 1: "),
        ("msg.tid + 1", "msg.tid + 1", "msg.tid + 2"),
    ],
)
def test_a_change_in_what_a_handler_consists_of_changes_the_fingerprint(fingerprint, body, old, new):
    assert fingerprint(body=body) != fingerprint((old, new), body=body)


@pytest.mark.parametrize(
    ("body", "old", "new"),
    [
        pytest.param("sum([WEIGHT for _ in range(3)])", "WEIGHT = 3", "WEIGHT = 4", id="constant in a comprehension"),
        pytest.param("TABLE[0]", "[5, 6, 7]", "[6, 6, 7]", id="table"),
        pytest.param("msg.tid + WEIGHT", "WEIGHT = 3", "WEIGHT = np.int64(4)", id="numpy scalar"),
    ],
)
def test_a_change_in_what_nested_code_or_a_table_holds_changes_the_fingerprint(fingerprint, body, old, new):
    first = (old, "WEIGHT = np.int64(3)") if "np.int64" in new else (old, old)
    assert fingerprint(first, body=body) != fingerprint((old, new), body=body)


def test_plain_python_decides_as_the_compiled_policy_does_to_the_last_byte():
    stream, decisions = record_stream("shinjuku", seed=11, steps=600)
    with interpreted():
        plain = Replayed(load_policy("shinjuku"), 4, 32, 1).feed(stream)
    assert len(decisions) > 100
    assert plain.tobytes() == decisions.tobytes()


def write(tmp_path, options="", runnable="push(self.runq, msg.tid, front=msg.front)"):
    path = tmp_path / "bound_mine.py"
    path.write_text(TEMPLATE.replace('name="bound_mine"', f'name="bound_mine"{options}').replace("push(self.runq, BODY)", runnable))
    return load_policy(str(path))


def test_a_policy_that_is_not_to_be_compiled_runs_as_it_stands(tmp_path):
    policy = write(tmp_path, ", compiled=False", "push(self.runq, {}.get('no', msg.tid), front=msg.front)")
    stream, expected = record_stream("fifo", seed=2, steps=300)
    assert Replayed(policy, 4, 32, 1).feed(stream).tobytes() == expected.tobytes()


def test_a_policy_that_numba_cannot_compile_is_told_with_reason_and_way_out(tmp_path):
    policy = write(tmp_path, runnable="push(self.runq, {}.setdefault(msg.tid, object()))")
    with pytest.raises(PolicyError) as error:
        policy.bind(n_cpus=2)
    assert str(error.value).startswith("policy 'bound_mine' cannot be compiled: ")
    assert str(error.value).endswith("WAVE_JIT=0 runs it as plain Python")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
def test_what_a_handler_raises_is_told_with_file_and_line(tmp_path, compiled):
    policy = write(tmp_path, "" if compiled else ", compiled=False", "raise ValueError('of no use')")
    stream, _ = record_stream("fifo", seed=2, steps=50)
    with pytest.raises(PolicyError) as error:
        Replayed(policy, 4, 32).feed(stream)
    assert str(error.value).startswith("policy 'bound_mine', thread_runnable at ")
    assert str(error.value).endswith(f" ns: ValueError: of no use ({tmp_path / 'bound_mine.py'}:20)")


def test_two_users_of_a_policy_share_code_and_nothing_else():
    first, second = (load_policy("fifo").bind(n_cpus=n) for n in (2, 3))
    assert first.address == second.address
    first.state["runq"]["tail"] = 7
    assert second.state["runq"]["tail"][0] == 0
    assert (first.state["cpus"][0], second.state["cpus"][0]) == (2, 3)


def test_a_copy_of_a_policy_file_under_another_name_is_compiled_for_itself(tmp_path, monkeypatch):
    for name in ("bound_mine", "bound_copy"):
        path = tmp_path / f"{name}.py"
        path.write_text(TEMPLATE.replace("BODY", "msg.tid"))
        assert load_policy(str(path)).bind(n_cpus=2).address
        monkeypatch.delitem(sys.modules, f"wave_policy_{name}")  # what the next process would not have either
        monkeypatch.setattr(bind, "_COMPILED", {})


@pytest.mark.parametrize(
    "runnable", ["push(self.runq, 1 if msg.qos - 1 < 0 else 2)", "push(self.runq, msg.tid * 1_000_000_007 // 1_000_000_007)"], ids=["u1", "i4"]
)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_arithmetic_on_a_message_does_not_wrap_as_plain_python_where_it_does_not_compiled(tmp_path, runnable):
    policy = write(tmp_path, runnable=runnable)
    message = np.zeros(1, sched.MESSAGE)
    message["type"], message["tid"] = sched.Message.THREAD_RUNNABLE, 31
    pushed = []
    for context in (nullcontext, interpreted):
        with context():
            bound = policy.bind(n_cpus=2)
        orders = np.zeros(1, ORDERS)
        call = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 3)(bound.address)
        assert call(bound.state_address, message.ctypes.data, orders.ctypes.data) == 0
        pushed.append(int(bound.state["runq"]["slot"][0, 0]))
    assert pushed[0] == pushed[1]


@pytest.mark.parametrize("name", policy_names("sched"))
def test_an_installed_policy_handles_what_makes_it_one(name):
    assert {"thread_runnable", "cpu_idle"} <= set(load_policy(name).handlers)
