"""A serving engine that does what it is told at once, when the test says so; and decisions as records."""

from __future__ import annotations

import numpy as np

from waveos import serving
from waveos.outcome import Outcome
from waveos.policy.plain import Txns
from waveos.serving.mechanism import Mechanism


class Hand:
    """An `Engine` moved by hand."""

    def __init__(self):
        self.transfers, self.batches, self.dropped, self.placed, self.recovered, self.freed = [], [], [], [], [], []

    def move(self, transfer):
        self.transfers.append(transfer)

    def stop(self, transfer):
        self.stopped = transfer

    def free(self, instance, block, tier):
        self.freed.append((block.id, tier))

    def run(self, batch):
        self.batches.append(batch)

    def drop(self, request):
        self.dropped.append(request)

    def place(self, instance, placement):
        self.placed.append(placement)

    def recover(self, instance, recovery, running):
        self.recovered.append((recovery, list(running)))


class Host:
    """A mechanism over a `Hand`, with shorthands."""

    def __init__(self, device=1_000, host=10_000, storage=0):
        self.engine = Hand()
        self.mechanism = Mechanism(self.engine)
        self.mechanism.add_instance(0, 1, device, host, storage)
        self.instance = self.mechanism.instances[0]
        self.told = []

    def arrive(self, number, blocks, size=100, outputs=10):
        self.mechanism.arrive(number, size * len(blocks), outputs, blocks, [size] * len(blocks))

    def order(self, *orders):
        """Each is a function of txns; all are committed at once, in order; the outcome of each record."""
        txns = Txns(serving)
        for each in orders:
            each(txns)
        for made in txns.ordered:
            for row in made:
                request = self.mechanism.requests.get(int(row["request"]))
                row["seq"] = request.seq if request else -1
        return self.commit(np.concatenate(txns.ordered))

    def commit(self, decisions):
        self.messages()
        self.mechanism.commit(decisions)
        out = [row for row in self.messages() if row["type"] == serving.Message.TXN_OUTCOME]
        return [Outcome(int(row["outcome"])).name for row in np.array(out, serving.MESSAGE).view(serving.OUTCOME)] if out else []

    def messages(self):
        """What was said since, kept by name in `told`."""
        made = self.mechanism.take_messages()
        self.told += [serving.Message(int(row["type"])).name for row in made]
        return list(made)

    def batch(self, *parts, cache_seq=0):
        return self.order(lambda txns: serving.form_batch(txns, 0, parts, cache_seq))

    def run_batch(self):
        """The engine begins and ends the staged batch; requests that are complete decode and end at once."""
        batch = self.engine.batches[-1]
        self.mechanism.batch_started(batch)
        for transfer in batch.transfers:
            if not transfer.done:
                self.mechanism.transfer_done(transfer)
        for request in self.mechanism.batch_done(batch):
            self.mechanism.request_done(request)

    def serve(self, number, blocks, begin=0):
        """A request from its arrival to its end."""
        self.arrive(number, blocks)
        assert self.batch((number, begin, 100 * len(blocks) - begin)) == ["COMMITTED"] * 2
        self.run_batch()

    def account(self):
        """Device memory counted from what is there, and as it is kept."""
        held = sum(block.tokens for block in self.instance.blocks.values() if block.tiers & serving.Tier.DEVICE or block.transfer)
        reserved = sum(request.reserved for request in self.mechanism.requests.values())
        tier = int(serving.Tier.DEVICE)
        return self.instance.capacity[tier] - held - reserved, self.instance.free[tier]
