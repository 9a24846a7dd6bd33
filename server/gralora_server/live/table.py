"""A table of which a page at a time is sent: searched, sorted and cut here, so that thousands of rows cost a reader
nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gralora_runtime.errors import InvalidRequestError

ROWS = 50  # of a page
MAX_PAGE = 1_000_000

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a reader wants to see of one table."""

    sort: str
    descending: bool
    search: str
    page: int  # from 1

    @classmethod
    def read(cls, query: Mapping[str, str], table: str, columns: Sequence[str]) -> Asked:
        """Of a query with `TABLE.sort`, `.order`, `.search` and `.page`. Raises InvalidRequestError."""
        sort = query.get(f"{table}.sort", columns[0])
        if sort not in columns:
            raise InvalidRequestError(f"{table}.sort", sort, f"must be one of {', '.join(columns)}")
        order = query.get(f"{table}.order", "ascending")
        if order not in ("ascending", "descending"):
            raise InvalidRequestError(f"{table}.order", order, "must be ascending or descending")
        page = query.get(f"{table}.page", "1")
        if not (page.isascii() and page.isdigit() and 1 <= int(page[:8]) <= MAX_PAGE):
            raise InvalidRequestError(f"{table}.page", page, f"must be 1 to {MAX_PAGE}")
        search = query.get(f"{table}.search", "").casefold()
        return cls(sort=sort, descending=order == "descending", search=search, page=int(page[:8]))


def shown(rows: Sequence[Row], asked: Asked, searched: Sequence[str]) -> dict[str, Any]:
    """The page that was asked for, or the last one that there is. `searched`: the columns that a search looks at."""
    found = [row for row in rows if any(asked.search in str(row[name]).casefold() for name in searched)]
    found.sort(key=lambda row: str(row[searched[0]]))
    found.sort(key=lambda row: _rank(row[asked.sort]), reverse=asked.descending)
    pages = max(1, -(-len(found) // ROWS))
    page = min(asked.page, pages)
    return {"rows": found[(page - 1) * ROWS : page * ROWS], "found": len(found), "page": page, "pages": pages}


def _rank(value: Any) -> tuple[bool, Any]:
    """What is not known is less than all that is."""
    return (value is not None, 0 if value is None else value)
