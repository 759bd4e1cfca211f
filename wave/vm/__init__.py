"""Scenarios of virtual machines: scheduling (`waveos.sched`) on a host whose cores have siblings, sleep states and turbo bins."""
