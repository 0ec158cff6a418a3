"""Pages of lists in memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tegula.errors import OptionError
from tegula.server.db import paginate

ITEMS = st.lists(st.tuples(st.integers(0, 9), st.text("abc", max_size=2)), unique=True)


def pages(items, cursor=None, limit=3, direction="next"):
    while True:
        page = paginate(items, lambda item: item, cursor=cursor, limit=limit)
        yield page
        cursor = getattr(page, direction)
        if cursor is None:
            return


@given(ITEMS, st.integers(1, 4))
def test_pages_lead_through_a_list_and_back(items, limit):
    forth = list(pages(items, limit=limit))
    assert [item for page in forth for item in page.items] == sorted(items, reverse=True)
    assert forth[0].previous is None
    back = list(pages(items, forth[-1].previous, limit, "previous")) if len(forth) > 1 else []
    assert [page.items for page in back[::-1]] == [page.items for page in forth[:-1]]


@given(ITEMS, ITEMS, st.sets(st.integers(0, 30)))
def test_a_page_goes_on_where_the_last_one_ended_whatever_came_and_went(items, come, gone):
    first = paginate(items, lambda item: item, cursor=None, limit=3)
    if first.next is None:
        return
    now = {item for number, item in enumerate(items) if number not in gone} | set(come)
    rest = [item for page in pages(list(now), first.next) for item in page.items]
    assert rest == sorted((item for item in now if item < first.items[-1]), reverse=True)


@pytest.mark.parametrize("cursor", ["x", "W10", "WyJvbGRlciIsMSwyXQ", "WyJvbGRlciIsImEiXQ", "%00"])
def test_a_cursor_that_is_none_is_refused(cursor):
    with pytest.raises(OptionError):
        paginate([(1, "a")], lambda item: item, cursor=cursor, limit=1)
