"""When a GPU dies: what runs goes on or begins anew, nothing is lost, and heads are dealt evenly."""

from __future__ import annotations

import pytest

from waveos.errors import ConfigError
from waveos.ipu_emulator.serving.cost import Sharding
from waveos.ipu_emulator.serving.faults import bundled_fault_trace, deal, read_fault_trace
from waveos.ipu_emulator.serving.simulate import Setup, Simulation, load_system
from waveos.ipu_emulator.serving.workload import Workload, bundled_trace, read_mooncake
from waveos.serving import Placement, Recovery

S = 1_000_000_000


def simulation(requests=40, system="failsafe", **params):
    chosen = load_system(system)
    chosen = chosen.model_copy(update={"params": {**chosen.params, **params}})
    asks = read_mooncake(bundled_trace(), requests).asks
    return Simulation(Setup(chosen, "h100", "llama-3.1-70b", 8), Workload("mooncake", asks))


@pytest.mark.parametrize("recovery", list(Recovery))
@pytest.mark.parametrize("at_s", [0.3, 2.05, 9.77])
def test_every_request_ends_with_all_its_tokens_whenever_a_gpu_dies(recovery, at_s):
    run = simulation(recovery=float(recovery))
    run.clock.at(round(at_s * S), run.node.fail, 0, 3)
    result = run.run()
    assert result.output_tokens == sum(ask.outputs for ask in run.workload.asks)
    assert run.node.executors[0].costs.sharding.ranks == 7


def test_three_of_eight_may_die_and_come_back():
    run = simulation()
    for number, at_s in enumerate((2, 3, 4)):
        run.clock.at(at_s * S, run.node.fail, 0, number)
    for number, at_s in enumerate((8, 9, 10)):
        run.clock.at(at_s * S, run.node.come_back, 0, number)
    result = run.run()
    assert result.output_tokens == sum(ask.outputs for ask in run.workload.asks)
    assert run.node.executors[0].costs.sharding == Sharding(8, 8, Placement.HYBRID)


def test_a_baseline_computes_everything_again_and_serves_everything():
    run = simulation(system="tensor-parallel")
    run.clock.at(5 * S, run.node.fail, 0, 0)
    result = run.run()
    assert result.output_tokens == sum(ask.outputs for ask in run.workload.asks)
    assert sum(batch.computed for batch in result.batches) > result.prompt_tokens - result.hit_tokens


def test_the_pool_of_the_survivors_is_accounted_for_to_the_last_token():
    run = simulation()
    run.clock.at(5 * S, run.node.fail, 0, 0)
    run.run()
    instance = run.mechanism.instances[0]
    held = sum(block.tokens for block in instance.blocks.values() if block.tiers & 1)
    assert instance.capacity[1] - held == instance.free[1]


def test_the_loss_of_the_last_gpu_is_one_clear_line():
    run = simulation()
    for number in range(8):
        run.clock.at(2 * S + number, run.node.fail, 0, number)
    with pytest.raises(ConfigError, match="instance 0 has lost its last GPU"):
        run.run()


@pytest.mark.parametrize(("ranks", "straggler"), [(3, 1.125), (4, 1.0), (5, 1.25), (6, 1.5), (7, 1.75), (8, 1.0)])
def test_uneven_heads_cost_what_the_closed_form_says_and_hybrid_attention_nothing_when_homes_are_even(ranks, straggler):
    assert Sharding(8, ranks, Placement.STATIC).attention_share(1 / ranks) * ranks == pytest.approx(straggler)
    assert Sharding(8, ranks, Placement.STATIC).memory_share() * ranks == pytest.approx(straggler)
    assert Sharding(8, ranks, Placement.CYCLIC).memory_share() * ranks == pytest.approx(1)
    assert Sharding(8, ranks, Placement.HYBRID).attention_share(1 / ranks) * ranks == pytest.approx(1)


def test_a_fault_trace_is_dealt_to_nodes_as_many_as_it_says():
    trace = read_fault_trace(bundled_fault_trace())
    assert max(each.gpus for each in trace) == 64
    for (at_s, nodes), each in zip(deal(trace, 8, 8, seed=1), trace, strict=True):
        assert (at_s, sum(nodes)) == (each.at_s, each.gpus)
        assert all(0 <= alive <= 8 for alive in nodes)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("2021-12-11, 11:11:30, 5\n2021-12-11, 11:11:00, 4\n", "2: time goes back"),
        ("2021-12-11, 11:11:30, five\n", "1: '2021-12-11, 11:11:30, five'; wanted"),
        ("0,add,a\n5,remove,a\n9,remove,b\n", "3: fewer than no GPUs are alive"),
        ("", "at least two lines"),
        ("inf,add,a\n", "1: 'inf,add,a'; wanted"),
        ("0,add,a\nnan,add,b\n", "2: 'nan,add,b'; wanted"),
        ("0,add,a\n1e300,add,b\n", "2: '1e300,add,b'; wanted"),
    ],
)
def test_a_broken_fault_trace_names_its_line(tmp_path, text, line):
    path = tmp_path / "faults.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=line):
        read_fault_trace(path)
