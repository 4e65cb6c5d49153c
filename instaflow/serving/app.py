"""The page and the API: what is answered where."""

import asyncio
import base64
import json
from concurrent.futures import Executor
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from instaflow import __version__
from instaflow.config import nearest
from instaflow.serving.answers import HANDLERS
from instaflow.serving.guard import Guard
from instaflow.serving.painter import Images, Offer, Painter
from instaflow.serving.requests import LONGEST_BODY, ImageRequest, Refused, parse
from instaflow.serving.turns import Turn, Turns

PAGE = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/cards.js": ("cards.js", "text/javascript"),
    "/past.js": ("past.js", "text/javascript"),
    "/state.js": ("state.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""The page's files, by their paths."""
BODY_SECONDS = 10.0
"""A request's body is to be here by then."""


class Service:
    """What a server answers; `app` is it as ASGI. Made within the event loop that is to run it."""

    def __init__(self, painter: Painter, thread: Executor, *, hosts: set[str] | None, token: str | None) -> None:
        self.painter, self.turns = painter, Turns(thread)
        self.offers = {offer.name: offer for offer in painter.offers}
        self.models = {"models": [vars(offer) for offer in painter.offers], "wants_token": token is not None}
        routes = [
            Route("/api/images", self.images, methods=["POST"]),
            Route("/api/models", self.list_models),
            Route("/api/health", self.health),
        ]
        for path, (name, kind) in PAGE.items():
            routes.append(Route(path, page(files("instaflow.serving").joinpath("page", name).read_bytes(), kind)))
        self.app = Guard(Starlette(routes=routes, exception_handlers=HANDLERS), hosts=hosts, token=token)

    async def list_models(self, request: Request) -> Response:
        return JSONResponse(self.models)

    async def health(self, request: Request) -> Response:
        turns = self.turns
        state = {"status": "stopping" if turns.closed else "ok", "version": __version__}
        counts = {"waiting": len(turns.waiting), "most_waiting": turns.most, "drawn": turns.drawn}
        return JSONResponse(state | counts, 503 if turns.closed else 200)

    async def images(self, request: Request) -> Response:
        """The images of a request: one as PNG, or any as JSON, as Accept says."""
        as_json = "application/json" in request.headers.get("accept", "")
        asked = parse(await body_of(request))
        if asked.seeds is not None and not as_json:
            hint = "Send the header 'Accept: application/json'; or one 'seed'"
            raise Refused(406, "Several images are answered as JSON alone", hint)
        offer = self.offer(asked.model)
        steps = (asked.num_steps or offer.num_steps) * len(asked.many)
        owner = (asked.client, offer.name) if asked.client else None
        turn = self.turns.enter(self.painter.draw(offer.name, asked), steps, owner)
        try:
            drawn = await finished(turn, request)
        finally:
            self.turns.leave(turn)
        facts = told(offer, asked, turn, drawn)
        if as_json:
            return JSONResponse(facts | {"prompt": asked.prompt, "images": listed(asked, drawn)})
        (image,) = drawn.images
        return Response(image, media_type="image/png", headers={"X-InstaFlow": json.dumps(facts)})

    def offer(self, name: str | None) -> Offer:
        """Raises Refused."""
        if name is None:
            return next(iter(self.offers.values()))
        if name not in self.offers:
            raise Refused(422, f"There is no model {name[:60]!r} here", nearest(name, self.offers))
        return self.offers[name]


def page(content: bytes, kind: str) -> Any:
    """An endpoint that answers a file of the page."""

    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind)

    return answer


async def body_of(request: Request) -> bytes:
    """A JSON body of at most LONGEST_BODY bytes. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"The body is {kind or 'of no kind'}", "Send JSON, with 'Content-Type: application/json'")
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > LONGEST_BODY:
                    raise Refused(
                        413, f"The body has more than {LONGEST_BODY:,} bytes", "Send less", Connection="close"
                    )
    except TimeoutError:
        raise Refused(408, "The body did not come in time", "Send it at once", Connection="close") from None
    except ClientDisconnect:
        raise gone() from None
    return body


async def finished(turn: Turn, request: Request) -> Images:
    """What was drawn. Raises Refused, also where the one who asked has gone, and what the drawing raises."""
    leaving: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait([turn.done, leaving], return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
    if not turn.done.done():
        raise gone()
    return turn.done.result()


def gone() -> Refused:
    return Refused(499, "The one who asked has gone")


def told(offer: Offer, asked: ImageRequest, turn: Turn, drawn: Images) -> dict[str, Any]:
    """How images were drawn, and how long it took."""
    return {
        "model": offer.name,
        "num_steps": drawn.num_steps,
        "guidance_scale": drawn.guidance_scale,
        "truncated": drawn.truncated,
        "note": drawn.note,
        "seconds": {"waiting": round(turn.waiting, 4), "drawing": round(turn.drawing, 4)},
    }


def listed(asked: ImageRequest, drawn: Images) -> list[dict[str, Any]]:
    """The images with their noises."""
    between = {} if asked.seed_to is None else {"seed_to": asked.seed_to, "position": asked.position}
    return [
        {"seed": seed, **between, "png": base64.b64encode(image).decode()}
        for seed, image in zip(asked.many, drawn.images, strict=True)
    ]
