"""What can be wrong with one line of a batch. It becomes an error line of the output and concerns no other line."""

from __future__ import annotations


class LineError(Exception):
    """A line that cannot be answered.

    Attributes:
        code: OpenAI's word for the reason ("invalid_json_line", "context_length_exceeded", ...).
        param: the field of the request's body that is to blame, or None.
        status: 400 where the body is at fault, as a server would have answered; None where the line is no request.
    """

    def __init__(self, code: str, message: str, *, param: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.status = status


def invalid_body(code: str, message: str, param: str | None = None) -> LineError:
    """An error of the request's body."""
    return LineError(code, message, param=param, status=400)
