"""Which weights are whole when, under ZeRO-3: DeepSpeed's rules (partitioned_param_coordinator.py, read in 0.19.8), followed over
the order in which a micro step's modules run."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cola_ds.plan.micro_step import MicroStep


@dataclass(frozen=True)
class Sizes:
    """Of the engine's JSON, in elements."""

    resident: int
    """stage3_param_persistence_threshold: what is no larger stays whole."""
    prefetch: int
    live: int
    reuse: int


@dataclass(frozen=True)
class Gathers:
    """What a micro step gathers."""

    peak: int
    """Bytes of gathered weights and of what the micro step holds besides, where both together are most."""
    whole: int
    """Of them, gathered weights."""
    moved: int
    """Elements that are gathered in all."""


def gathers(
    step: MicroStep, weights: Mapping[str, Sequence[tuple[int, int]]], sizes: Sizes, element_bytes: int
) -> Gathers:
    """Follow a micro step at stage 3, as every one after the first two runs, which leave a trace.

    `weights`: by module, an identity of each of its own weights, and its elements.
    """
    return _Coordinator(step, weights, sizes, element_bytes).follow()


class _Coordinator:
    def __init__(
        self, step: MicroStep, weights: Mapping[str, Sequence[tuple[int, int]]], sizes: Sizes, element_bytes: int
    ):
        self.step, self.sizes, self.element_bytes = step, sizes, element_bytes
        self.weights = weights
        self.numel = {which: numel for module in weights.values() for which, numel in module}
        self.order = [name for begins, name in step.visits if begins]
        uses = [(which, number) for number, name in enumerate(self.order) for which, _ in weights[name]]
        self.queue = deque(uses)
        self.fetched_for: dict[int, int] = defaultdict(lambda: -1)
        self.available: set[int] = set()
        self.used_by: dict[int, set[str]] = defaultdict(set)
        self.held = self.moved = self.number = 0  # elements, elements, and modules that have begun

    def follow(self) -> Gathers:
        peak = whole = 0
        for (begins, name), held in zip(self.step.visits, self.step.peaks[1:], strict=True):
            beside = self._fetch(name) if begins else 0
            if not begins:
                self._release(name)
            gathered = self.element_bytes * (self.held + beside)
            if gathered + held > peak:
                peak, whole = gathered + held, gathered
        return Gathers(max(peak, self.step.peaks[0]), whole, self.moved)

    def _gather(self, wanted: list[int]) -> int:
        """Returns the elements of a second copy: several that come in one message are taken apart."""
        new = [which for which in dict.fromkeys(wanted) if not self._resident(which) and which not in self.available]
        self.available.update(new)
        size = sum(self.numel[which] for which in new)
        self.held += size
        self.moved += size
        return size if len(new) > 1 else 0

    def _resident(self, which: int) -> bool:
        return self.numel[which] <= self.sizes.resident

    def _fetch(self, name: str) -> int:
        mine = [which for which, _ in self.weights[name]]
        beside = self._gather(mine)
        for which in mine:
            self.used_by[which].add(name)
        new = {which for which in mine if self.fetched_for[which] < self.number}
        seen: set[int] = set()
        while self.queue and len(seen) < len(new):
            which, last = self.queue.popleft()
            self.fetched_for[which] = last
            seen.add(which)
        room, ahead, size = min(self.sizes.live - self.held, self.sizes.prefetch), [], 0
        while self.queue and size < room:
            which, last = self.queue.popleft()
            self.fetched_for[which] = max(self.fetched_for[which], last)
            if not self._resident(which) and which not in self.available and which not in ahead:
                ahead.append(which)
                size += self.numel[which]
        self.number += 1
        return max(beside, self._gather(ahead))

    def _release(self, name: str) -> None:
        mine = [which for which, _ in self.weights[name]]
        for which in mine:
            self.used_by[which].discard(name)
        going = {which for which in mine if self.fetched_for[which] <= self.number} & self.available
        passed = 0
        for other in self.order[self.number :]:
            if passed >= self.sizes.reuse or not going:
                break
            for which, numel in self.weights[other]:
                going.discard(which)
                passed += numel
        going = {which for which in going if not self.used_by[which]}
        self.available -= going
        self.held -= sum(self.numel[which] for which in going)
