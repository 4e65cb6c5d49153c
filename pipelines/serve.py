"""Models behind a local page and an API: what `instaflow serve` does."""

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from instaflow.errors import ConfigError
from instaflow.interruption import listening

SHORTEST_TOKEN = 16
"""Characters."""


def run(places: Sequence[str], *, host: str, port: int, token: str | None, safety_checker: bool) -> None:
    """Answer requests until told to stop; a step of a drawing may still be under way then, for nobody.

    Raises ConfigError for what cannot be served so, DataError for what is no model, InstaFlowError for a port that is
    taken.
    """
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        message = f"'--token' must have {SHORTEST_TOKEN} characters or more, and of ASCII"
        raise ConfigError(message, "Leave it out for a new one at each start")
    try:
        from instaflow.serving import server
    except ModuleNotFoundError as error:
        message = f"'instaflow serve' wants the package '{error.name}', which is not installed"
        raise ConfigError(message, "pip install starlette uvicorn") from error
    taken = server.bound(host, port)
    if token is None and not server.is_local(taken):
        token = secrets.token_urlsafe(24)
    from instaflow.models.device import set_up_cpu
    from pipelines.painting import Models

    models = Models(places, safety_checker)
    thread = ThreadPoolExecutor(1, "drawing", initializer=set_up_cpu)  # which sets up its own thread
    try:
        thread.submit(models.try_all).result()
        for offer in models.offers:
            print(f"{offer.name}: {offer.kind}, {offer.width}×{offer.height} pixels")
        print(f"Open {server.url_of(taken, token)} (Ctrl-C ends it)", flush=True)
        with listening() as stop:
            server.serve(models, thread, taken, host=host, token=token, stop=stop)
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
    print("Stopped")
