# mypy: ignore-errors
"""Runs vidur 0.0.26 on a trace; `bench/serving_speed.py` starts it with the Python of vidur's own environment.

Its wheel has no profile tables, so every operation is given a time of the right order by formula: what is compared is speed, never results.
Arguments: trace (CSV), replicas, chunk of a prefill, largest batch, folder for what vidur writes. Prints one JSON line.
"""

import json
import sys
import time

from vidur.config import (
    ClusterConfig,
    MetricsConfig,
    RandomForrestExecutionTimePredictorConfig,
    ReplicaConfig,
    RoundRobinGlobalSchedulerConfig,
    SarathiSchedulerConfig,
    SimulationConfig,
    TraceRequestGeneratorConfig,
)
from vidur.execution_time_predictor import sklearn_execution_time_predictor as predictor
from vidur.simulator import Simulator


class Formula(dict):
    """A profile table that is filled as it is asked: milliseconds of one operation of one layer."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def __missing__(self, key):
        value = self[key] = self.formula(*key)
        return value


def tables(_self):
    """Times of Llama-3-8B's operations on an H100, of the right order."""
    linear = {
        name: Formula(lambda tokens, share=share: 0.01 + share * tokens * 1e-3)
        for name, share in {"attn_pre_proj": 0.1, "attn_post_proj": 0.07, "mlp_up_proj": 0.45, "mlp_down_proj": 0.22}.items()
    }
    small = {
        name: Formula(lambda tokens: 0.004 + 1e-6 * tokens)
        for name in ("mlp_act", "input_layernorm", "post_attention_layernorm", "attn_rope", "add", "attn_kv_cache_save", "all_reduce", "send_recv")
    }
    attention = {
        "attn_prefill": Formula(lambda cached, chunk: 0.01 + 3e-8 * chunk * (cached + 0.5 * chunk)),
        "attn_decode": Formula(lambda batch, cached: 0.01 + 1.3e-6 * batch * cached),
    }
    return {**linear, **small, **attention}


def main():
    trace, replicas, chunk, cap, out = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
    predictor.SklearnExecutionTimePredictor._load_predictions_from_hf = tables
    config = SimulationConfig(
        log_level="error",
        cluster_config=ClusterConfig(
            num_replicas=replicas,
            replica_config=ReplicaConfig(
                model_name="meta-llama/Llama-3-8B", num_pipeline_stages=1, tensor_parallel_size=1, gpu_memory_utilization=0.9
            ),
            global_scheduler_config=RoundRobinGlobalSchedulerConfig(),
            replica_scheduler_config=SarathiSchedulerConfig(batch_size_cap=cap, chunk_size=chunk),
        ),
        request_generator_config=TraceRequestGeneratorConfig(
            trace_file=trace, date="2023-08-21", prefill_scale_factor=1, decode_scale_factor=1, time_scale_factor=1, max_tokens=131072
        ),
        execution_time_predictor_config=RandomForrestExecutionTimePredictorConfig(
            prediction_max_prefill_chunk_size=chunk, prediction_max_tokens_per_request=131072, cache_dir=f"{out}/cache"
        ),
        metrics_config=MetricsConfig(
            write_metrics=False,
            enable_chrome_trace=False,
            store_plots=False,
            store_request_metrics=False,
            store_batch_metrics=False,
            store_utilization_metrics=False,
            output_dir=out,
        ),
    )
    simulator = Simulator(config)
    with open(trace) as file:
        requests = sum(1 for _ in file) - 1
    batches = 0
    from vidur.events.batch_end_event import BatchEndEvent

    original = BatchEndEvent.handle_event

    def count(self, *arguments):
        nonlocal batches
        batches += 1
        return original(self, *arguments)

    BatchEndEvent.handle_event = count
    begin = time.process_time()
    simulator.run()
    print(json.dumps({"requests": requests, "iterations": batches, "cpu_s": time.process_time() - begin, "virtual_s": simulator._time}))


main()
