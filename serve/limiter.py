"""How much one tenant may ask for in a minute: two token buckets on the monotonic clock, so that no clock jump opens or shuts them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

MINUTE = 60.0


@dataclass
class Bucket:
    """Holds at most one minute's worth and refills evenly. `level` may fall below zero by what was taken in advance."""

    per_minute: int
    clock: Callable[[], float] = time.monotonic
    level: float = field(init=False)
    _seen: float = field(init=False)

    def __post_init__(self) -> None:
        self.level, self._seen = float(self.per_minute), self.clock()

    def wait_for(self, amount: float) -> float:
        """Seconds until `amount` (at most a minute's worth) can be taken; 0 where it can be now."""
        now = self.clock()
        self.level = min(float(self.per_minute), self.level + (now - self._seen) * self.per_minute / MINUTE)
        self._seen = now
        missing = min(amount, self.per_minute) - self.level
        return max(0.0, missing) * MINUTE / self.per_minute

    def take(self, amount: float) -> None:
        self.level -= amount


class Buckets:
    """A tenant's two: requests and tokens. None is no limit."""

    def __init__(self, requests: int | None = None, tokens: int | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.requests = Bucket(requests, clock) if requests else None
        self.tokens = Bucket(tokens, clock) if tokens else None

    def take(self, tokens: float) -> tuple[str, float] | None:
        """Take one request and so many tokens, or (what is short, seconds to wait) and nothing is taken."""
        for name, bucket, amount in (("requests", self.requests, 1.0), ("tokens", self.tokens, tokens)):
            if bucket and (wait := bucket.wait_for(amount)) > 0:
                return name, wait
        if self.requests:
            self.requests.take(1)
        if self.tokens:
            self.tokens.take(tokens)
        return None

    def settle(self, *, taken: float, used: float) -> None:
        """What a request really used, once that is known."""
        if self.tokens:
            self.tokens.take(used - taken)
