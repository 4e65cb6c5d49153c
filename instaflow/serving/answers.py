"""Answers in JSON; an error's are {"error", "hint"}."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from instaflow.errors import InstaFlowError
from instaflow.serving.requests import Refused

Handlers = dict[Any, Any]


def refusing(error: InstaFlowError) -> Response:
    """What cannot be drawn is the request's fault: 422, unless it says more."""
    status, headers = (error.status, error.headers) if isinstance(error, Refused) else (422, {})
    return JSONResponse({"error": error.message, "hint": error.hint}, status, headers)


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, InstaFlowError)
    return refusing(error)


async def unknown(request: Request, error: Exception) -> Response:
    """No such page, or not with this method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    message = f"There is no '{what}'" if error.status_code in (404, 405) else error.detail
    hint = "There are GET /, GET /api/models, GET /api/health and POST /api/images"
    return JSONResponse({"error": message, "hint": hint}, error.status_code, error.headers)


async def failed(request: Request, error: Exception) -> Response:
    """The traceback follows in the terminal."""
    return JSONResponse({"error": "The drawing failed", "hint": "The server's terminal says why"}, 500)


HANDLERS: Handlers = {InstaFlowError: refused, HTTPException: unknown, Exception: failed}
