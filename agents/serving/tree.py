"""HiRadixTree: what the policy knows of the cache, one tree over all tiers (Strata, section 4; SGLang's HiRadixCache).

A node is one block of a prompt; its id stands for the whole prompt up to there, so a prefix is a path from the root and nodes split where prompts do. A node
that is held nowhere is *transient*: a queued or running request will make it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

READY, IN_QUEUE, IN_FLIGHT = range(3)


class Node:
    """One block. `children` counts nodes below it that are on the device, `kept` those that are in host memory."""

    __slots__ = ("children", "device", "hits", "host", "kept", "key", "last", "parent", "state", "tokens", "users", "writing")

    def __init__(self, key: int, parent: int, tokens: int) -> None:
        self.key, self.parent, self.tokens = key, parent, tokens
        self.device = self.host = self.writing = False
        self.state = READY
        self.children = self.kept = 0
        self.users = 0  # running requests that need it on the device
        self.hits = 0
        self.last = 0


class Match:
    """What the cache has of a prompt: `hit` leading tokens, of which `load` are in host memory alone; `transient` more are being made."""

    __slots__ = ("hit", "load", "nodes", "transient")

    def __init__(self, hit: int, load: list[Node], nodes: list[Node], transient: int) -> None:
        self.hit, self.load, self.nodes, self.transient = hit, load, nodes, transient


class HiRadixTree:
    """Nodes of one instance, with least-recently-used eviction over the leaves of each tier."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.evictable = 0  # tokens on the device that no running request needs
        self._device: list[tuple[int, int]] = []  # (last use, key) of what was a leaf on the device when pushed
        self._host: list[tuple[int, int]] = []

    def match(self, keys: Sequence[int], prompt: int) -> Match:
        """The longest prefix that is held, leaving at least one token to compute."""
        nodes, load, hit, transient = [], [], 0, 0
        at = self.nodes.get
        for key in keys:
            node = at(key)
            if node is None:
                break
            if transient or not (node.device or node.host):
                if node.state == READY:
                    break
                transient += node.tokens
                continue
            nodes.append(node)
            hit += node.tokens
            if not node.device:
                load.append(node)
        return Match(min(hit, prompt - 1), load, nodes, transient)

    def add(self, key: int, parent: int, tokens: int) -> Node:
        """The node of a block, made if it is not there."""
        node = self.nodes.get(key)
        if node is None:
            node = self.nodes[key] = Node(key, parent, tokens)
        return node

    def lock(self, node: Node) -> None:
        """A running request needs the node on the device."""
        if node.device and not node.users:
            self.evictable -= node.tokens
        node.users += 1

    def unlock(self, node: Node, now: int) -> None:
        """A running request needs it no more."""
        node.users -= 1
        node.last = now
        if node.device and not node.users:
            self.evictable += node.tokens
            if not node.children:
                heapq.heappush(self._device, (now, node.key))

    def write(self, node: Node) -> None:
        """A copy of the node is on its way to host memory: until then it stays on the device."""
        node.writing = True
        self.lock(node)

    def to_device(self, node: Node) -> None:
        """The node is on the device, or on its way there."""
        if node.device:
            return
        node.device = True
        if not node.users:
            self.evictable += node.tokens
            heapq.heappush(self._device, (node.last, node.key))
        if above := self.nodes.get(node.parent):
            above.children += 1

    def to_host(self, node: Node) -> None:
        """The node is in host memory."""
        if node.writing:
            node.writing = False
            self.unlock(node, node.last)
        if node.host:
            return
        node.host = True
        heapq.heappush(self._host, (node.last, node.key))
        if above := self.nodes.get(node.parent):
            above.kept += 1

    def evict_device(self, tokens: int) -> list[Node]:
        """Take at least so many tokens from the device, least recently used leaves first; as many as there are if that is not enough."""
        taken = []
        for node in self._leaves(self._device):
            if tokens <= 0:
                heapq.heappush(self._device, (node.last, node.key))
                break
            taken.append(node)
            tokens -= node.tokens
            self.evictable -= node.tokens
            node.device = False
            above = self.nodes.get(node.parent)
            if above is not None:
                above.children -= 1
                if above.device and not above.children and not above.users:
                    heapq.heappush(self._device, (above.last, above.key))
            self._prune(node)
        return taken

    def evict_host(self, tokens: int) -> list[Node]:
        """Take at least so many tokens from host memory: leaves that are gone from the device."""
        taken = []
        for node in self._leaves(self._host):
            if tokens <= 0:
                heapq.heappush(self._host, (node.last, node.key))
                break
            taken.append(node)
            tokens -= node.tokens
            node.host = False
            above = self.nodes.get(node.parent)
            if above is not None:
                above.kept -= 1
                if above.host and not above.kept:
                    heapq.heappush(self._host, (above.last, above.key))
            self._prune(node)
        return taken

    def forget(self, node: Node, *, device: bool = False, host: bool = False) -> None:
        """The host lost it from a tier."""
        above = self.nodes.get(node.parent)
        if device and node.device:
            node.device = False
            self.evictable -= 0 if node.users else node.tokens
            if above is not None:
                above.children -= 1
        if host and node.host:
            node.host = False
            if above is not None:
                above.kept -= 1
        self._prune(node)

    def _leaves(self, heap: list[tuple[int, int]]) -> Iterator[Node]:
        """Nodes of a heap by last use; what was used again since it was pushed goes back to its new place."""
        while heap:
            last, key = heapq.heappop(heap)
            node = self.nodes.get(key)
            if node is None or (heap is self._device and (node.children or not node.device or node.users)):
                continue
            if heap is self._host and (not node.host or node.kept):
                continue
            if node.last != last:
                heapq.heappush(heap, (node.last, key))
                continue
            yield node

    def _prune(self, node: Node) -> None:
        if not (node.device or node.host or node.users) and node.state == READY:
            self.nodes.pop(node.key, None)
