"""Looking on: what the daemons of this machine are doing, for people (`wave top`), for Prometheus (`wave metrics`) and for Perfetto (`wave trace --live`).

Nothing here runs in a daemon. Hot paths keep plain counters and histograms in shared memory; hostd and agentd tell them when they are asked, and all that
is made of them is made in the process that asks.
"""
