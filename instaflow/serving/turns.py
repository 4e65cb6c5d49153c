"""Whose turn it is: drawings of many requests, step by step in one thread, the short before the long."""

import asyncio
import time
from collections.abc import Generator
from concurrent.futures import Executor
from dataclasses import dataclass, field

from instaflow.serving.painter import Images
from instaflow.serving.requests import Refused

MOST = 32
"""Drawings that wait or are under way."""
PATIENCE = 0.1
"""Seconds a step: a drawing of N steps lets those pass that come up to N times so much later and take one step."""
FEW = 4
"""Steps: a drawing of so few, once begun, is drawn to its end, though a newer one is wanted."""

Work = Generator[None, None, Images]


@dataclass(eq=False)
class Turn:
    """One drawing that waits or is under way. `done` gets its images, or why there are none."""

    work: Work
    steps: int  # that it takes, of all its images
    owner: tuple[str, str] | None  # client and model
    done: "asyncio.Future[Images]"
    came: float = field(default_factory=time.perf_counter)
    place: float = 0.0  # in the queue: when it came, or the one that it replaced
    taken: int = 0  # steps
    drawing: float = 0.0  # seconds so far
    waiting: float = 0.0  # seconds, when done

    def due(self) -> float:
        return self.place + PATIENCE * max(self.steps - self.taken, 0)


class Turns:
    """The drawings, and the thread that makes them. All but the drawing itself happens in the event loop."""

    def __init__(self, thread: Executor, most: int = MOST) -> None:
        self.thread, self.most = thread, most
        self.waiting: list[Turn] = []
        self.closed = False
        self.drawn = 0
        """How many were finished so far."""
        self._awake = asyncio.Event()

    def enter(self, work: Work, steps: int, owner: tuple[str, str] | None = None) -> Turn:
        """A turn for this work. Raises Refused where there are too many, or none any more."""
        if self.closed:
            raise stopping()
        turn = Turn(work, steps, owner, asyncio.get_running_loop().create_future())
        turn.place = turn.came
        for old in [one for one in self.waiting if owner is not None and one.owner == owner]:
            if not old.taken or old.steps > FEW:
                turn.place = min(turn.place, old.place)
                self.leave(old, Refused(409, "A newer request of this client took the place of this one"))
        if len(self.waiting) >= self.most:
            message = f"{len(self.waiting)} drawings wait already"
            raise Refused(429, message, "Ask again in a second", **{"Retry-After": "1"})
        self.waiting.append(turn)
        self._awake.set()
        return turn

    def leave(self, turn: Turn, why: Refused | None = None) -> None:
        """Take a turn out of the queue; what is drawn of it is given up after the step under way."""
        if turn in self.waiting:
            self.waiting.remove(turn)
        if not turn.done.done():
            if why:
                turn.done.set_exception(why)
            else:
                turn.done.cancel()

    def close(self) -> None:
        """Refuse those that wait, and all that come."""
        self.closed = True
        for turn in list(self.waiting):
            self.leave(turn, stopping())

    async def run(self) -> None:
        """Draw, one step of one drawing after another, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            while not self.waiting:
                self._awake.clear()
                await self._awake.wait()
            turn = min(self.waiting, key=Turn.due)
            turn.taken += 1
            try:
                drawn = await loop.run_in_executor(self.thread, step, turn)
            except Exception as error:
                if not turn.done.done():
                    turn.done.set_exception(error)
            else:
                if drawn is None or turn.done.done():
                    continue
                self.drawn += 1
                turn.waiting = time.perf_counter() - turn.came - turn.drawing
                turn.done.set_result(drawn)
            if turn in self.waiting:
                self.waiting.remove(turn)


def step(turn: Turn) -> Images | None:
    """Go on with a drawing by one step; its images if that was the last."""
    begun = time.perf_counter()
    try:
        next(turn.work)
    except StopIteration as end:
        drawn: Images = end.value
        return drawn
    finally:
        turn.drawing += time.perf_counter() - begun
    return None


def stopping() -> Refused:
    return Refused(503, "The server is being stopped", "Start it again")
