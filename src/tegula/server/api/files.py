"""Uploads, and the bytes of outputs."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.types import Receive, Scope, Send

from tegula.catalog import InvalidField
from tegula.errors import TooLargeError
from tegula.server.api.answers import FileAnswer, PageAnswer, file_answer, respond
from tegula.server.api.errors import ProblemError, documented, invalid, problems, too_large
from tegula.server.api.gate import Caller
from tegula.server.api.receiving import UnstorableError, parse_json
from tegula.server.api.service import CallerDep, Cursor, Service, ServiceDep
from tegula.server.tables import FileRecord

router = APIRouter(tags=["files"])

METADATA_BYTES = 64 * 1024
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
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_FILE_HEADERS = {
    "ETag": documented("Changes with the bytes; for `If-None-Match` and `If-Range`."),
    "Last-Modified": documented("When the file came to be."),
    "Accept-Ranges": documented("That ranges of bytes may be asked for.", "bytes"),
    "Content-Disposition": documented("The name of the file, and whether to show or save it."),
    "Content-Security-Policy": documented("That nothing in it may run."),
    "Cross-Origin-Resource-Policy": documented("That pages of other sites may show it."),
    "Access-Control-Allow-Origin": documented("That scripts of other sites may read it."),
}
STORED_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"*/*": _BYTES}, "headers": _FILE_HEADERS},
    206: {
        "description": "The ranges of bytes that were asked for",
        "content": {"*/*": _BYTES},
        "headers": {**_FILE_HEADERS, "Content-Range": documented("Which bytes of how many.")},
    },
    304: {"description": "The client has the file already", "headers": _FILE_HEADERS},
    **problems(404, 416, 503),
}
"""What routes that give the bytes of a file answer."""
_STORED_FILE_OR_LINK: dict[int | str, dict[str, Any]] = {
    **STORED_FILE,
    302: {
        "description": "The bytes are at an address of the bucket, which is valid for a while",
        "headers": {"Location": documented("The address.")},
    },
}


@router.post(
    "/v1/files",
    status_code=201,
    openapi_extra=_UPLOAD,
    operation_id="files.create",
    response_model=FileAnswer,
    responses=problems(415),
)
async def create_file(request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Upload a file, to use its address as an input; it is kept for a day."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise ProblemError(415, "Send the file as the part content of multipart/form-data.")
    async with request.form(max_files=2, max_fields=8, max_part_size=METADATA_BYTES) as form:
        metadata = await _metadata(form.get("metadata"))
        file = await service.run(_keep, service, caller, form, metadata)
    return respond(_shown(service, caller, file), 201)


@router.get("/v1/files", operation_id="files.list", response_model=PageAnswer[FileAnswer])
def list_files(
    request: Request, service: ServiceDep, caller: CallerDep, cursor: Cursor = None
) -> JSONResponse:
    """List your uploads, newest first."""
    page = service.store.files.page(caller.account.id, cursor=cursor)
    shown = partial(_shown, service, caller)
    return respond(service.page_answer(request, page, shown))


@router.get(
    "/v1/files/{file_id}",
    operation_id="files.get",
    response_model=FileAnswer,
    responses=STORED_FILE,
)
def get_file(request: Request, service: ServiceDep, caller: CallerDep, file_id: str) -> Response:
    """Get the description of an upload, or its bytes where only a picture is accepted."""
    file = service.store.files.get(file_id, caller.account.id)
    if request.headers.get("accept", "").startswith("image/"):
        return file_response(service, file)
    return respond(_shown(service, caller, file))


@router.delete(
    "/v1/files/{file_id}", status_code=204, operation_id="files.delete", responses=problems(404)
)
def delete_file(service: ServiceDep, caller: CallerDep, file_id: str) -> Response:
    """Delete an upload."""
    service.store.files.delete(file_id, caller.account.id)
    return Response(status_code=204)


@router.get(
    "/v1/files/{file_id}/download",
    operation_id="files.download",
    response_class=FileResponse,
    responses=_STORED_FILE_OR_LINK,
)
def download_file(
    request: Request,
    service: ServiceDep,
    file_id: str,
    owner: Annotated[str, Query(description="The username that the file belongs to.")],
    expiry: Annotated[int, Query(description="Seconds since 1970.")],
    signature: Annotated[str, Query(description="Proves the right to read it.")],
) -> Response:
    """Get the bytes of a file by its signed `urls.download`, without a token."""
    expected = service.store.links.signer.download(owner, file_id, expiry)
    good = hmac.compare_digest(signature.encode(), expected.encode())
    if not good or expiry < service.store.clock().timestamp():
        raise ProblemError(404, _NOT_FOUND)
    file = service.store.files.get(file_id)
    return _link(request, service, file) or file_response(service, file)


@router.get(
    "/o/{token}/{name}",
    operation_id="outputs.get",
    response_class=FileResponse,
    responses=_STORED_FILE_OR_LINK,
)
def get_output(
    request: Request,
    service: ServiceDep,
    token: str,
    name: str,  # noqa: ARG001
) -> Response:
    """Get the bytes of an output; whoever has its address may read it."""
    file_id = service.store.links.opened(token)
    if file_id is None:
        raise ProblemError(404, _NOT_FOUND)
    file = service.store.files.get(file_id)
    return _link(request, service, file) or file_response(service, file)


def _link(request: Request, service: Service, file: FileRecord) -> Response | None:
    """Return the way to the bytes in a bucket, if the operator wants that."""
    seconds = service.settings.blobs_link_seconds
    # Such a link is signed for one method.
    url = (
        service.store.blobs.link(file.sha256, seconds)
        if request.method == "GET" and seconds
        else None
    )
    headers = {"location": url or "", "cache-control": "no-store"}
    return None if url is None else Response(status_code=302, headers=headers)


def _shown(service: Service, caller: Caller, file: FileRecord) -> FileAnswer:
    return file_answer(file, service.store.links, caller.account.username, service.store.clock())


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
    text = await part.read(METADATA_BYTES + 1) if isinstance(part, UploadFile) else part or ""
    content = text.encode() if isinstance(text, str) else text
    try:
        metadata = parse_json(content or b"{}")
    except (ValueError, RecursionError, UnstorableError):
        metadata = None
    if not isinstance(metadata, dict) or len(content) > METADATA_BYTES:
        expected = (
            f"Must be a JSON object of at most {METADATA_BYTES // 1024} kB, with finite numbers "
            "and Unicode text only"
        )
        raise invalid(InvalidField("invalid_type", "metadata", expected))
    return metadata


_RANGE = re.compile(r"([0-9]{0,18})-([0-9]{0,18})", re.ASCII)
MOST_RANGES = 100


class _StoredFile(FileResponse):
    """The bytes of a file, unless the client has them; or the ranges of them that it wants.

    Conditions and ranges are read here, as RFC 9110 has them: the framework answers ranges that it
    cannot read with an error, and lets one that lies outside of the file spoil the others.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 200, 206, 304 or 416."""
        asked = Headers(scope=scope)
        if self._is_current(asked.get("if-none-match", "")):
            kept = {key: text for key, text in self.headers.items() if key != "content-length"}
            kept.pop("content-type")
            await Response(status_code=304, headers=kept)(scope, receive, send)
            return
        size = int(self.headers["content-length"])
        ranges = self._ranges(asked, size)
        if ranges == []:
            problem = ProblemError(
                416,
                f"The file has {size} bytes; Range names none of them.",
                headers={"content-range": f"bytes */{size}"},
            )
            await problem.response()(scope, receive, send)
            return
        names = (b"range", b"if-range")
        headers = [pair for pair in scope["headers"] if pair[0] not in names]
        if ranges is not None:
            listed = ",".join(f"{start}-{end}" for start, end in ranges)
            headers.append((b"range", f"bytes={listed}".encode()))
        await super().__call__({**scope, "headers": headers}, receive, send)

    def _is_current(self, tags: str) -> bool:
        """Whether what the client has is this; here weak tags are as good as strong ones."""
        return tags.strip() == "*" or self.headers["etag"] in re.findall('"[^"]*"', tags)

    def _ranges(self, asked: Headers, size: int) -> list[tuple[int, int]] | None:
        """Return the first and last byte of each range; None stands for the whole file."""
        unit, _, listed = asked.get("range", "").partition("=")
        parts = [part.strip() for part in listed.split(",") if part.strip()]
        known = {self.headers["etag"], self.headers["last-modified"], None}
        if unit.strip().lower() != "bytes" or not 0 < len(parts) <= MOST_RANGES:
            return None
        if asked.get("if-range") not in known:
            return None
        ranges = []
        for part in parts:
            found = _RANGE.fullmatch(part)
            start, end = found.groups() if found else ("", "")
            if not (start or end) or (start and end and int(end) < int(start)):
                return None  # what cannot be read is as if it were not there
            first = int(start) if start else max(0, size - int(end))
            last = min(int(end), size - 1) if start and end else size - 1
            if first <= last:
                ranges.append((first, last))
        return ranges


def file_response(service: Service, file: FileRecord) -> Response:
    """Return the bytes of a file as an answer.

    Raises:
        ProblemError: they have been removed.
    """
    path = service.store.files.path(file)
    try:
        stat = path.stat()
    except OSError as error:
        raise ProblemError(404, _NOT_FOUND) from error
    # SVG files can hold scripts.
    shown = file.content_type.startswith("image/") and "svg" not in file.content_type
    return _StoredFile(
        path,
        stat_result=stat,
        media_type=file.content_type,
        filename=file.name,
        content_disposition_type="inline" if shown else "attachment",
        headers={**_HEADERS, "etag": f'"{file.sha256}"', "cache-control": "private, max-age=3600"},
    )
