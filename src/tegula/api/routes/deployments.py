"""Deployments: a model version under a name of its own, with pinned inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tegula.api.bodies import DeploymentBody, DeploymentChange
from tegula.api.dependencies import Asking, Cursor, Serving
from tegula.api.library import Edition
from tegula.api.objects import deployment_object
from tegula.api.problems import InvalidField, bad_version, invalid
from tegula.api.routes.checks import check_defaults, check_hardware
from tegula.api.service import Service
from tegula.api.shortlists import page_of
from tegula.predictions.records import Deployment

router = APIRouter(prefix="/v1/deployments", tags=["deployments"])

_PAGE = 25


@router.get("")
def list_deployments(
    request: Request, service: Serving, caller: Asking, cursor: Cursor = None
) -> JSONResponse:
    """List your deployments, newest first."""
    every = service.store.deployments.all(caller.account.id)
    page = page_of(every, lambda deployment: deployment.full_name, cursor, _PAGE)
    told = [deployment_object(item, caller.account) for item in page.items]
    return JSONResponse(service.page(request, page, told))


@router.post("")
def create_deployment(service: Serving, caller: Asking, body: DeploymentBody) -> JSONResponse:
    """Pin a version, and how many of its predictions run at once."""
    edition = _edition(service, body.model, body.version, caller.account.id)
    _check(service, edition, body.model_dump())
    made = Deployment(
        owner=caller.account.username,
        account_id=caller.account.id,
        number=1,
        created_at=service.store.clock(),
        **{**body.model_dump(), "version": edition.id},
    )
    return JSONResponse(deployment_object(service.store.deployments.create(made), caller.account))


@router.get("/{owner}/{name}")
def get_deployment(service: Serving, caller: Asking, owner: str, name: str) -> JSONResponse:
    """Get a deployment."""
    found = service.deployment(owner, name, caller.account.id)
    return JSONResponse(deployment_object(found, caller.account))


@router.patch("/{owner}/{name}")
def update_deployment(
    service: Serving, caller: Asking, owner: str, name: str, body: DeploymentChange
) -> JSONResponse:
    """Make a new release with what is given changed."""
    before = service.deployment(owner, name, caller.account.id)
    given = {key: value for key, value in body.model_dump().items() if value is not None}
    after = dataclasses.replace(before, **given)
    edition = _edition(service, after.model, after.version, caller.account.id)
    after = dataclasses.replace(after, version=edition.id)
    _check(service, edition, vars(after))
    updated = service.store.deployments.update(after)
    return JSONResponse(deployment_object(updated, caller.account))


@router.delete("/{owner}/{name}", status_code=204)
def delete_deployment(service: Serving, caller: Asking, owner: str, name: str) -> Response:
    """Delete a deployment; what was asked of it still runs."""
    service.deployment(owner, name, caller.account.id)
    service.store.deployments.delete(owner, name)
    return Response(status_code=204)


def _edition(service: Service, model: str, version: str, account_id: str) -> Edition:
    """Return the edition of a model that a version names, however it names it."""
    wanted = version.rpartition(":")[2] if "/" in version else version
    if version == model:
        wanted = ""
    owner, _, name = model.partition("/")
    found = service.library.entry(owner, name, account_id).edition(wanted)
    if found is None:
        raise bad_version()
    return found


def _check(service: Service, edition: Edition, asked: Mapping[str, Any]) -> None:
    check_hardware(service, asked["hardware"])
    check_defaults(edition, {**edition.defaults, **asked["defaults"]})
    if asked["min_instances"] > asked["max_instances"] > 0:
        wrong = "Must be at least min_instances"
        raise invalid(InvalidField("number_gte", "max_instances", wrong))
