"""The result of a command executed in a guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class Result(str):
    """Standard output of a command as text, with the rest of the outcome as attributes.

    It *is* the output, so it can be compared, split and searched like any string; its truth value
    is `ok`, not whether there was output.

    Attributes:
        stdout: Standard output.
        stderr: Standard error.
        return_code: The exit status; -1 if the connection ended before it came.
    """

    __slots__ = ("return_code", "stderr", "stdout")

    stdout: str
    stderr: str
    return_code: int

    if TYPE_CHECKING:
        # A program's `keys = execute(...); keys += execute(...).stdout` has a text in the end.
        def __iadd__(self, other: str) -> Any: ...

    def __new__(cls, stdout: str, stderr: str = "", return_code: int = 0) -> Result:
        """Make a result from both outputs and the exit status."""
        self = super().__new__(cls, stdout)
        self.stdout = stdout
        self.stderr = stderr
        self.return_code = return_code
        return self

    def __getnewargs__(self) -> tuple[str, str, int]:  # type: ignore[override]
        """Pickle and copy with all three parts."""
        return (self.stdout, self.stderr, self.return_code)

    @property
    def ok(self) -> bool:
        """Whether the command ended with exit status 0."""
        return self.return_code == 0

    @property
    def failed(self) -> bool:
        """Whether the command ended with another exit status than 0."""
        return not self.ok

    def __bool__(self) -> bool:
        return self.ok
