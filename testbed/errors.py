"""Every error the testbed raises on purpose, and the exit status each one ends a command with.

::

    TestbedError                 1
    ├── InputError               2  what the user gave is wrong
    │   └── ManifestError        2  the YAML is wrong: every problem, each with file:line
    ├── ApiError                 1  the API refused: code, reason, message, causes (a Kubernetes Status)
    ├── PoolExhausted            1  no free address or port is left
    ├── LabError                 3  a lab could not be started, reached or stopped
    ├── KernelError              3  the kernel or a tool refused
    │   ├── MissingFeature       3  a tool, module or kernel feature is not there
    │   ├── LockHeld             3  another process holds the tool's lock
    │   ├── CommandError         3  argv, where it ran, exit status, stderr
    │   ├── RulesRejected        3  the line, its neighbours, the reason
    │   └── NotPresent           3  the link, namespace or rule is not there
    └── ExpectationFailed        1  it ran; the network did something else

Messages say what was tried, on which named thing, and what was found: lower case, no full stop, a user's values quoted.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class TestbedError(Exception):
    """Something the testbed can explain; ``exit_status`` is what a command that meets it ends with."""

    __test__ = False  # pytest: not a test class
    exit_status = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes whole, whatever a subclass's constructor takes."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[TestbedError], args: tuple[Any, ...], attributes: dict[str, Any]) -> TestbedError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class InputError(TestbedError):
    """What the user typed or wrote is wrong."""

    exit_status = 2


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing wrong with one place of a file. ``line`` counts from 1; 0 means the whole file."""

    file: str
    line: int
    message: str
    warning: bool = False

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {'warning: ' if self.warning else ''}{self.message}"


class ManifestError(InputError):
    """The YAML is wrong; ``problems`` holds every problem found, in file order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems))
        super().__init__("\n".join(str(problem) for problem in self.problems))


@dataclass(frozen=True, slots=True)
class Cause:
    """One field problem of an object, in the words of Kubernetes' ``field.Error``."""

    field: str
    message: str  # without the field: 'Invalid value: 80: provided port is not in the valid range…'
    reason: str = "FieldValueInvalid"

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class ApiError(TestbedError):
    """The API refused a request. Becomes a Kubernetes Status object at the HTTP face."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        causes: Sequence[Cause] = (),
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.code = code
        self.reason = reason
        self.message = message
        self.causes = tuple(causes)
        self.details = dict(details or {})
        super().__init__(message)


class PoolExhausted(TestbedError):
    """No free address or port is left in the pool."""


class LabError(TestbedError):
    """A lab could not be started, reached or stopped."""

    exit_status = 3


class KernelError(TestbedError):
    """The kernel, or a program that sets it up, refused."""

    exit_status = 3


class MissingFeature(KernelError):
    """A tool, a kernel module or a kernel feature that this needs is not there."""


class CommandError(KernelError):
    """A program ended with a status other than 0; the message can be pasted into a shell."""

    def __init__(self, argv: Sequence[str], status: int, stderr: str, *, where: str = "") -> None:
        self.argv = tuple(argv)
        self.status = status
        self.stderr = stderr
        self.where = where
        prefix = f"{where}: " if where else ""
        super().__init__(f"{prefix}`{shlex.join(argv)}` ended with status {status}: {stderr.strip() or '(no message)'}")


class LockHeld(KernelError):
    """Another process holds the lock that a tool needs."""


class RulesRejected(KernelError):
    """A rule file was refused; nothing of it is in effect. ``line_numbers`` are all that were complained about, from 1."""

    def __init__(
        self, tool: str, line_number: int, context: Sequence[str], reason: str, line_numbers: Sequence[int] = ()
    ) -> None:
        self.tool = tool
        self.line_number = line_number
        self.line_numbers = tuple(line_numbers) or (line_number,)
        self.context = tuple(context)
        self.reason = reason
        shown = "".join(f"\n    {line}" for line in context)
        super().__init__(f"{tool} refused line {line_number}: {reason}{shown}")


class NotPresent(KernelError):
    """The link, namespace, process or rule is not there."""


class ExpectationFailed(TestbedError):
    """Everything ran, and the network did something other than what was wanted."""
