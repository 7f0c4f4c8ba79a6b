"""The progress bars of collecting."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class Bars:
    """A progress bar per domain, from its first new transition to its last."""

    def __init__(self, transitions: int, have: dict[str, int], *, disable: bool) -> None:
        self._transitions = transitions
        self._have = have
        self._disable = disable
        self._bars: dict[str, tqdm[Any]] = {}

    def show_one(self, domain: str, count: int) -> None:
        bar = self._bars.get(domain)
        if bar is None:
            if count == self._have[domain]:
                return
            bar = self._bars[domain] = tqdm(
                total=self._transitions,
                initial=self._have[domain],
                desc=f"collect {domain}",
                unit=" transitions",
                disable=self._disable,
            )
        # What a process had played and not written is lost with it, and the bar steps back.
        if count != bar.n:
            bar.update(count - bar.n)
            if count == self._transitions:
                bar.close()

    def show(self, counts: dict[str, int]) -> None:
        for domain, count in counts.items():
            self.show_one(domain, count)

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *exception: object) -> None:
        for bar in self._bars.values():
            bar.close()
