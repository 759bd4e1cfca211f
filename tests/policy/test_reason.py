"""Why a policy cannot be compiled, or failed: one line that the author can act on, with file and line of the author's own source."""

import ctypes
import os
import signal
import textwrap
import warnings

import numpy as np
import pytest

from waveos import net, sched
from waveos.errors import PolicyError
from waveos.policy import load_policy

TEMPLATE = """\
import numpy as np
from waveos import net, sched
from waveos.policy import Param, Policy, array, jitable, pop, push, ring, size

def bare(x):
    return x + 1

@jitable
def marked(x):
    return sched.rum + x

class Mine(Policy, subsystem={subsystem}, name="reason_mine"):
    quantum_us: Param = 30
    runq = ring(64)
    def {handler}(self, msg, txns):
        {body}
"""
LINE = 16


@pytest.fixture
def write(tmp_path):
    def made(body, subsystem="sched", handler="thread_runnable"):
        path = tmp_path / "reason_mine.py"
        path.write_text(TEMPLATE.format(body=textwrap.indent(body, " " * 8).strip(), subsystem=subsystem, handler=handler))
        return load_policy(str(path))

    return made


@pytest.fixture
def refused(write, tmp_path, monkeypatch):
    """Compiles a policy with this handler and gives what is said instead of `policy ... cannot be compiled: `, the file as FILE."""
    monkeypatch.setenv("WAVE_JIT", "1")

    def told(body, **options):
        policy = write(body, **options)
        with pytest.raises(PolicyError) as error:
            policy.bind(n_cpus=2)
        head, _, reason = str(error.value).partition(" cannot be compiled: ")
        assert head == "policy 'reason_mine'"
        assert "\n" not in reason
        return reason.replace(str(tmp_path / "reason_mine.py"), "FILE")

    return told


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("push(self.runq, msg.tidd)", "'msg' has no 'tidd' (did you mean 'tid'?); it has: type, seq, time_ns, tid, cpu, "),
        ("push(self.runq, msg.thread)", "'msg' has no 'thread'; it has: type, seq, time_ns, tid, cpu, "),
        ("self.count = 1", "'self' has no 'count'; it has: cpus, quantum_us, runq"),
        ("push(self.runk, msg.tid)", "'self' has no 'runk' (did you mean 'runq'?); it has: cpus, quantum_us, runq"),
        ("sched.rum(txns, tid=1, cpu=0)", "'sched' has no 'rum' (did you mean 'run'?); it has: demote, preempt, run, set_timer"),
        ("push(self.runq, np.arrange(3)[0])", "'np' has no 'arrange' (did you mean 'arange'?)"),
        ("push(self.runq, msg.tid + wait)", "name 'wait' is not defined"),
        ("sched.run(txns, thread=msg.tid, cpu=0)", "sched.run takes no 'thread'; it takes (txns, tid, cpu, preempt=False)"),
        ("sched.run(txns, msg.tid)", "sched.run: missing a required argument: 'cpu'; it takes (txns, tid, cpu, preempt=False)"),
        ("push(self.runq, 1, frond=1)", "push takes no 'frond' (did you mean 'front'?); it takes (queue, value, front=0)"),
    ],
)
def test_a_name_that_does_not_exist_is_told_with_its_line_and_the_nearest(refused, body, told):
    reason = refused(body)
    assert reason.startswith(f"FILE:{LINE}: {told}")
    assert "WAVE_JIT=0" not in reason, "plain, it would fail as well"


def test_a_field_of_another_subsystem_is_told_as_well(refused):
    reason = refused("net.steer(txns, msg.req, 0)", subsystem="net", handler="request_arrived")
    assert reason.startswith(f"FILE:{LINE}: 'msg' has no 'req' (did you mean 'seq'?); it has: ")


def test_the_line_is_the_one_in_a_handler_of_several(refused):
    assert refused("if msg.tid:\n    pass\npush(self.runq, msg.front)\npush(self.runq, msg.nothing)").startswith(
        f"FILE:{LINE + 3}: 'msg' has no 'nothing'"
    )


def test_a_name_in_a_function_that_a_handler_calls_is_found_there(refused):
    assert refused("push(self.runq, marked(msg.tid))").startswith("FILE:10: 'sched' has no 'rum' (did you mean 'run'?)")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("push(self.runq, bare(msg.tid))", "'bare' is a plain function; mark it @jitable (from waveos.policy import jitable)"),
        ("x = {}", "Cannot infer the type of variable 'x', have imprecise type: DictType[undefined,undefined]<iv={}>"),
        ("push(self.runq, 'text')", "nothing compiled takes these types: push(record, 'text')"),
        ("sched.run(txns, 'a', 3)", "nothing compiled takes these types: run(record, 'a', 3)"),
        ("self.runq = 3", "Cannot cast 3 to record: i64 3"),
        ("import os\nos.getpid()", "Use of unsupported opcode (IMPORT_NAME) found"),
        ("print(f'{msg.tid:>3}')", "format spec in f-strings not supported yet"),
    ],
)
def test_what_numba_refuses_is_one_whole_sentence_with_the_line_in_the_authors_file(refused, body, told):
    assert refused(body) == f"FILE:{LINE}: {told}; WAVE_JIT=0 runs it as plain Python"


def test_names_that_a_handler_makes_itself_are_not_held_against_it(refused):
    body = "import math\nfor i in range(3):\n    k = i\ntry:\n    pass\nexcept Exception as why:\n    pass\nx = [n for n in range(3)]\npush(self.runq, {})"
    assert f"FILE:{LINE}: " in refused(body)
    assert "not defined" not in refused(body)


def test_numbas_own_warnings_are_not_shown(write, monkeypatch):
    monkeypatch.setenv("WAVE_JIT", "1")
    with warnings.catch_warnings(record=True) as shown, pytest.raises(PolicyError):
        warnings.simplefilter("always")
        write("d = {}; d[1] = 'a'; d['x'] = 2").bind(n_cpus=2)
    assert [str(each.message) for each in shown] == []


def dispatch(bound, **fields):
    """Hand one message to the policy: whether its handler raised, and the message."""
    subsystem = bound.policy.subsystem
    message, orders = np.zeros(1, subsystem.MESSAGE), np.zeros(1, subsystem.ORDERS)
    for name, value in fields.items():
        message[name] = value
    call = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 3)(bound.address)
    return call(bound.state_address, message.ctypes.data, orders.ctypes.data), message


RUNNABLE, ARRIVED = int(sched.Message.THREAD_RUNNABLE), int(net.Message.REQUEST_ARRIVED)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
def test_an_error_in_a_library_is_told_with_the_authors_line(write, tmp_path, monkeypatch, compiled):
    monkeypatch.setenv("WAVE_JIT", "1" if compiled else "0")
    bound = write("push(self.runq, np.full(-1 - msg.tid, 3)[0])").bind(n_cpus=2)
    raised, message = dispatch(bound, type=RUNNABLE, tid=5)
    assert raised
    assert bound.explain(message).endswith(f"({tmp_path / 'reason_mine.py'}:{LINE})")


def test_a_policy_in_a_folder_called_waveos_has_its_line_told(tmp_path, monkeypatch):
    monkeypatch.setenv("WAVE_JIT", "0")
    folder = tmp_path / "waveos"
    folder.mkdir()
    (folder / "state.py").write_text(TEMPLATE.format(body="pop(self.runq)", subsystem="sched", handler="thread_runnable"))
    bound = load_policy(str(folder / "state.py")).bind(n_cpus=2)
    _, message = dispatch(bound, type=RUNNABLE)
    assert bound.explain(message) == f"IndexError: pop from an empty ring ({folder / 'state.py'}:{LINE})"


def _leave(*_):
    raise SystemExit(0)


class TestWhatPassesThroughAPlainHandler:
    """An interrupt is not the policy's doing."""

    @pytest.fixture(autouse=True)
    def plain(self, monkeypatch):
        monkeypatch.setenv("WAVE_JIT", "0")

    def explain(self, policy):
        bound = policy.bind(n_cpus=2)
        raised, message = dispatch(bound, type=RUNNABLE)
        assert raised
        return bound.explain(message)

    def test_an_interrupt_goes_on_where_the_failure_is_read(self, write):
        policy = write(f"import os\nos.kill({os.getpid()}, {int(signal.SIGINT)})\nfor i in range(1_000): push(self.runq, i)")
        with pytest.raises(KeyboardInterrupt):
            self.explain(policy)

    def test_the_end_of_the_process_goes_on_as_well(self, write):
        signal.signal(signal.SIGTERM, _leave)
        policy = write(f"import os\nos.kill({os.getpid()}, {int(signal.SIGTERM)})\nfor i in range(1_000): push(self.runq, i)")
        with pytest.raises(SystemExit):
            self.explain(policy)

    def test_a_pipe_that_nobody_reads_any_more_goes_on_as_well(self, write):
        with pytest.raises(BrokenPipeError):
            self.explain(write("raise BrokenPipeError(32, 'Broken pipe')"))

    def test_a_policy_that_wants_to_end_the_program_has_failed(self, write):
        assert self.explain(write("raise SystemExit(0)")).startswith("SystemExit: 0 (")


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
class TestWorkersThatCannotBe:
    """A network policy that asks for them raises, and reads no memory that is not its own."""

    @pytest.mark.parametrize("worker", [99_999_999, 64, -1, -(1 << 40)])
    def test_no_depth_is_told(self, write, monkeypatch, compiled, worker):
        monkeypatch.setenv("WAVE_JIT", "1" if compiled else "0")
        bound = write(f"net.steer(txns, msg.request, net.depth(txns, msg.worker + {worker}))", subsystem="net", handler="request_arrived").bind(
            n_cpus=4
        )
        raised, message = dispatch(bound, type=ARRIVED)
        assert raised
        assert bound.explain(message).startswith("IndexError: depth of a worker that is none; workers are 0..self.cpus - 1 (")

    def test_none_is_the_shallowest(self, write, monkeypatch, compiled):
        monkeypatch.setenv("WAVE_JIT", "1" if compiled else "0")
        body = "net.steer(txns, msg.request, net.shallowest(txns, 99_999_999))"
        bound = write(body, subsystem="net", handler="request_arrived").bind(n_cpus=4)
        raised, message = dispatch(bound, type=ARRIVED)
        assert raised
        assert bound.explain(message).startswith("IndexError: shallowest of more workers than there can be; ")


def test_a_handler_that_reads_orders_is_explained_with_those_it_had(write, monkeypatch):
    monkeypatch.setenv("WAVE_JIT", "1")
    bound = write("if net.depth(txns, 1) == 7: pop(self.runq)", subsystem="net", handler="request_arrived").bind(n_cpus=4)
    message, orders = np.zeros(1, net.MESSAGE), np.zeros(1, net.ORDERS)
    message["type"] = ARRIVED
    orders["workers"], orders["depth"][0, 1] = 4, 7
    assert bound.explain(message, orders).startswith("IndexError: pop from an empty ring (")
