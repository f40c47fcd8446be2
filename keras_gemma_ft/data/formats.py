"""File formats: JSON lines, JSON arrays, CSV, TSV and Parquet, each read as a stream of records.

A record is what one row holds by column, with its place: `("train.jsonl:7", {"prompt": …, "response": …})`.
What cannot be read comes as the error that says why, in the record's stead, and reading goes on with the next
row. No row is longer than `LONGEST_ROW`, so memory stays bounded whatever the file holds.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from keras_gemma_ft.data.files import open_bytes
from keras_gemma_ft.errors import UserError

Record = tuple[str, dict[str, Any] | UserError]

LONGEST_ROW = 8 << 20  # bytes; some two million tokens, which no training example has
_BLOCK = 1 << 20  # characters read at once
_BATCH_ROWS = 256  # of Parquet
_BOM = b"\xef\xbb\xbf"
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, as `surrogateescape` gives them
_decode = json.JSONDecoder().decode
_SPACE = re.compile(r"[ \t\r\n]*")


def json_lines(path: str) -> Generator[Record, None, None]:
    """One JSON object a line. Empty lines at the end of the file are passed over."""
    with open_bytes(path) as file:
        read = 0  # lines before this one, but for empty ones
        for number, line in enumerate(_lines(file), 1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if not line.isspace():
                for empty in range(read + 1, number):
                    yield f"{path}:{empty}", _empty("line")
                yield f"{path}:{number}", _object(line)
                read = number


def delimited(path: str, tab: bool = False) -> Generator[Record, None, None]:
    """CSV or TSV with a header; a row's place is the line on which it starts.

    Raises:
        UserError: Two columns have one name.
    """
    csv.field_size_limit(LONGEST_ROW)  # of the process: the default is 128 KiB
    with open_bytes(path) as file:
        # What is no UTF-8 becomes surrogates, so that the row can be named and the next one read.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        lines = _TextLines(text)
        head = _header(lines, path)
        delimiter = "\t" if tab else ";" if head.count(";") > head.count(",") else ","
        columns = [name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])]
        twice = {name for name in columns if columns.count(name) > 1}
        if twice:
            raise UserError(
                f"two columns are called {sorted(twice)[0]!r}",
                where=f"{path}:1",
                remedy="rename one of them.",
            )
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        empty = 0  # lines just before this one
        while True:
            place = lines.number + 1
            try:
                cells = next(rows, None)
            except csv.Error as error:
                yield f"{path}:{place}", _no_csv(error)
                continue
            if cells is None:
                return
            if not cells:
                empty += 1
                continue
            for line in range(place - empty, place):
                yield f"{path}:{line}", _empty("line")
            empty = 0
            yield f"{path}:{place}", _cells(columns, cells)


def json_array(path: str) -> Generator[Record, None, None]:
    """The objects of a JSON array; a row's place is the line on which it starts, and its number.

    Raises:
        UserError: The array breaks off or is malformed: no row after that can be told.
    """
    decoder = json.JSONDecoder()
    with open_bytes(path) as file:
        text = _Text(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))
        if text.next_character() != "[":
            raise _broken_array("does not begin with [", path, text.line)
        text.skip(1)
        row = 0
        while text.next_character() != "]":
            if row:
                if text.next_character() != ",":
                    raise _broken_array("has no comma between two rows", path, text.line)
                text.skip(1)
                text.next_character()
            row += 1
            origin = f"{path}:{text.line} (row {row})"
            try:
                value = text.decode(decoder)
            except RecursionError:
                raise _broken_array("is nested too deeply", path, text.line) from None
            except ValueError as error:
                raise _broken_array(f"is no JSON: {_reason(error)}", path, text.line) from error
            yield origin, value if isinstance(value, UserError) else _checked(value)


def parquet(path: str) -> Generator[Record, None, None]:
    """The rows of a Parquet file, batch by batch.

    Raises:
        UserError: It is no Parquet file.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with open_bytes(path) as file:
        try:
            row = 0
            for batch in ParquetFile(file).iter_batches(_BATCH_ROWS):
                for record in arrow_records(batch):
                    row += 1
                    yield f"{path}, row {row}", record
        except pyarrow.ArrowException as error:
            raise UserError(
                f"the file is no Parquet, or damaged ({str(error).splitlines()[0]})",
                where=path,
                remedy="write it again, or set data.format to what it is.",
            ) from error


def arrow_records(batch: Any) -> list[dict[str, Any] | UserError]:
    """The rows of an Arrow table or batch."""
    try:
        return [_checked(_present_in(row)) for row in batch.to_pylist()]
    except UnicodeDecodeError:
        return [_arrow_row(batch, index) for index in range(batch.num_rows)]


READERS: dict[str, tuple[str, Callable[[str], Generator[Record, None, None]]]] = {
    "jsonl": ("JSON lines", json_lines),
    "json": ("a JSON array", json_array),
    "csv": ("CSV", delimited),
    "tsv": ("TSV", lambda path: delimited(path, tab=True)),
    "parquet": ("Parquet", parquet),
}
"""What `data.format` may be besides auto: in words, and the function that reads it."""

_BY_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


def detect(path: str) -> str:
    """The format that a file's first bytes and its name tell.

    Raises:
        UserError: Neither tells, or the text is UTF-16; or the file cannot be read.
    """
    with open_bytes(path) as file:
        head = file.peek(4096)[:4096]  # type: ignore[attr-defined]
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError("the text is UTF-16", where=path, remedy="save the file as UTF-8.")
    suffix = PurePosixPath(path.lower().removesuffix(".gz")).suffix
    text = head.removeprefix(_BOM).lstrip()
    if suffix in _BY_SUFFIX:
        is_array = _BY_SUFFIX[suffix] == "jsonl" and text.split(b"\n")[0].strip() == b"["
        return "json" if is_array else _BY_SUFFIX[suffix]
    if text.startswith(b"["):
        return "json"
    if text.startswith(b"{") or suffix == ".json":
        return "jsonl"
    raise UserError(
        "neither its name nor its beginning tells the file's format",
        where=path,
        remedy=f"set data.format to one of {', '.join(READERS)}.",
    )


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines; of one that is longer than a row may be, only as much as shows it."""
    while line := file.readline(LONGEST_ROW + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(_BLOCK)


def _object(line: bytes) -> dict[str, Any] | UserError:
    if len(line) > LONGEST_ROW:
        return _too_long()
    try:
        return _checked(_decode(line.decode()))
    except UnicodeDecodeError as error:
        return _no_utf8(error.start + 1)
    except RecursionError:
        return UserError("is nested too deeply", remedy="correct the row, or delete it.")
    except ValueError as error:
        return UserError(f"is no JSON: {_reason(error)}", remedy="write one JSON object a line.")


def _checked(value: Any) -> dict[str, Any] | UserError:
    if isinstance(value, dict):
        return value if value else _empty("object")
    name = {list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return UserError(
        f"the row is {name.get(type(value), 'null')}, not an object",
        remedy='write an object with its columns, such as {"prompt": …, "response": …}.',
    )


def _cells(columns: list[str], cells: list[str]) -> dict[str, Any] | UserError:
    if len(cells) != len(columns):
        return UserError(
            f"the row has {len(cells)} fields, the header {len(columns)}",
            remedy='put fields with commas, quotes or line breaks in "quotes".',
        )
    for column, cell in zip(columns, cells, strict=True):
        if not cell.isascii() and _ESCAPED.search(cell):
            error = _no_utf8()
            return UserError(error.what, where=f"column {column!r}", remedy=error.remedy)
    return dict(zip(columns, cells, strict=True))


def _header(lines: _TextLines, path: str) -> str:
    try:
        return next(lines, "")
    except csv.Error as error:
        raise UserError("the header is longer than 8 MiB", where=f"{path}:1", remedy="is it CSV?") from error


def _no_csv(error: csv.Error) -> UserError:
    if "field limit" in str(error):
        return _too_long()
    return UserError(
        f"the row is malformed ({error})",
        remedy='close every quote, and double a " inside of quotes.',
    )


def _arrow_row(batch: Any, index: int) -> dict[str, Any] | UserError:
    try:
        return _checked(_present_in(batch.slice(index, 1).to_pylist()[0]))
    except UnicodeDecodeError:
        return _no_utf8()


def _present_in(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _present(value) for name, value in row.items()}


def _present(value: Any) -> Any:
    """A value of Arrow without the fields that are null: its structs cannot tell null from absent."""
    if isinstance(value, dict):
        return {name: _present(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_present(item) for item in value]
    return value


def _empty(what: str) -> UserError:
    return UserError(f"the {what} is empty", remedy="delete it.")


def _too_long() -> UserError:
    return UserError(
        f"the row is longer than {LONGEST_ROW >> 20} MiB",
        remedy="split it, or delete it; in CSV it may be a quote that is never closed.",
    )


def _no_utf8(byte: int | None = None) -> UserError:
    at = f" (byte {byte:,} of the row)" if byte else ""
    return UserError(f"the text is not UTF-8{at}", remedy="save the file as UTF-8, or delete the row.")


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (character {error.pos + 1:,} of the row)"
    return str(error)


def _broken_array(what: str, path: str, line: int) -> UserError:
    return UserError(
        f"the array {what}",
        where=f"{path}:{line}",
        remedy="correct the file, or write one object a line (JSON lines).",
    )


class _TextLines:
    """Lines for `csv`, with the number of the last one; one that is too long is an error in its stead."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file
        self.number = 0

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(LONGEST_ROW + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > LONGEST_ROW:
            while line and not line.endswith("\n"):
                line = self._file.readline(_BLOCK)
            raise csv.Error("line longer than field limit")
        return line


class _Text:
    """A text that is read block by block, of which only what is being decoded is held."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file
        self._held = ""
        self._at = 0
        self.line = 1

    def next_character(self) -> str:
        """The next one that is no white space, which is skipped; "" at the end."""
        while True:
            space = _SPACE.match(self._held, self._at)
            assert space is not None, "it matches nothing, too"
            self.skip(space.end() - self._at)
            if self._at < len(self._held) or not self._read(_BLOCK):
                return self._held[self._at : self._at + 1]

    def skip(self, characters: int) -> None:
        self.line += self._held.count("\n", self._at, self._at + characters)
        self._at += characters

    def decode(self, decoder: json.JSONDecoder) -> Any:
        """The value that begins here, or the error why it is none for us.

        Raises:
            ValueError: There is none.
        """
        wanted = _BLOCK
        while True:
            try:
                value, end = decoder.raw_decode(self._held, self._at)
                # A number at the end of what is held may go on.
                if end < len(self._held) or not self._read(_BLOCK):
                    break
            except json.JSONDecodeError as error:
                held = len(self._held) - self._at
                if held > 4 * LONGEST_ROW or not self._read(wanted):
                    raise json.JSONDecodeError(
                        error.msg, error.doc[self._at :], error.pos - self._at
                    ) from error
                wanted *= 2  # what is decoded again and again doubles, so that time stays linear
        is_long = end - self._at > LONGEST_ROW
        is_broken = _ESCAPED.search(self._held, self._at, end) is not None
        self.skip(end - self._at)
        return _too_long() if is_long else _no_utf8() if is_broken else value

    def _read(self, characters: int) -> bool:
        more = self._file.read(characters)
        self._held = self._held[self._at :] + more
        self._at = 0
        return bool(more)
