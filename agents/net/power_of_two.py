from waveos import net
from waveos.policy import Policy, array, jitable


@jitable
def draw(self, n):
    """A number of 0..n-1: the same sequence in every run (a 31-bit linear congruential generator, its high bits)."""
    self.seed[0] = (self.seed[0] * 1_103_515_245 + 12_345) % 2_147_483_648
    return (self.seed[0] // 65_536) % n


class PowerOfTwo(Policy, subsystem=net, name="power_of_two"):
    """To the shorter of two queues picked at random (Mitzenmacher 1996)."""

    seed = array(1)

    def request_arrived(self, msg, txns):
        a, b = draw(self, self.cpus), draw(self, self.cpus)
        net.steer(txns, request=msg.request, worker=a if net.depth(txns, a) <= net.depth(txns, b) else b)
