"""A connection that ends where nobody asks on it."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 5.0
"""A request's line and headers are to be here by then."""


class Connection(H11Protocol):
    """Is closed where no answer is under way and no next request comes in time, whatever bytes come else.

    Where nothing comes after an answer, uvicorn's own time ends it.
    """

    closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.watch()

    def handle_events(self) -> None:
        super().handle_events()
        self.watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.closing:
            self.closing.cancel()

    def watch(self) -> None:
        """The time runs while nothing is asked: from the start, and from what comes after an answer."""
        is_asked = self.cycle is not None and not self.cycle.response_complete
        if is_asked and self.closing:
            self.closing.cancel()
            self.closing = None
        elif not is_asked and not self.closing:
            self.closing = self.loop.call_later(HEAD_SECONDS, self.transport.close)
