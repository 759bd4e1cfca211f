from waveos import net
from waveos.policy import Policy, array


class RoundRobin(Policy, subsystem=net, name="net_round_robin"):
    """To each worker in turn."""

    turn = array(1)

    def request_arrived(self, msg, txns):
        self.turn[0] = (self.turn[0] + 1) % self.cpus
        net.steer(txns, request=msg.request, worker=self.turn[0])
