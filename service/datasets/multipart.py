"""Takes a multipart upload apart while it comes in: nothing of the file is ever held in memory."""

from __future__ import annotations

from collections.abc import Iterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from bridge_engine.spec.base import is_plain
from service.errors import ApiError

LONGEST_FIELD = 10_000
"""Bytes of a header or of a form field that is not the file."""


class FormReader:
    """`feed` it the body piece by piece; it gives the file's bytes back and keeps the fields.

    Raises `ApiError` 400 for a body that is no multipart form, 422 for a second file.
    """

    def __init__(self, content_type: str) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise _broken("the Content-Type header names no boundary")
        self.filename: str | None = None
        self.fields: dict[str, str] = {}
        self._pieces: list[bytes] = []
        self._whole = False
        self._field: str | None = None
        """The form field being read; None while it is the file."""
        self._text = b""
        self._header, self._value, self._disposition = b"", b"", b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._complete,
            },
        )

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The pieces of the file in this chunk of the body."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _broken(str(error)) from None
        pieces, self._pieces = self._pieces, []
        yield from pieces

    def finish(self) -> str:
        """The file's name; raises if the form ended early or held no file."""
        if not self._whole:
            raise _broken("it ends before its last boundary; send it again")
        if self.filename is None:
            raise ApiError(
                422,
                "missing",
                "the form holds no file; send one as the field `file` (curl: -F file=@data.jsonl)",
                param="file",
            )
        return self.filename

    def _begin(self) -> None:
        self._header, self._value, self._disposition, self._text = b"", b"", b"", b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = _bounded(self._header + data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value = _bounded(self._value + data[start:end])

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _headers_finished(self) -> None:
        options = parse_options_header(self._disposition)[1]
        if b"filename" not in options:
            self._field = options.get(b"name", b"").decode("utf-8", "replace")
            return
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if field != "file":
            raise ApiError(
                422,
                "unknown_field",
                f"the form has a file as the field {field!r}; send it as `file` "
                "(curl: -F file=@data.jsonl)",
                param=field or "file",
                given=field,
                allowed=["file", "name"],
            )
        if self.filename is not None:
            raise ApiError(
                422,
                "too_many_files",
                "one dataset is one file; the form holds several",
                param="file",
            )
        self._field = None
        # Some browsers send a path; only its last part is the name.
        name = options[b"filename"].decode("utf-8", "replace").replace("\\", "/")
        last = name.rpartition("/")[2]
        self.filename = "".join(filter(is_plain, last)) or "upload"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._pieces.append(data[start:end])
        else:
            self._text = _bounded(self._text + data[start:end])

    def _end(self) -> None:
        if self._field is not None:
            self.fields[self._field] = self._text.decode("utf-8", "replace")

    def _complete(self) -> None:
        self._whole = True


def _bounded(value: bytes) -> bytes:
    if len(value) > LONGEST_FIELD:
        raise _broken(f"a field or a header of it is longer than {LONGEST_FIELD} bytes")
    return value


def _broken(why: str) -> ApiError:
    return ApiError(400, "broken_multipart", f"the body is not a multipart form: {why}")
