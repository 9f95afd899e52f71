"""Who goes next to an engine: start-time fair queueing by tokens (Goyal, Vin, Cheng 1996), bounded. Knows no HTTP and no engine.

A flow is a tenant (without keys, an adapter). Each waiting request gets a start tag: the later of the queue's virtual time and its
flow's last finish tag, which grows by tokens / weight; the smallest start tag goes next. So a flow that floods waits behind its own.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(eq=False)
class Waiting:
    flow: "Flow"
    start: float
    share: float  # by which it moved the flow's finish tag
    number: int
    admitted: "asyncio.Future[None]"


@dataclass(eq=False)
class Flow:
    name: str
    weight: float
    finish: float = 0.0
    running: int = 0
    waiting: "deque[Waiting]" = field(default_factory=lambda: deque[Waiting]())


class Full(Exception):
    """No room to wait: `own` where it is the flow's own share of the queue that is full."""

    def __init__(self, *, own: bool) -> None:
        self.own = own


class FairQueue:
    """`places` requests run at once, of which one flow may hold `most`; `room` may wait, `flow_room` of one flow."""

    def __init__(self, *, places: int, most: int | None = None, room: int = 1024, flow_room: int = 256) -> None:
        self.places, self.most = places, most or places
        self.room, self.flow_room = room, flow_room
        self.running = self.waiting = 0
        self._virtual = 0.0
        self._flows: dict[str, Flow] = {}
        self._numbers: Iterator[int] = itertools.count()

    def enter_now(self, name: str, *, weight: float = 1.0, cost: float = 1.0) -> Flow | None:
        """A place that is free, where nobody waits for it; the flow is what `leave` wants."""
        flow = self._flow(name, weight)
        if self.waiting or not self._fits(flow):
            return None
        self._begin(flow, self._tag(flow, cost))
        return flow

    async def enter(self, name: str, *, weight: float = 1.0, cost: float = 1.0) -> Flow:
        """As `enter_now`, or wait for a place. Raises Full. Cancelling gives up the place in the queue."""
        if (found := self.enter_now(name, weight=weight, cost=cost)) is not None:
            return found
        flow = self._flow(name, weight)
        if len(flow.waiting) >= self.flow_room or self.waiting >= self.room:
            raise Full(own=len(flow.waiting) >= self.flow_room)
        start = self._tag(flow, cost)
        entry = Waiting(flow, start, flow.finish - start, next(self._numbers), asyncio.get_running_loop().create_future())
        flow.waiting.append(entry)
        self.waiting += 1
        self._admit()
        try:
            await entry.admitted
        except BaseException:
            if entry.admitted.done() and not entry.admitted.cancelled():
                self.leave(flow)
            elif entry in flow.waiting:
                self._give_up(entry)
            raise
        return flow

    def leave(self, flow: Flow, *, spare: float = 0.0) -> None:
        """Give the place back. `spare` is what was asked for and not used: the flow's later requests gain it."""
        self.running -= 1
        flow.running -= 1
        flow.finish = max(self._virtual, flow.finish - max(0.0, spare) / flow.weight)
        self._admit()
        self._forget(flow)

    def _flow(self, name: str, weight: float) -> Flow:
        flow = self._flows.get(name)
        if flow is None:
            flow = self._flows[name] = Flow(name, weight, self._virtual)
        flow.weight = weight
        return flow

    def _give_up(self, entry: Waiting) -> None:
        """It was never served, so the flow does not owe for it: those behind it move up."""
        flow = entry.flow
        for behind in itertools.islice(flow.waiting, flow.waiting.index(entry) + 1, None):
            behind.start = max(self._virtual, behind.start - entry.share)
        flow.finish = max(self._virtual, flow.finish - entry.share)
        flow.waiting.remove(entry)
        self.waiting -= 1
        self._forget(flow)

    def _admit(self) -> None:
        while self.waiting:
            ready = [flow.waiting[0] for flow in self._flows.values() if flow.waiting and self._fits(flow)]
            if not ready:
                return
            entry = min(ready, key=lambda one: (one.start, one.number))
            if entry.admitted.cancelled():  # it has not come to say so yet
                self._give_up(entry)
                continue
            entry.flow.waiting.popleft()
            self.waiting -= 1
            self._begin(entry.flow, entry.start)
            entry.admitted.set_result(None)

    def _fits(self, flow: Flow) -> bool:
        return self.running < self.places and flow.running < self.most

    def _begin(self, flow: Flow, start: float) -> None:
        self._virtual = max(self._virtual, start)
        self.running += 1
        flow.running += 1

    def _forget(self, flow: Flow) -> None:
        """Drop a flow that owes nothing, and every tag once nobody is here: names come and go without end."""
        if not self.running and not self.waiting:
            self._flows.clear()
            self._virtual = 0.0
        elif not flow.running and not flow.waiting and flow.finish <= self._virtual:
            self._flows.pop(flow.name, None)

    def _tag(self, flow: Flow, cost: float) -> float:
        start = max(self._virtual, flow.finish)
        flow.finish = start + max(cost, 1.0) / flow.weight
        return start
