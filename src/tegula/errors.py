"""Every error that tegula raises on purpose.

TegulaError
├── InputError                 the request cannot be carried out as given
│   ├── OptionError            an option has the wrong type, is out of bounds or contradicts another
│   ├── ImageError             the input is not an image that can be read
│   ├── FetchError             the input's URL may not, or cannot, be fetched
│   └── TooLargeError          input or output exceeds the pixel limit
├── PathError                  a file or folder cannot be read or written
│   ├── FullDiskError          there is no room for it
│   └── StorageError           the object store does not answer, or refuses
├── ModelError                 weights
│   ├── UnknownModelError      no bundle or prescaler has that name
│   ├── MissingWeightsError    known, but its files are not on this machine
│   ├── BrokenWeightsError     the files are there and cannot be used
│   └── MissingExtraError      an optional dependency is needed and not installed
├── NumericalError             the model returned NaN or infinity, in full precision too
├── OutOfMemoryError           even the smallest batch does not fit
├── ServiceError               the server, or a cluster
│   ├── NotFoundError          there is no such prediction, file or model
│   ├── ConflictError          the request contradicts an earlier one
│   ├── BusyError              too much work is waiting already
│   └── ActorLostError         the actor of a cluster died that worked on it
└── CancelledError             the caller asked to stop

Each class carries a stable ``code`` for programs and an ``exit_status`` for the shell.
Messages are one sentence: what was wrong, and what would be right.
"""

from __future__ import annotations

from typing import ClassVar


class TegulaError(Exception):
    """Base of all errors raised on purpose; ``str(error)`` is fit to show to a user."""

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1


class InputError(TegulaError):
    """The request cannot be carried out as given."""

    code = "invalid_input"
    exit_status = 2


class OptionError(InputError):
    """An option has the wrong type, is out of bounds or contradicts another."""

    code = "invalid_option"


class ImageError(InputError):
    """The input is not an image that can be read."""

    code = "invalid_image"
    exit_status = 3


class FetchError(InputError):
    """The input's URL may not, or cannot, be fetched."""

    code = "fetch"


class TooLargeError(InputError):
    """Input or output exceeds the pixel limit."""

    code = "too_large"
    exit_status = 4


class PathError(TegulaError):
    """A file or folder cannot be read or written."""

    code = "path"
    exit_status = 5


class FullDiskError(PathError):
    """There is no room left on the disk."""

    code = "full_disk"


class StorageError(PathError):
    """The object store that keeps the server's files does not answer, or refuses."""

    code = "storage"


class ModelError(TegulaError):
    """Something about weights."""

    code = "model"
    exit_status = 6


class UnknownModelError(ModelError):
    """No bundle or prescaler has that name."""

    code = "unknown_model"


class MissingWeightsError(ModelError):
    """The model is known, but its files are not on this machine."""

    code = "missing_weights"


class BrokenWeightsError(ModelError):
    """The files are there and cannot be used."""

    code = "broken_weights"


class MissingExtraError(ModelError):
    """An optional dependency is needed and not installed."""

    code = "missing_extra"


class NumericalError(TegulaError):
    """The model returned NaN or infinity, in full precision too."""

    code = "not_finite"
    exit_status = 7


class OutOfMemoryError(TegulaError):
    """Even the smallest batch does not fit into memory."""

    code = "out_of_memory"
    exit_status = 8


class ServiceError(TegulaError):
    """Something about the server."""

    code = "service"
    exit_status = 9


class NotFoundError(ServiceError):
    """There is no such prediction, file or model."""

    code = "not_found"


class ConflictError(ServiceError):
    """The request contradicts an earlier one."""

    code = "conflict"


class BusyError(ServiceError):
    """Too much work is waiting already; ``retry_after`` whole seconds may help."""

    code = "busy"

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ActorLostError(ServiceError):
    """The actor of a cluster died that worked on it."""

    code = "actor_lost"


class CancelledError(TegulaError):
    """The caller asked to stop."""

    code = "cancelled"
    exit_status = 130

    def __init__(self, message: str = "Cancelled; nothing half-written is left.") -> None:
        super().__init__(message)
