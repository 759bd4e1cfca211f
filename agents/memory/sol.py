"""`sol`: which page batches are cold, learned while running, with safeguards around what was learned.

The shape is that of SOL (safe on-node learning, ASPLOS 2022): a model loop and an actuator loop, each with its own timer, that share predictions only, and
four safeguards, each a method that a subclass may override: `validate` (is the data sound?), `assess_model` (did the last predictions come true?),
`assess_performance` (does the application suffer?) and `default_action` (what is safe to do when one of them says no).
"""

from __future__ import annotations

import numpy as np

from waveos import memory
from waveos.agents.memory import posteriors
from waveos.agents.memory.batches import Batches, Quota
from waveos.policy import Param, Policy

TICK, ACT, ASSESS, EPOCH = 0, 1, 2, 3
"""The timers: scan what is due; act on predictions; look at both loops; let what was learned fade."""
MOST_PATIENCE = 4


class Sol(Policy, subsystem=memory, name="sol", compiled=False):
    """Learns how often to look at each page batch (Thompson sampling over periods of 0.3 to 9.6 s), and reclaims what stays cold.

    Model loop, every `tick_ms`: scan the batches that are due; each answer updates the posterior of the period it was scanned at, and draws the next.
    A batch is predicted cold once it was not touched for `cold_ms`, and for twice as long each time such a prediction was wrong.
    Actuator loop, every `act_ms`: reclaim what is predicted cold, within the quota, unless a safeguard has stopped it.
    """

    tick_ms: Param = 300
    act_ms: Param = 2_400
    assess_ms: Param = 2_400
    epoch_ms: Param = 38_400
    cold_ms: Param = 9_600
    quota_share_per_s: Param = 0.05
    scan_cost_share: Param = 0.5
    wrong_share: Param = 0.1
    stall_share: Param = 0.05
    seed: Param = 1

    def start(self):
        self.batches = Batches(
            counts=f"({2 * posteriors.ARMS},)u1",
            arm="u1",
            idle="u4",
            due="u4",
            last="u4",
            asked="?",
            resident="?",
            patience="u1",
            reclaimed="u4",
            shadow="?",  # what was predicted cold at the last assessment
            came="?",  # back by a touch since then
        )
        self.quantiles, self.weights = posteriors.table(), posteriors.weights(self.scan_cost_share)
        self.quota = Quota(self.quota_share_per_s)
        self.allowed_stall = self.stall_share
        self.tick, self.ticking = 0, False
        self.stopped_until, self.offences = 0, 0
        self.stall_us, self.wrong, self.seen, self.suspicious = 0, 0, 0, 0
        self.stops: list[tuple[int, str]] = []  # (agent's clock, why): what the safeguards did
        self._learn(np.zeros(0, bool), np.zeros(0, bool))  # what is compiled is compiled before a host waits for it

    # What the host tells.

    def region_mapped(self, msg, txns):
        of = self.batches
        places = of.map(msg)
        n = places.stop - places.start
        of.resident[places] = True
        of.counts[places] = 1
        of.arm[places] = posteriors.ARMS - 1
        of.last[places] = self.tick
        of.due[places] = self.tick + 1 + np.arange(n) % (1 << (posteriors.ARMS - 1))  # spread, so that ticks cost alike
        if not self.ticking:
            self.ticking = True
            for timer, period_ms in ((TICK, self.tick_ms), (ACT, self.act_ms), (ASSESS, self.assess_ms), (EPOCH, self.epoch_ms)):
                txns.wake_after(int(period_ms * 1e6), timer)

    def region_unmapped(self, msg, txns):
        self.batches.unmap(msg)

    def budget_changed(self, msg, txns):
        self.quota.allowed_bytes_per_s = msg.bytes
        self.allowed_stall = min(self.stall_share, msg.stall_us * 1e-6)

    def accessed(self, msgs, txns):
        self.batches.hear(msgs)

    def refaulted(self, msgs, txns):
        of = self.batches
        back = of.named(msgs)
        self.wrong += int((back & of.shadow).sum())
        of.shadow &= ~back
        of.came |= back
        soon = back & ~of.resident & ((self.tick - of.reclaimed) * self.tick_ms < self.epoch_ms)
        of.patience[soon] = np.minimum(of.patience[soon] + 1, MOST_PATIENCE)
        self._return(back)

    def pressure(self, msg, txns):
        self.stall_us += msg.stall_us

    def txn_failed(self, msgs, txns):
        """What could not be scanned is asked again; what could not be reclaimed is resident."""
        for decision, of in ((memory.Decision.SCAN, self._ask_again), (memory.Decision.RECLAIM, self._return)):
            about = msgs[msgs["decision"] == decision]
            if len(about):
                of(self.batches.named(about))

    def batch_end(self, msg, txns):
        of = self.batches
        scanned, touched = of.take()
        scanned &= of.asked
        if not scanned.any():
            return
        of.asked &= ~scanned
        if not self.validate(scanned, touched & scanned):
            self._ask_again(scanned)
            return
        touched &= scanned
        seen = scanned & of.shadow
        self.wrong += int((seen & touched).sum())
        self.seen += int(seen.sum())
        of.shadow &= ~(seen & touched)
        self._learn(scanned, touched)

    def timer_expired(self, msg, txns):
        if msg.seq == TICK:
            self._scan(txns)
        elif msg.seq == ACT:
            self._act(txns, msg.time_ns)
        elif msg.seq == ASSESS:
            self._assess(txns, msg.time_ns)
        else:
            self._fade()
        period_ms = (self.tick_ms, self.act_ms, self.assess_ms, self.epoch_ms)[msg.seq]
        txns.wake_after(int(period_ms * 1e6), msg.seq)

    # The model loop.

    def _scan(self, txns):
        of = self.batches
        self.tick += 1
        words = np.zeros(len(of) // memory.GROUP, np.uint64)
        posteriors.due_words(of.due, self.tick, words)
        due = np.unpackbits(words.view(np.uint8), bitorder="little").view(bool) & of.resident & of.live
        of.asked |= due
        of.due[due] = posteriors.NOT_DUE
        memory.scan(txns, *of.where(due))

    def _learn(self, scanned, touched):
        of = self.batches
        posteriors.learn(
            np.packbits(scanned, bitorder="little").view(np.uint64),
            np.packbits(touched, bitorder="little").view(np.uint64),
            self.tick,
            int(self.seed),
            of.counts,
            of.arm,
            of.idle,
            of.due,
            of.last,
            self.quantiles,
            self.weights,
        )

    def predict(self):
        """The batches that are believed cold, as one truth value each."""
        of = self.batches
        untouched_ms = of.idle * np.float32(self.tick_ms)
        return of.live & (untouched_ms >= self.cold_ms * (1 << of.patience.astype(np.uint32)))

    def _fade(self):
        """After an epoch, a batch that was not wrongly reclaimed in it gets some trust back."""
        of = self.batches
        calm = (of.patience > 0) & ((self.tick - of.reclaimed) * self.tick_ms >= self.epoch_ms)
        of.patience[calm] -= 1

    # The actuator loop.

    def _act(self, txns, now_ns):
        if now_ns < self.stopped_until:
            return
        of = self.batches
        cold = self.quota.choose(of, self.predict() & of.resident, now_ns, order=of.idle)
        if not cold.any():
            return
        memory.reclaim(txns, *of.where(cold), quota_bytes=memory.GROUP * int(of.bytes.max()))
        of.resident[cold], of.due[cold], of.asked[cold] = False, posteriors.NOT_DUE, False
        of.reclaimed[cold] = self.tick

    # The safeguards.

    def validate(self, scanned, touched):
        """Data validation: False discards an answer. Here: that nothing was touched where much was hot is not believed until it was said three times."""
        hot = scanned & (self.batches.idle == 0)
        if int(hot.sum()) >= memory.GROUP and not touched.any():
            self.suspicious += 1
            return self.suspicious >= 3
        self.suspicious = 0
        return True

    def assess_model(self):
        """Model assessment: of what was predicted cold at the last assessment and seen since, did too much turn out hot? Says why, or ""."""
        if self.seen >= memory.GROUP and self.wrong > self.wrong_share * self.seen:
            return f"{self.wrong} of {self.seen} batches predicted cold were touched"
        return ""

    def assess_performance(self):
        """Actuator safeguard: does the application stall on memory for more than it is allowed? Says why, or ""."""
        share = self.stall_us / (1e3 * self.assess_ms)
        return f"its tasks stalled for {share:.1%} of the time, {self.allowed_stall:.1%} are allowed" if share > self.allowed_stall else ""

    def default_action(self, txns):
        """Safe default: reclaim nothing, and bring back what is left in swap of the batches that came back by a touch since the last assessment."""
        of = self.batches
        if of.came.any():
            memory.bring_back(txns, *of.where(of.came), quota_bytes=memory.GROUP * int(of.bytes.max()))

    def _assess(self, txns, now_ns):
        why = self.assess_model() or self.assess_performance()
        if why:
            self.offences = min(self.offences + 1, 5)
            self.stopped_until = now_ns + int(min(self.assess_ms * 2 ** (self.offences - 1), self.epoch_ms) * 1e6)
            self.stops.append((now_ns, why))
            self.default_action(txns)
        elif now_ns >= self.stopped_until:
            self.offences = max(0, self.offences - 1)
        of = self.batches
        of.shadow[:], of.came[:] = self.predict(), False
        self.wrong, self.stall_us = 0, 0
        self.seen = int((of.shadow & ~of.resident).sum())  # a touch of what is not resident is always told

    def report(self):
        """What `wave status` shows of it."""
        of = self.batches
        return {
            "batches_known": int(of.live.sum()),
            "batches_believed_cold": int(self.predict().sum()),
            "batches_reclaimed": int((of.live & ~of.resident).sum()),
            "actuator_stops": len(self.stops),
            "last_stop": self.stops[-1][1] if self.stops else "",
        }

    def _return(self, back):
        """These are resident again, and hot as far as is known."""
        of = self.batches
        back = back & ~of.resident
        of.resident[back], of.idle[back], of.last[back] = True, 0, self.tick
        of.due[back] = self.tick + 1 + np.arange(int(back.sum())) % (1 << (posteriors.ARMS - 1))

    def _ask_again(self, lost):
        of = self.batches
        of.asked[lost], of.due[lost] = False, self.tick + 1
