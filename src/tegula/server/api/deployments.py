"""Deployments over HTTP: a model version under a name of its own, with pinned inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tegula.catalog import InvalidField
from tegula.server.api.bodies import DeploymentBody, DeploymentChange
from tegula.server.api.errors import bad_version, invalid
from tegula.server.api.library import ServedVersion, deployment_json
from tegula.server.api.models import PAGE, check_defaults, check_hardware
from tegula.server.api.service import CallerDep, Cursor, Service, ServiceDep, paginate
from tegula.server.db import Deployment

router = APIRouter(prefix="/v1/deployments", tags=["deployments"])


@router.get("")
def list_deployments(
    request: Request, service: ServiceDep, caller: CallerDep, cursor: Cursor = None
) -> JSONResponse:
    """List your deployments, newest first."""
    deployments = service.store.deployments.all(caller.account.id)
    page = paginate(deployments, lambda deployment: deployment.full_name, cursor, PAGE)
    return JSONResponse(
        service.page_json(request, page, lambda item: deployment_json(item, caller.account))
    )


@router.post("")
def create_deployment(service: ServiceDep, caller: CallerDep, body: DeploymentBody) -> JSONResponse:
    """Pin a version, and how many of its predictions run at once."""
    version = _version(service, body.model, body.version, caller.account.id)
    _check(service, version, body.model_dump())
    row = Deployment(
        owner=caller.account.username,
        account_id=caller.account.id,
        number=1,
        created_at=service.store.clock(),
        **{**body.model_dump(), "version": version.id},
    )
    return JSONResponse(deployment_json(service.store.deployments.create(row), caller.account))


@router.get("/{owner}/{name}")
def get_deployment(service: ServiceDep, caller: CallerDep, owner: str, name: str) -> JSONResponse:
    """Get a deployment."""
    found = service.deployment(owner, name, caller.account.id)
    return JSONResponse(deployment_json(found, caller.account))


@router.patch("/{owner}/{name}")
def update_deployment(
    service: ServiceDep, caller: CallerDep, owner: str, name: str, body: DeploymentChange
) -> JSONResponse:
    """Make a new release with what is given changed."""
    before = service.deployment(owner, name, caller.account.id)
    given = {key: value for key, value in body.model_dump().items() if value is not None}
    after = dataclasses.replace(before, **given)
    version = _version(service, after.model, after.version, caller.account.id)
    after = dataclasses.replace(after, version=version.id)
    _check(service, version, vars(after))
    updated = service.store.deployments.update(after)
    return JSONResponse(deployment_json(updated, caller.account))


@router.delete("/{owner}/{name}", status_code=204)
def delete_deployment(service: ServiceDep, caller: CallerDep, owner: str, name: str) -> Response:
    """Delete a deployment; its predictions still run."""
    service.deployment(owner, name, caller.account.id)
    service.store.deployments.delete(owner, name)
    return Response(status_code=204)


def _version(service: Service, model: str, reference: str, account_id: str) -> ServedVersion:
    """Return the version of a model: by ``id``, ``owner/name:id``, or ``owner/name`` alone."""
    wanted = reference.rpartition(":")[2] if "/" in reference else reference
    owner, _, name = model.partition("/")
    found = service.library.model(owner, name, account_id).version(
        "" if reference == model else wanted
    )
    if found is None:
        raise bad_version()
    return found


def _check(service: Service, version: ServedVersion, deployment: Mapping[str, Any]) -> None:
    check_hardware(service, deployment["hardware"])
    check_defaults(version, {**version.defaults, **deployment["defaults"]})
    if deployment["min_instances"] > deployment["max_instances"] > 0:
        expected = "Must be at least min_instances"
        raise invalid(InvalidField("number_gte", "max_instances", expected))
