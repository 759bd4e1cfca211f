from waveos import memory
from waveos.policy import Param, Policy


class Static(Policy, subsystem=memory, name="static", compiled=False):
    """One limit, set once, as an operator would by hand; 0 sets none. The kernel picks what goes."""

    limit_mib: Param = 0

    def start(self):
        self.told = False

    def region_mapped(self, msg, txns):
        if self.limit_mib and not self.told:
            memory.limit(txns, int(self.limit_mib * 2**20))
        self.told = True
