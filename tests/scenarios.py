"""Scenarios that more than one test runs."""

TINY = """\
name = "tiny"
[host]
workers = 2
[agent]
message_ns = 40
[workload]
loads_per_s = [100000]
[[workload.classes]]
name = "GET"
service = { fixed_us = 10 }
[run]
duration_ms = 2
warmup_ms = 0
replications = 1
"""
