"""What FastAPI gives to routes."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query
from fastapi.security import HTTPBearer
from starlette.requests import Request

from tegula.api.gate import Caller, caller_of
from tegula.api.service import Service, service_of

_BEARER = HTTPBearer(auto_error=False, description="A token of `tegula tokens create`.")


async def _service(request: Request) -> Service:
    """Return the service; a coroutine, because FastAPI runs functions in other threads."""
    return service_of(request)


async def _caller(request: Request, _scheme: Annotated[object, Depends(_BEARER)]) -> Caller:
    """Return who asks; the scheme is only for the OpenAPI document, the gate has checked."""
    return caller_of(request.state)


Serving = Annotated[Service, Depends(_service)]
Asking = Annotated[Caller, Depends(_caller)]
Cursor = Annotated[str | None, Query(description="From `next` or `previous` of a page.")]
