"""The errors: each is used, described on its page, and behaves as exceptions do."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path

import pytest

from tegula import errors
from tegula.catalog import InvalidInputsError, find, validate

CLASSES = [
    error
    for _, error in inspect.getmembers(errors, inspect.isclass)
    if issubclass(error, errors.TegulaError)
]
SOURCE = Path(errors.__file__).parent
CODE = "\n".join(path.read_text() for path in SOURCE.rglob("*.py") if path != Path(errors.__file__))


@pytest.mark.parametrize("error", [e for e in CLASSES if not e.__subclasses__()])
def test_every_error_is_raised_somewhere(error):
    assert re.search(rf"\b{error.__name__}\b", CODE)


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_stands_in_the_tree_with_a_code_of_its_own(error):
    assert re.search(rf"\b{error.__name__}\b", errors.__doc__)
    assert [other for other in CLASSES if other.code == error.code] == [error]


@pytest.mark.parametrize("error", CLASSES)
def test_an_error_can_be_hashed(error):
    assert len({error("No."), error("No.")}) == 2


def test_no_error_is_compared_by_its_fields_which_would_leave_it_without_a_hash():
    declared = re.findall(r"@dataclass(\([^)]*\))?\nclass (\w+Error)\b", CODE)
    assert [name for options, name in declared if "eq=False" not in options] == []


def invalid_inputs():
    with pytest.raises(InvalidInputsError) as refused:
        validate(find("tegula/upscale"), {"scale": "big"})
    return refused.value


@pytest.mark.parametrize(
    "error",
    [*(error("No.") for error in CLASSES), errors.BusyError("Wait.", 7), invalid_inputs()],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_behind_a_pipe_between_processes(error):
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)
