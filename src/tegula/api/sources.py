"""The picture that a prediction started from, wherever it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tegula.api.problems import ProblemError
from tegula.api.service import Service
from tegula.errors import NotFoundError
from tegula.predictions.records import FILE_KEY, FileRecord, Prediction

_USUAL = "image"


def source_of(service: Service, prediction: Prediction) -> FileRecord:
    """Return the file behind the input that is enlarged, as this server keeps it.

    Inputs by address have been fetched once for the run; nothing is fetched here.

    Raises:
        NotFoundError: there is none, or none any more.
    """
    value = prediction.input.get(_image_input(service, prediction))
    files = service.store.files
    if isinstance(value, Mapping) and FILE_KEY in value:
        return files.get(value[FILE_KEY], prediction.account_id)
    if not isinstance(value, str):
        raise NotFoundError("This prediction has no picture to start from.")
    if own := service.store.links.own_file(value):
        file_id, public = own
        return files.get(file_id, None if public else prediction.account_id)
    return files.fetched(prediction.id, value)


def _image_input(service: Service, prediction: Prediction) -> str:
    """Return the name of that input; versions of an earlier release are not known any more."""
    inputs: Mapping[str, Any] = prediction.input
    try:
        edition = service.library.resolve(prediction.version, inputs, prediction.account_id)
    except ProblemError:
        return _USUAL
    return edition.base.image
