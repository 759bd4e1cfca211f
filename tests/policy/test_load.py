"""Loading a policy: what is wrong with a file is said at once, in one line with its place."""

import textwrap
from pathlib import Path

import pytest

import waveos.agents.sched
from waveos.errors import PolicyError
from waveos.policy import load_policy, policy_names

HEAD = """\
from waveos import sched
from waveos.policy import Param, Policy, pop, push, ring, size
"""


@pytest.fixture
def refuse(tmp_path):
    """Loads a file that cannot be a policy and gives the one line that says why, and the file's path."""

    def told(text, name=""):
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(text))
        with pytest.raises(PolicyError) as error:
            load_policy(f"{path}{name}")
        assert "\n" not in str(error.value)
        return str(error.value).replace(str(path), "FILE")

    return told


def mine(body, options=""):
    return HEAD + f"class Mine(Policy, subsystem=sched, name='mine'{options}):\n" + textwrap.indent(textwrap.dedent(body), "    ")


def test_a_handler_that_is_no_message_is_told_with_the_nearest_and_its_line(refuse):
    told = refuse(mine("runq = ring(8)\ndef thread_runable(self, msg, txns):\n    pass\n"))
    assert told.startswith("FILE:5: 'thread_runable' is not a message of sched (did you mean 'thread_runnable'?); known: thread_new, ")


def test_a_handler_of_another_arity_is_told_with_its_line(refuse):
    assert refuse(mine("def cpu_idle(self, msg):\n    pass\n")) == "FILE:4: handler 'cpu_idle' takes 2 arguments; it gets three: (self, msg, txns)"


@pytest.mark.parametrize("value", ["[]", "{}", "3", "'x'", "None", "lambda: 0"])
def test_state_of_an_unknown_type_is_told_with_its_line(refuse, value):
    told = refuse(mine(f"queue = {value}\ndef cpu_idle(self, msg, txns):\n    pass\n"))
    assert told.startswith("FILE:4: ")
    assert "'queue'" in told


def test_a_ring_of_no_size_is_told_with_its_line(refuse):
    assert refuse(mine("runq = ring(0)\ndef cpu_idle(self, msg, txns):\n    pass\n")) == "FILE:4: ValueError: a size of 0; at least 1 is needed"


def test_an_annotation_that_is_no_parameter_is_told_with_its_line(refuse):
    assert refuse(mine("quantum_us: int = 3\ndef cpu_idle(self, msg, txns):\n    pass\n")).startswith("FILE:4: 'quantum_us' is annotated")


@pytest.mark.parametrize("value", ["'30'", "True", "float('nan')", "float('inf')", "None"])
def test_a_parameter_that_is_no_finite_number_is_refused(refuse, value):
    assert "parameter 'quantum_us' is" in refuse(mine(f"quantum_us: Param = {value}\ndef cpu_idle(self, msg, txns):\n    pass\n"))


def test_a_policy_that_handles_nothing_is_refused(refuse):
    assert "policy 'mine' handles no message; known: " in refuse(mine("runq = ring(8)\n"))


def test_a_file_without_a_policy_is_refused(refuse):
    assert refuse(HEAD + "x = 1\n") == "FILE has no policy class; write one as class Mine(Policy, subsystem=sched, name='mine')"


def test_a_syntax_error_is_told_with_its_line(refuse):
    assert refuse(HEAD + "class Mine(Policy\n    x = 1\n").startswith("FILE:")
    assert refuse("x = 1\ny = = 2\n") == "FILE:2: invalid syntax"


def test_what_a_file_raises_is_told_by_its_type_and_line(refuse):
    assert refuse("import no_such_module_of_mine\n") == "FILE:1: ModuleNotFoundError: No module named 'no_such_module_of_mine'"
    assert refuse(mine("runq = rung(8)\n")) == "FILE:4: NameError: name 'rung' is not defined"


def test_a_file_that_ends_the_program_is_refused(refuse):
    assert refuse("import sys\nsys.exit(0)\n") == "FILE:2: the file ends the program (SystemExit); it may only define policies"


def test_a_misspelt_keyword_of_the_class_is_told_with_the_nearest(refuse):
    text = mine("def cpu_idle(self, msg, txns):\n    pass\n").replace("subsystem=", "subsytem=")
    told = (
        "FILE:3: a policy class takes no keyword 'subsytem' (did you mean 'subsystem'?); known: subsystem, name, compiled, work_conserving, forgets"
    )
    assert refuse(text) == told


IDLE = "def cpu_idle(self, msg, txns):\n    pass\n"


def test_an_init_that_nobody_would_call_is_refused_with_its_line(refuse):
    told = refuse(mine(IDLE + "def __init__(self):\n    self.n = 0\n"))
    assert told.startswith("FILE:6: policy 'mine' has an __init__, which nobody calls; declare state in the class")


@pytest.mark.parametrize("again", ["runq = ring(9)", "runq: Param = 9", "def runq(self, msg, txns):\n    pass"])
def test_what_is_declared_twice_is_refused_with_both_lines(refuse, again):
    told = refuse(mine("runq = ring(8)\n" + IDLE + again + "\n"))
    assert told == "FILE:7: 'runq' is declared in line 4 too; only the last would be there: rename one"


def test_a_handler_that_is_there_twice_is_refused_with_both_lines(refuse):
    assert refuse(mine(IDLE + IDLE)).startswith("FILE:6: 'cpu_idle' is declared in line 4 too; ")


def test_a_parameter_may_get_its_value_in_another_line(tmp_path):
    (tmp_path / "mine.py").write_text(mine("quantum_us: Param\nquantum_us = 7\n" + IDLE))
    assert load_policy(str(tmp_path / "mine.py")).params == {"quantum_us": 7}


@pytest.mark.parametrize("name", ["cpus", "bind", "name", "handlers", "params", "start"])
def test_state_or_a_parameter_of_a_name_that_is_taken_is_refused_with_its_line(refuse, name):
    assert refuse(mine(f"{name} = ring(8)\n" + IDLE)).startswith(
        f"FILE:4: state {name!r} has a name that Wave uses; taken are: bind, compiled, cpus, "
    )
    assert refuse(mine(f"{name}: Param = 8\n" + IDLE)).startswith(f"FILE:4: parameter {name!r} has a name that Wave uses; taken are: ")


@pytest.mark.parametrize("name", ["a/b", "../../x", "", ".", "-x", "a b", "a\\nb"])
def test_a_name_that_is_no_file_name_is_refused(refuse, name):
    assert refuse(mine(IDLE).replace("name='mine'", f"name='{name}'")).startswith("FILE:3: policy name '")


def test_a_policy_derived_from_a_compiled_one_is_refused_as_its_handlers_would_be_lost(refuse):
    derived = "class Other(Mine, subsystem=sched, name='other'):\n    def tick(self, msg, txns):\n        pass\n"
    assert refuse(mine(IDLE) + derived).startswith("FILE:6: policy 'other' inherits from policy 'mine', whose handlers it would not have; ")


def test_of_two_policies_in_a_file_one_is_named(tmp_path, refuse):
    two = mine("def cpu_idle(self, msg, txns):\n    pass\n") + mine("def tick(self, msg, txns):\n    pass\n").replace(HEAD, "").replace(
        "Mine", "Other"
    )
    assert refuse(two) == "FILE has 2 policy classes (Mine, Other); name one as mine.py:Class"
    assert refuse(two, ":Othr") == "FILE has no policy class 'Othr' (did you mean 'Other'?); it has: Mine, Other"
    assert list(load_policy(f"{tmp_path / 'mine.py'}:Other").handlers) == ["tick"]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PolicyError, match=r"no policy file .*gone\.py"):
        load_policy(str(tmp_path / "gone.py"))


def test_an_unknown_policy_is_told_with_the_nearest_and_all_that_are_installed():
    with pytest.raises(PolicyError) as error:
        load_policy("shinjuko")
    assert str(error.value).startswith("no policy 'shinjuko' (did you mean 'shinjuku'?); installed: ")
    assert all(name in str(error.value) for name in policy_names())


def test_an_entry_point_that_is_no_policy_is_refused(monkeypatch):
    from importlib.metadata import EntryPoint

    import waveos.policy.find

    wrong = EntryPoint("wrong_kind", "waveos.outcome:Outcome", "waveos.policies")
    monkeypatch.setattr(waveos.policy.find, "entry_points", lambda group: [wrong])
    with pytest.raises(PolicyError, match=r"entry point 'wrong_kind' names waveos\.outcome:Outcome, which is not a Policy class"):
        load_policy("wrong_kind")


class TestParameters:
    """What a policy is bound with."""

    def test_an_unknown_one_is_told_with_the_nearest(self):
        with pytest.raises(PolicyError) as error:
            load_policy("shinjuku").bind(n_cpus=2, params={"quantum_ms": 1})
        assert str(error.value) == "policy 'shinjuku' has no parameter 'quantum_ms' (did you mean 'quantum_us'?); it has: quantum_us"

    def test_one_without_a_value_must_be_given(self, tmp_path):
        path = tmp_path / "mine.py"
        path.write_text(mine("quantum_us: Param\ndef cpu_idle(self, msg, txns):\n    pass\n", ", compiled=False"))
        policy = load_policy(str(path))
        assert policy.params == {"quantum_us": None}
        with pytest.raises(PolicyError, match="policy 'mine' needs parameter 'quantum_us'"):
            policy.bind(n_cpus=2)
        assert policy.bind(n_cpus=2, params={"quantum_us": 7}).state["quantum_us"][0] == 7

    def test_a_value_that_is_no_number_is_refused(self):
        with pytest.raises(PolicyError, match="parameter 'quantum_us' is 'fast'; a finite number is needed"):
            load_policy("shinjuku").bind(n_cpus=2, params={"quantum_us": "fast"})


REFERENCE = sorted(Path(waveos.agents.sched.__file__).parent.glob("[a-z]*.py"))


def test_a_global_fifo_takes_at_most_25_lines():
    assert len(next(path for path in REFERENCE if path.stem == "fifo").read_text().splitlines()) <= 25


@pytest.mark.parametrize("path", REFERENCE, ids=lambda path: path.stem)
def test_a_reference_policy_takes_at_most_120_lines_and_says_what_it_does(path):
    assert len(path.read_text().splitlines()) <= 120
    assert (load_policy(path.stem).__doc__ or "").strip()


def test_a_folder_may_have_py_in_its_name(tmp_path):
    folder = tmp_path / "my.python"
    folder.mkdir()
    (folder / "mine.py").write_text(mine("def cpu_idle(self, msg, txns):\n    pass\n"))
    assert load_policy(str(folder / "mine.py")).name == "mine"


def test_a_policy_that_forgets_must_handle_every_way_to_leave(refuse):
    text = mine(
        "def thread_running(self, msg, txns):\n    pass\n\ndef thread_blocked(self, msg, txns):\n    pass\n\ndef thread_new(self, msg, txns):\n    pass\n"
    )
    told = refuse(text.replace("subsystem=", "forgets=True, subsystem="))
    assert told.endswith("forgets threads that have left, so it must handle thread_dead, too")


def test_a_policy_forgets_where_threads_wait_and_nowhere_else(refuse):
    text = "from waveos import net\nfrom waveos.policy import Policy\n\nclass Mine(Policy, subsystem=net, name='mine', forgets=True):\n"
    assert "a policy of net has nothing to forget" in refuse(text + "    def request_arrived(self, msg, txns):\n        pass\n")
