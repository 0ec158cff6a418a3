"""Uploads, and the bytes of outputs."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.datastructures import FormData, UploadFile

from tegula.catalog import InvalidField
from tegula.errors import TooLargeError
from tegula.server.api.errors import ProblemError, invalid, too_large
from tegula.server.api.gate import Caller
from tegula.server.api.library import file_json
from tegula.server.api.service import CallerDep, Cursor, Service, ServiceDep
from tegula.server.tables import FileRecord

router = APIRouter(tags=["files"])

_METADATA_BYTES = 64 * 1024
_NOT_FOUND = "File not found"
_HEADERS = {
    # What users upload must not run as a script of this server in anybody's browser.
    "content-security-policy": "default-src 'none'; sandbox",
    "access-control-allow-origin": "*",
    "cross-origin-resource-policy": "cross-origin",
}
_UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["content"],
                    "properties": {
                        "content": {"type": "string", "format": "binary"},
                        "filename": {"type": "string"},
                        "type": {"type": "string"},
                        "metadata": {"type": "string", "description": "A JSON object."},
                    },
                }
            }
        },
    }
}


@router.post("/v1/files", status_code=201, openapi_extra=_UPLOAD)
async def create_file(request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Upload a file, to use its address as an input; it is kept for a day."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise ProblemError(415, "Send the file as the part content of multipart/form-data.")
    async with request.form(max_files=2, max_fields=8, max_part_size=_METADATA_BYTES) as form:
        metadata = await _metadata(form.get("metadata"))
        file = await service.run(_keep, service, caller, form, metadata)
    return JSONResponse(file_json(file, service.store.links), 201)


@router.get("/v1/files")
def list_files(
    request: Request, service: ServiceDep, caller: CallerDep, cursor: Cursor = None
) -> JSONResponse:
    """List your uploads, newest first."""
    page = service.store.files.page(caller.account.id, cursor=cursor)
    return JSONResponse(
        service.page_json(request, page, lambda file: file_json(file, service.store.links))
    )


@router.get("/v1/files/{file_id}")
def get_file(request: Request, service: ServiceDep, caller: CallerDep, file_id: str) -> Response:
    """Get the description of an upload, or its bytes where only a picture is accepted."""
    file = service.store.files.get(file_id, caller.account.id)
    if request.headers.get("accept", "").startswith("image/"):
        return file_response(service, file)
    return JSONResponse(file_json(file, service.store.links))


@router.delete("/v1/files/{file_id}", status_code=204)
def delete_file(service: ServiceDep, caller: CallerDep, file_id: str) -> Response:
    """Delete an upload."""
    service.store.files.delete(file_id, caller.account.id)
    return Response(status_code=204)


@router.get("/v1/files/{file_id}/download")
def download_file(
    service: ServiceDep,
    file_id: str,
    owner: Annotated[str, Query(description="The username that the file belongs to.")],
    expiry: Annotated[int, Query(description="Seconds since 1970.")],
    signature: Annotated[str, Query(description="Proves the right to read it.")],
) -> Response:
    """Get the bytes of a file by a signed address, without a token."""
    expected = service.store.links.signer.download(owner, file_id, expiry)
    good = hmac.compare_digest(signature.encode(), expected.encode())
    if not good or expiry < service.store.clock().timestamp():
        raise ProblemError(404, _NOT_FOUND)
    file = service.store.files.get(file_id)
    return file_response(service, file)


@router.api_route("/o/{token}/{name}", methods=["GET", "HEAD"], include_in_schema=False)
def get_output(service: ServiceDep, token: str, name: str) -> Response:  # noqa: ARG001
    """Get the bytes of an output; whoever has its address may read it."""
    file_id = service.store.links.opened(token)
    if file_id is None:
        raise ProblemError(404, _NOT_FOUND)
    file = service.store.files.get(file_id)
    return file_response(service, file)


def _keep(
    service: Service, caller: Caller, form: FormData, metadata: Mapping[str, Any]
) -> FileRecord:
    content = form.get("content")
    if not isinstance(content, UploadFile):
        raise invalid(InvalidField("required", "", "content is required"))
    name, kind = form.get("filename") or content.filename, form.get("type") or content.content_type
    seconds = service.settings.upload_seconds
    try:
        return service.store.files.keep(
            caller.account.id,
            str(name),
            content.file,
            content_type=str(kind),
            metadata=metadata,
            lifetime=timedelta(seconds=seconds) if seconds else None,
        )
    except TooLargeError as error:
        raise too_large(service.settings.max_upload_bytes, "Files") from error


async def _metadata(part: UploadFile | str | None) -> Mapping[str, Any]:
    """Read metadata, which some clients send as a field and some as a file."""
    text = await part.read(_METADATA_BYTES + 1) if isinstance(part, UploadFile) else part
    try:
        metadata = json.loads(text or "{}", parse_constant=_no_constant)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict) or len(text or "") > _METADATA_BYTES:
        raise invalid(InvalidField("invalid_type", "metadata", "Must be a small JSON object"))
    return metadata


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON.")


def file_response(service: Service, file: FileRecord) -> Response:
    """Return the bytes of a file as an answer.

    Raises:
        ProblemError: they have been removed.
    """
    path = service.store.files.path(file)
    if not path.is_file():
        raise ProblemError(404, _NOT_FOUND)
    # SVG files can hold scripts.
    shown = file.content_type.startswith("image/") and "svg" not in file.content_type
    return FileResponse(
        path,
        media_type=file.content_type,
        filename=file.name,
        content_disposition_type="inline" if shown else "attachment",
        headers={**_HEADERS, "etag": f'"{file.sha256}"', "cache-control": "private, max-age=3600"},
    )
