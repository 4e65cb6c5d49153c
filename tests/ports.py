"""Ports for what tests start."""

import random
import socket
from contextlib import suppress

given: set[int] = set()


def free_port() -> int:
    """A port of this machine that nobody listens at, another one each time.

    It lies below those that the system hands out, so that nothing else gets it meanwhile, and above `srun`'s.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            if port not in given:
                given.add(port)
                return port
