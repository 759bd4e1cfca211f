"""The emulated engine: iterations taken together last as long as one by one, layers overlap loads, and every request is served by every policy."""

from __future__ import annotations

import numpy as np
import pytest

from waveos.bench import strata as bench
from waveos.errors import ConfigError
from waveos.ipu_emulator.gpu import load_gpu, load_model
from waveos.ipu_emulator.serving.cost import Costs, DataPlane, Sharding, load_constants
from waveos.ipu_emulator.serving.node import Clock, Node
from waveos.ipu_emulator.serving.simulate import Setup, Simulation, load_system, load_systems, simulate
from waveos.ipu_emulator.serving.workload import Ask, Workload, make_workload
from waveos.serving import Placement

S = 1_000_000_000


def costs(model="llama-3.1-8b", ranks=1, placement=Placement.HYBRID, gpu="h200", **plane):
    shape = load_model(model)
    return Costs(load_gpu(gpu), shape, Sharding(shape.kv_heads, ranks, placement), DataPlane(**plane), load_constants())


def alone(asks, system="strata-io", **more):
    return simulate(Setup(load_system(system), **more), Workload("made by hand", asks))


@pytest.mark.parametrize(("requests", "context"), [(1, 10), (7, 900), (40, 20_000), (400, 30)])
def test_a_run_of_iterations_lasts_as_long_as_its_iterations_one_by_one(requests, context):
    node = Node(Clock(), [costs()], [0])
    executor = node.executors[0]
    executor.decoding, executor.kv_tokens = requests, requests * context
    singles = 0
    for _ in range(50):
        singles += node._run_ns(executor, 1)
        executor.kv_tokens += requests
    executor.kv_tokens = requests * context
    assert node._run_ns(executor, 50) == pytest.approx(singles, abs=60)


@pytest.mark.parametrize("steps", [1, 3, 17, 50])
def test_the_number_of_iterations_by_a_time_is_the_smallest_that_reaches_it(steps):
    node = Node(Clock(), [costs()], [0])
    executor = node.executors[0]
    executor.decoding, executor.kv_tokens, executor.steps = 5, 4_000, 50
    assert node._steps_by(executor, node._run_ns(executor, steps)) == steps
    assert node._steps_by(executor, node._run_ns(executor, steps) + 1) == min(50, steps + 1)


def test_a_batch_that_overlaps_its_load_ends_when_the_slowest_layer_does():
    """The closed form against the pipeline layer by layer."""
    shared, own = [1, 2, 3, 4], [9]
    first = Ask(0, 4 * 2_048 + 100, 1, [*shared, 8], [2_048] * 4 + [100])
    second = Ask(60 * S, 4 * 2_048 + 100, 1, [*shared, *own], [2_048] * 4 + [100])
    simulation = Simulation(Setup(load_system("sglang-hicache")), Workload("two", [first, second]))
    simulation.clock.at(30 * S, lambda: _drop_device(simulation))
    result = simulation.run()
    batch = result.batches[-1]
    assert batch.loaded == 4 * 2_048
    table = simulation.node.executors[0].costs
    layers, begin = table.model.layers, 0.0
    compute, load = table.prefill_s([(8_192 - 8_192 % 32, 100)]), table.load_s(8_192)
    for layer in range(layers):
        begin = max(begin, load * (layer + 1) / layers) + compute / layers
    assert (batch.end_ns - batch.begin_ns) / S == pytest.approx(begin, rel=0.02)


def _drop_device(simulation):
    """Take everything from the device behind the policy's back, as a loss."""
    from waveos.serving import Tier

    simulation.mechanism.now_ns = simulation.clock.now_ns
    simulation.mechanism.lose(0, list(simulation.mechanism.instances[0].blocks), Tier.DEVICE)


@pytest.mark.parametrize("system", sorted(load_systems()))
def test_every_system_serves_every_request_to_its_last_token(system):
    workload = make_workload("loogle", 5.0, load_constants().fitted, queries=150)
    result = simulate(Setup(load_system(system), in_flight=64), workload)
    assert result.requests == 150
    assert result.output_tokens == sum(ask.outputs for ask in workload.asks)
    assert result.stale == 0


@pytest.mark.parametrize("policy", ["strata", "strata-io"])
def test_kv_that_is_lost_in_mid_run_makes_batches_stale_and_no_request_suffers(policy):
    workload = make_workload("loogle", 8.0, load_constants().fitted, queries=120)
    simulation = Simulation(Setup(load_system(policy), in_flight=64), workload)
    answered, seen = simulation._answered, []

    def lose_before_it_arrives(decisions):
        """Every third time, KV is lost while decisions that build on it are on their way."""
        seen.append(len(decisions))
        if len(seen) % 3 == 0:
            _drop_device(simulation)
        answered(decisions)

    simulation._answered = lose_before_it_arrives
    result = simulation.run()
    assert result.requests == 120
    assert result.output_tokens == sum(ask.outputs for ask in workload.asks)
    assert simulation.mechanism.instances[0].cache_seq > 100
    assert result.stale > 0


def test_equal_seeds_give_equal_runs():
    runs = [
        simulate(Setup(load_system("strata"), in_flight=32), make_workload("reviewmt", 2.0, load_constants().fitted, queries=80, seed=3))
        for _ in range(3)
    ]
    assert all(np.array_equal(each.ttft_s, runs[0].ttft_s) and each.batches == runs[0].batches for each in runs)


def test_a_burst_on_a_new_context_is_computed_once_with_deferral_and_more_often_without():
    context, sizes = [1, 2, 3, 4], [2_048] * 4
    asks = [Ask(number, 8_292, 4, [*context, 100 + number], [*sizes, 100]) for number in range(12)]
    computed = {name: sum(batch.computed for batch in alone(asks, name).batches) for name in ("strata", "strata-io")}
    assert computed["strata"] == 8_192 + 12 * 100
    assert computed["strata-io"] > 2 * 8_192


def _behind_a_long_prompt(**params):
    """Seconds to the first token of a question on a known context that arrives while another, longer prompt is computed, and of that prompt."""
    system = load_system("strata")
    system = system.model_copy(update={"params": {**system.params, **params}})
    long = [2_048] * 20
    asks = [
        Ask(0, 4_196, 2, [1, 2, 10], [2_048, 2_048, 100]),
        Ask(60 * S, 2_048 * 20, 2, [100 + at for at in range(20)], long),
        Ask(60 * S + S // 100, 4_196, 2, [1, 2, 11], [2_048, 2_048, 100]),
    ]
    simulation, first = Simulation(Setup(system), Workload("made by hand", asks)), {}
    simulation.node.on_first = lambda request, now_ns: first.setdefault(request.number, (now_ns - asks[request.number].at_ns) / S)
    simulation.run()
    return first[2], first[1]


def test_a_question_on_a_known_context_joins_the_batches_of_a_long_prompt():
    question, prompt = _behind_a_long_prompt()
    assert question < 0.6 * prompt
    question, alone = _behind_a_long_prompt(chunk_share=1.0)  # where the prompt keeps all of every batch it comes after it
    assert question > 0.9 * alone
    assert prompt < 1.05 * alone


def test_the_prompt_that_others_join_keeps_its_share_of_every_batch():
    asks = [Ask(0, 3 * 8_192, 1, list(range(1, 13)), [2_048] * 12)]
    asks += [Ask(1 + number, 1_000, 1, [100 + number], [1_000]) for number in range(30)]
    simulation = Simulation(Setup(load_system("strata")), Workload("made by hand", asks))
    told = []
    run = simulation.node.run
    simulation.node.run = lambda batch: (told.append([(part.request.number, part.tokens) for part in batch.parts]), run(batch))
    result = simulation.run()
    assert result.requests == 31
    chunks = [dict(parts) for parts in told if parts[0][0] == 0]
    assert all(parts[0] >= 4_096 for parts in chunks[:-1]) and len(chunks) > 3


def test_a_client_that_may_open_no_more_requests_stops_its_clock():
    """Two at a time: what could not be sent is not made up for, the gaps between arrivals stay."""
    asks = [Ask(number * S, 100, 4_000, [number + 1], [100]) for number in range(4)]
    asks += [Ask(5 * S, 100, 2, [9], [100])]
    sent = {}
    simulation = Simulation(Setup(load_system("strata"), in_flight=2), Workload("made by hand", asks))
    arrive = simulation.mechanism.arrive
    simulation.mechanism.arrive = lambda number, *rest: (sent.setdefault(number, simulation.clock.now_ns), arrive(number, *rest))
    simulation.run()
    assert sent[0] == 0 and sent[1] == S and sent[2] > 10 * S  # the third waits until the first has its 4,000 tokens
    assert sent[4] - sent[3] >= 2 * S
    free = simulate(Setup(load_system("strata")), Workload("made by hand", asks))
    assert free.requests == 5


def test_a_request_too_long_for_the_pool_is_refused_and_the_others_are_served():
    asks = [Ask(0, 500, 5, [1], [500]), Ask(1, 3_000_000, 5, [2], [3_000_000]), Ask(2, 600, 5, [3], [600])]
    result = alone(asks)
    assert (result.requests, result.refused) == (2, 1)


def test_a_model_that_does_not_fit_is_one_clear_line():
    with pytest.raises(ConfigError, match=r"llama-3.1-405b on 1 x h200 does not fit: weights take 754 GiB of each GPU's 131; use more ranks"):
        simulate(Setup(load_system("strata"), model="llama-3.1-405b"), Workload("none", []))


@pytest.mark.parametrize(("option", "value"), [("queries", -5), ("queries", 3), ("ranks", -1), ("ttft_s", -1.0)])
def test_the_benchmark_refuses_what_cannot_be_in_one_line(option, value):
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} {value}: at least"):
        bench.run(model="llama-3.1-8b", **{option: value})


def test_hardware_without_wires_is_one_clear_line():
    with pytest.raises(ConfigError, match="has no wires"):
        simulate(Setup(load_system("strata"), gpu="xpu-hbm4"), Workload("none", []))


def test_copies_of_a_page_cost_what_the_paper_measured():
    """8,192 tokens of Llama-8B in pages of 32: 16,384 copies of 64 KiB; under load 10.8 GB/s by DMA and 40.3 by kernel, whatever the page."""
    by_page = {page: 8_192 * 131_072 / costs(mover="dma", page=page).load_s(8_192) / 1e9 for page in (1, 32, 512)}
    assert by_page[32] == pytest.approx(10.8, rel=0.02)
    assert by_page[1] < 1 < 10 < by_page[512] / 4 < 64
    assert {round(8_192 * 131_072 / costs(page=page).load_s(8_192) / 1e9, 1) for page in (1, 32, 512)} == {40.3}
    assert 8_192 * 131_072 / costs(gpu="gh200").load_s(8_192) / 1e9 == pytest.approx(150.5, rel=0.01)
