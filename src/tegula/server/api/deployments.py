"""Deployments over HTTP: a model version under a name of its own, with pinned inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tegula.catalog import InvalidField
from tegula.server.api.answers import DeploymentAnswer, PageAnswer, deployment_answer, respond
from tegula.server.api.bodies import DeploymentBody, DeploymentChange
from tegula.server.api.errors import ProblemError, bad_version, invalid, problems
from tegula.server.api.gate import Caller
from tegula.server.api.library import ServedVersion
from tegula.server.api.models import PAGE, check_defaults, check_hardware
from tegula.server.api.receiving import JsonRoute
from tegula.server.api.service import CallerDep, Cursor, Service, ServiceDep
from tegula.server.tables import Deployment

router = APIRouter(
    prefix="/v1/deployments", tags=["deployments"], route_class=JsonRoute, strict_content_type=False
)


@router.get("", operation_id="deployments.list", response_model=PageAnswer[DeploymentAnswer])
def list_deployments(
    request: Request, service: ServiceDep, caller: CallerDep, cursor: Cursor = None
) -> JSONResponse:
    """List your deployments, newest first."""
    page = service.store.deployments.page(caller.account.id, cursor=cursor, limit=PAGE)
    return respond(service.page_answer(request, page, lambda item: _shown(service, item, caller)))


@router.post(
    "",
    operation_id="deployments.create",
    response_model=DeploymentAnswer,
    responses=problems(404, 409),
)
def create_deployment(service: ServiceDep, caller: CallerDep, body: DeploymentBody) -> JSONResponse:
    """Pin a version, and how many of its predictions run at once."""
    version = _version(service, body.model, body.version, caller.account.id)
    _check(service, version, body.model_dump())
    row = Deployment(
        owner=caller.account.username,
        account_id=caller.account.id,
        number=1,
        created_at=service.store.clock(),
        **{**body.model_dump(), "version": version.pin},
    )
    return respond(_shown(service, service.store.deployments.create(row), caller))


@router.get(
    "/{owner}/{name}",
    operation_id="deployments.get",
    response_model=DeploymentAnswer,
    responses=problems(404),
)
def get_deployment(service: ServiceDep, caller: CallerDep, owner: str, name: str) -> JSONResponse:
    """Get a deployment."""
    found = service.deployment(owner, name, caller.account.id)
    return respond(_shown(service, found, caller))


@router.patch(
    "/{owner}/{name}",
    operation_id="deployments.update",
    response_model=DeploymentAnswer,
    responses=problems(404),
)
def update_deployment(
    service: ServiceDep, caller: CallerDep, owner: str, name: str, body: DeploymentChange
) -> JSONResponse:
    """Make a new release with what is given changed."""
    before = service.deployment(owner, name, caller.account.id)
    given = {key: value for key, value in body.model_dump().items() if value is not None}
    after = dataclasses.replace(before, **given)
    version = _version(service, after.model, after.version, caller.account.id)
    after = dataclasses.replace(after, version=version.pin)
    _check(service, version, dataclasses.asdict(after))
    updated = service.store.deployments.update(after)
    return respond(_shown(service, updated, caller))


@router.delete(
    "/{owner}/{name}", status_code=204, operation_id="deployments.delete", responses=problems(404)
)
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


def _shown(service: Service, deployment: Deployment, caller: Caller) -> DeploymentAnswer:
    """Return a deployment with the id that its version has in this release."""
    try:
        version = service.library.deployed(deployment, caller.account.id).id
    except ProblemError:  # its user's version was deleted
        version = deployment.version
    return deployment_answer(deployment, version, caller.account)


def _check(service: Service, version: ServedVersion, deployment: Mapping[str, Any]) -> None:
    check_hardware(service, deployment["hardware"])
    check_defaults(version, {**version.defaults, **deployment["defaults"]})
    if deployment["min_instances"] > deployment["max_instances"] > 0:
        expected = "Must be at least min_instances"
        raise invalid(InvalidField("number_gte", "max_instances", expected))
