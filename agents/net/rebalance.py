from waveos import net
from waveos.policy import Param, Policy, array

ENTRIES = 256


class Rebalance(Policy, subsystem=net, name="rebalance"):
    """Over the kernel's steering table: a worker whose queue is `difference` longer than the shortest gives `step` entries to that one.

    For paths whose packets the agent does not see; queue_depth is all that it knows. An entry that nobody was given is the kernel's hash.
    """

    difference: Param = 8
    step: Param = 16

    owner = array(ENTRIES)  # worker + 1; 0: the kernel's choice
    cursor = array(1)

    def queue_depth(self, msg, txns):
        to = net.shallowest(txns, self.cpus)
        if to >= 0 and msg.depth >= net.depth(txns, to) + self.difference:
            moved = 0
            for _ in range(ENTRIES):
                i = self.cursor[0]
                self.cursor[0] = (i + 1) % ENTRIES
                if moved < self.step and (self.owner[i] == msg.worker + 1 or self.owner[i] == 0):
                    self.owner[i] = to + 1
                    moved += 1
                    net.set_entry(txns, index=i, worker=to)

    def worker_gone(self, msg, txns):
        for i in range(ENTRIES):
            if self.owner[i] == msg.worker + 1:
                self.owner[i] = 0  # the host has taken its entries back already
