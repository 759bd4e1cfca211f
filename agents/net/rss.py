from waveos import net
from waveos.policy import Policy


class Rss(Policy, subsystem=net, name="rss"):
    """By the hash of the flow, as network cards do: a worker may have many requests while its neighbour has none."""

    def request_arrived(self, msg, txns):
        net.steer(txns, request=msg.request, worker=msg.flow % self.cpus)
