"""Ring and notice on the strict memory model: what must hold on any memory, and that each flush, fence and invalidate is needed for it."""

from __future__ import annotations

import ast
import inspect
import itertools
import types
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from waveos import ring as the_ring
from waveos.ipu_emulator.strict import Choices, Doorbell, Mapping, StrictMachine, StrictSide, Stuck
from waveos.link import notice as the_notice

VERSION, SUBSYSTEM, GENERATION = 1, 1, 7
Ring = Notice = types.ModuleType
Pair = tuple[Mapping, Mapping]
PAIRS: list[Pair] = [
    (Mapping.HOST, Mapping.AGENT),
    (Mapping.AGENT, Mapping.HOST),
    (Mapping.HOST, Mapping.HOST),
    (Mapping.BAR, Mapping.AGENT),
    (Mapping.AGENT, Mapping.BAR),
]


def record(number: int) -> list[int]:
    """Eight words that belong to `number` and to no other; the first keeps its low half free for the mark."""
    return [number << 32] + [number * 8 + w for w in range(1, 8)]


def number_of(words: np.ndarray) -> int:
    number = int(words[0]) >> 32
    assert list(words) == record(number), f"torn record {list(words)}"
    return number


class Peer:
    """One side of a ring, as a program uses it."""

    def __init__(self, ring: Ring, side: StrictSide) -> None:
        self.ring, self.side, self.own, self.taken, self.sent = ring, side, np.zeros(ring.OWN_WORDS, np.int64), [], []
        self.out, self.joined = np.zeros(64 * 8, np.int64), False

    def join(self, producer: bool) -> None:
        join = self.ring.join_producer if producer else self.ring.join_consumer
        while (answer := join(self.side, self.own, VERSION, SUBSYSTEM)) != self.ring.JOINED:
            assert answer == self.ring.NO_RING
        self.joined = True

    def await_word(self, look: Callable[[], int], value: int) -> None:
        while (seen := look()) != value:
            assert seen < value, f"{seen} where at most {value} is right"

    def send(self, numbers: list[int], single: bool) -> int:
        words = np.array([word for number in numbers for word in record(number)], np.int64)
        fit = self.ring.send_one(self.side, self.own, words, 0) if single else self.ring.send(self.side, self.own, words, len(numbers))
        self.sent += numbers[:fit]
        return fit

    def take(self, limit: int, single: bool) -> int:
        got = self.ring.poll_one(self.side, self.own, self.out, 0) if single else self.ring.poll(self.side, self.own, self.out, limit)
        self.taken += [number_of(self.out[8 * k : 8 * k + 8]) for k in range(got)]
        return got


def dirt(ring: Ring, memory, capacity: int, choices: Choices) -> None:
    """What an older, retired ring may have left behind, at its worst: marks that would be right in the new one."""
    if choices.below(2):
        memory.words[ring.HEADER_WORDS :: 8] = [(99 << 32) | (GENERATION << 16) + 1] * capacity
        memory.words[ring.CREDIT_AT] = 1000
        memory.words[ring.OVERFLOW_AT : ring.OVERFLOW_AT + 2] = [999, 999]
        memory.words[ring.CONSUMERS_AT] = 999


def check_stream(ring: Ring, pair: Pair, choices: Choices) -> None:
    """No record is lost, torn, twice or out of order; what did not fit is counted; joins and the end are seen."""
    capacity = choices.among((2, 4, 8))
    total = 3 * capacity
    machine = StrictMachine(choices)
    memory = machine.memory(ring.words(capacity))
    dirt(ring, memory, capacity, choices)
    producer, consumer = (Peer(ring, memory.side(mapping)) for mapping in pair)
    producer_creates, lost = choices.below(2), [0]

    def produce() -> None:
        if producer_creates:
            ring.create(producer.side, capacity, VERSION, SUBSYSTEM, GENERATION)
        producer.join(True)
        assert producer.own[ring.LOST] == 0
        producer.await_word(lambda: ring.joins(producer.side, ring.CONSUMERS_AT), 1)
        while len(producer.sent) < total:
            first = len(producer.sent) + 1
            single = bool(choices.below(2))
            batch = [first] if single else list(range(first, min(total, first + choices.below(capacity + 2)) + 1))
            fit = producer.send(batch, single)
            assert 0 <= fit <= len(batch)
            lost[0] += len(batch) - fit
        done.append(True)
        while len(done) < 2:
            machine.step()
        if producer_creates:
            ring.retire(producer.side)
        while not ring.restarted(producer.side, producer.own):
            pass

    def consume() -> None:
        if not producer_creates:
            ring.create(consumer.side, capacity, VERSION, SUBSYSTEM, GENERATION)
        consumer.join(False)
        consumer.await_word(lambda: ring.joins(consumer.side, ring.PRODUCERS_AT), 1)
        while len(consumer.taken) < total:
            assert ring.overflowed(consumer.side) <= lost[0] + capacity + 2
            assert not ring.restarted(consumer.side, consumer.own)
            if choices.below(4) == 0:
                ring.prefetch(consumer.side, consumer.own)
            consumer.take(1 + choices.below(capacity), bool(choices.below(2)))
            assert consumer.taken == list(range(1, len(consumer.taken) + 1)), f"lost, twice or out of order: {consumer.taken}"
        while not done:
            machine.step()
        consumer.await_word(lambda: ring.overflowed(consumer.side), lost[0])
        assert consumer.take(1, False) == 0, "a record that nobody sent"
        done.append(True)
        if not producer_creates:
            ring.retire(consumer.side)
        while not ring.restarted(consumer.side, consumer.own):
            pass

    done: list[bool] = []
    machine.start(produce)
    machine.start(consume)
    machine.run()


def check_doorbell(ring: Ring, pair: Pair, choices: Choices) -> None:
    """A consumer woken by the doorbell after `settle` finds all that was sent before; each transaction is applied or stale, and answered once."""
    machine = StrictMachine(choices)
    memory, answers = machine.memory(ring.words(8)), machine.memory(ring.words(8))
    agent, host = (Peer(ring, memory.side(mapping)) for mapping in pair)
    answered, answering = Peer(ring, answers.side(pair[0])), Peer(ring, answers.side(pair[1]))
    bell, rounds, sequence, applied = Doorbell(machine), 4, [0], []

    def decide() -> None:
        agent.join(True)
        answered.join(False)
        for turn in range(rounds):
            decisions = [8 * (turn + 1) + k for k in range(1 + choices.below(3))]
            assert agent.send(decisions, len(decisions) == 1) == len(decisions)
            ring.settle(agent.side)
            bell.ring()
            while len(answered.taken) < len(agent.sent):
                answered.take(8, False)
            assert [answer >> 1 for answer in answered.taken] == agent.sent, "each decision is answered once, in order"

    def apply() -> None:
        ring.create(host.side, 8, VERSION, SUBSYSTEM, GENERATION)
        ring.create(answering.side, 8, VERSION, SUBSYSTEM, GENERATION)
        host.join(False)
        answering.join(True)
        host.await_word(lambda: ring.joins(host.side, ring.PRODUCERS_AT), 1)
        for _ in range(rounds):
            bell.wait()
            sequence[0] += choices.below(2)
            told, took = list(agent.sent), host.take(8, False)
            assert took and host.taken == told, f"kicked for {told}, found {host.taken}"
            for decision in host.taken[-took:]:
                fresh = decision // 8 > sequence[0]
                applied.extend([decision] if fresh else [])
                answering.send([decision << 1 | fresh], True)
        ring.settle(answering.side)

    machine.start(decide)
    machine.start(apply)
    machine.run()
    assert applied == [answer >> 1 for answer in answered.taken if answer & 1], "applied what was answered as stale, or not what was committed"


def check_crash(ring: Ring, pair: Pair, choices: Choices) -> None:
    """A producer or consumer may die anywhere and another follow: published records stay, unfinished vanish, taken ones may come again."""
    capacity = choices.among((4, 8))
    machine = StrictMachine(choices)
    memory = machine.memory(ring.words(capacity))
    sides = [memory.side(mapping) for mapping in pair]
    first, second, consumer, heir = (Peer(ring, side) for side in (sides[0], sides[0], sides[1], sides[1]))
    producer_dies, when, total, lost = choices.below(2), 20 + choices.below(250), 2 * capacity, [0, 0]

    def produce(peer: Peer, offset: int, end: int) -> Callable[[], None]:
        def run() -> None:
            peer.join(True)
            while len(peer.sent) < end:
                batch = list(range(offset + len(peer.sent) + 1, offset + min(end, len(peer.sent) + 1 + choices.below(capacity)) + 1))
                lost[0] += len(batch) - peer.send(batch, False)
            finished.append(peer)

        return run

    def consume(peer: Peer, until: Callable[[], bool]) -> Callable[[], None]:
        def run() -> None:
            peer.join(False)
            while not until():
                peer.take(1 + choices.below(capacity), bool(choices.below(2)))
            finished.append(peer)

        return run

    finished: list[Peer] = []
    sides[0].memory.machine.orderly = True
    ring.create(sides[0], capacity, VERSION, SUBSYSTEM, GENERATION)
    sides[0].drain_flushed()
    machine.orderly = False
    last = 1000 + total if producer_dies else total
    producing = machine.start(produce(first, 0, 10**6 if producer_dies else total))
    consuming = machine.start(consume(consumer, lambda: bool(consumer.taken) and consumer.taken[-1] == last))

    def reap() -> None:
        while machine.steps < when or (producer_dies and not first.own[ring.IDENTITY]) or (not producer_dies and not consumer.own[ring.IDENTITY]):
            machine.step()
        if producer_dies:
            lost[1] = lost[0]
            machine.kill(producing, sides[0])
            produce(second, 1000, total)()
        elif consumer not in finished:
            machine.kill(consuming, sides[1])
            consume(heir, lambda: bool(heir.taken) and heir.taken[-1] == last)()

    machine.start(reap)
    machine.run()
    if producer_dies:
        old = [number for number in consumer.taken if number < 1000]
        assert old == list(range(1, len(old) + 1)) and len(old) >= len(first.sent), f"{first.sent} was sent, {old} came"
        assert consumer.taken[len(old) :] == list(range(1001, 1001 + total)), f"the second producer's records: {consumer.taken}"
        sides[0].drain_all()
        assert first.joined + second.joined <= ring.joins(sides[0], ring.PRODUCERS_AT) <= 2
        assert second.own[ring.LOST] >= lost[1], "the count of overflows went back"
    elif heir.taken:
        start = heir.taken[0]
        assert heir.taken == list(range(start, total + 1))
        died_at = int(consumer.own[ring.NEXT])
        assert died_at - max(1, capacity // 4) < start <= died_at + 1, f"it died having taken {died_at}; its heir began with {start}"


def check_prefetch(ring: Ring, pair: Pair, choices: Choices) -> None:
    """After a prefetch that found a record, taking it needs no line transfer; before, the line is seen empty and stale."""
    machine = StrictMachine(Choices(bytes(8)))
    memory = machine.memory(ring.words(4))
    producer, consumer = (Peer(ring, memory.side(mapping)) for mapping in pair)
    ring.create(producer.side, 4, VERSION, SUBSYSTEM, GENERATION)
    ring.settle(producer.side)
    producer.join(True)
    consumer.join(False)
    assert consumer.take(1, True) == 0
    assert producer.send([1 + choices.below(9)], True) == 1
    ring.settle(producer.side)
    assert ring.prefetch(consumer.side, consumer.own)
    before = consumer.side.line_fills
    assert consumer.take(1, True) == 1
    assert consumer.side.line_fills == before and consumer.taken == producer.sent


def check_heartbeat(ring: Ring, pair: Pair, choices: Choices) -> None:
    """Signs of life come through although no record does, in order, and a new ring has had none."""
    machine = StrictMachine(choices)
    memory = machine.memory(ring.words(2))
    memory.words[ring.HEARTBEAT_AT] = 99
    producer, consumer = (Peer(ring, memory.side(mapping)) for mapping in pair)
    beats = 1 + choices.below(4)

    def live() -> None:
        ring.create(producer.side, 2, VERSION, SUBSYSTEM, GENERATION)
        producer.join(True)
        for now_ns in range(1, beats + 1):
            ring.beat(producer.side, now_ns)

    def listen() -> None:
        consumer.join(False)
        consumer.await_word(lambda: ring.heartbeat(consumer.side), beats)

    machine.start(live)
    machine.start(listen)
    machine.run()


def check_notice(notice: Notice, pair: Pair, choices: Choices) -> None:
    """Whoever reads a notice has all the words of one that was put up whole, or none; the last one, and that it is gone, is seen."""
    machine = StrictMachine(choices)
    memory = machine.memory(64)
    memory.words[8:] = [99] * 56
    writer, reader = (memory.side(mapping) for mapping in pair)
    n, last, done = 1 + choices.below(20), 2 + choices.below(3), []

    def write() -> None:
        for stamp in range(1, last + 1):
            notice.withdraw(writer, 0)
            notice.post(writer, 0, stamp, [stamp * 100 + k for k in range(n)])
        while not done:
            machine.step()
        notice.withdraw(writer, 0)

    def look() -> None:
        newest = stamp = 0
        while stamp != last:
            stamp, words = notice.read(reader, 0, n)
            assert words == [stamp * 100 + k for k in range(n)] if stamp else words == []
            assert stamp == 0 or stamp >= newest
            newest = max(newest, stamp)
        done.append(True)
        while notice.stamp_of(reader, 0):
            pass

    machine.start(write)
    machine.start(look)
    machine.run()


def check_beat(notice: Notice, pair: Pair, choices: Choices) -> None:
    """The newest sign of life comes, and none goes back."""
    machine = StrictMachine(choices)
    memory = machine.memory(8)
    writer, reader = (memory.side(mapping) for mapping in pair)
    beats, seen = 1 + choices.below(4), [0]

    def live() -> None:
        for value in range(1, beats + 1):
            notice.beat(writer, 3, value)

    def listen() -> None:
        while (value := notice.beat_of(reader, 3)) != beats:
            assert value >= seen[-1]
            seen.append(value)

    machine.start(live)
    machine.start(listen)
    machine.run()


CHECKS = {the_ring: [check_stream, check_doorbell, check_crash, check_prefetch, check_heartbeat], the_notice: [check_notice, check_beat]}
LAWS = [(module, check) for module, checks in CHECKS.items() for check in checks]


def search(check: Callable[[types.ModuleType, Pair, Choices], None], module: types.ModuleType, pair: Pair, examples: int) -> None:
    """Let hypothesis look for choices under which the check fails."""

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.binary(min_size=24, max_size=400))
    def law(data: bytes) -> None:
        check(module, pair, Choices(data))

    law()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name.lower()}-to-{pair[1].name.lower()}")
@pytest.mark.parametrize(("module", "check"), LAWS, ids=[check.__name__[6:] for _, check in LAWS])
def test_the_laws_hold_on_memory_as_unhelpful_as_allowed(module, check, pair):
    search(check, module, pair, 200)


def barrier_sites(module: types.ModuleType) -> list[tuple[str, int, int]]:
    """Each call of flush, fence and invalidate in the module's source."""
    tree = ast.parse(inspect.getsource(module))
    return [
        (f"{function.name}:{node.func.id}:{node.lineno}", node.lineno, node.col_offset)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("flush", "fence", "invalidate")
    ]


def without(module: types.ModuleType, lineno: int, column: int) -> types.ModuleType:
    """The module with that one call left out."""

    class Leave(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            if (node.lineno, node.col_offset) == (lineno, column):
                return ast.copy_location(ast.Constant(None), node)
            return self.generic_visit(node)

    tree = ast.fix_missing_locations(Leave().visit(ast.parse(inspect.getsource(module))))
    mutant = types.ModuleType("mutant")
    exec(compile(tree, "mutant", "exec"), mutant.__dict__)
    return mutant


def test_there_are_flushes_fences_and_invalidates_to_leave_out():
    kinds = [name.split(":")[1] for name, _, _ in barrier_sites(the_ring)]
    assert kinds.count("flush") >= 8 and kinds.count("fence") >= 3 and kinds.count("invalidate") >= 4
    kinds = [name.split(":")[1] for name, _, _ in barrier_sites(the_notice)]
    assert kinds.count("flush") == 4 and kinds.count("fence") == 2 and kinds.count("invalidate") == 3


SITES = [(module, *site) for module in CHECKS for site in barrier_sites(module)]
THROUGH_A_BAR = [pair for pair in PAIRS if Mapping.BAR in pair]


def breaks(module: types.ModuleType, lineno: int, column: int, pairs: list[Pair]) -> bool:
    """Whether, without that call, a law of the module breaks on memory that the sides map as one of these pairs."""
    mutant = without(module, lineno, column)
    for examples in (10, 40, 150):
        for check, pair in itertools.product(CHECKS[module], pairs):
            try:
                search(check, mutant, pair, examples)
            except (AssertionError, Stuck):
                return True
    return False


@pytest.mark.parametrize(("module", "name", "lineno", "column"), SITES, ids=[name for _, name, _, _ in SITES])
def test_without_this_call_a_law_breaks(module, name, lineno, column):
    assert breaks(module, lineno, column, PAIRS), f"{name} can be left out and no law breaks"


STORES = [site for site in SITES if ":invalidate:" not in site[1]]


@pytest.mark.parametrize(("module", "name", "lineno", "column"), STORES, ids=[name for _, name, _, _ in STORES])
def test_each_flush_and_fence_is_needed_through_a_bar(module, name, lineno, column):
    """Its invalidates are not: what is read through it is not cached."""
    assert breaks(module, lineno, column, THROUGH_A_BAR), f"{name} can be left out and no law breaks"
