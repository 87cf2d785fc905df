"""Everything bake refuses, one class per kind of refusal, one exit code per family.

    BakeError                  1    a bug in bake, when nothing more precise is raised
    ├── UsageError             2    a request that cannot be meant as it is written
    │   └── AdapterNotFound         no adapter, or several, of that name
    ├── InputError             3    a file that cannot be read or is malformed
    │   ├── HeaderError             a safetensors header that breaks the format
    │   ├── FolderError             a model folder whose parts do not agree
    │   ├── PickleRefused           a pickle that wants to run code, or is packed suspiciously
    │   └── InputChanged            a file that changed while it was being used
    ├── UnmatchedModules       4    adapter modules that have no place in the base
    ├── Mismatch               5
    │   ├── FamilyMismatch          adapter and base belong to different model families
    │   ├── ShapeMismatch           a module's update does not fit the tensor it names
    │   ├── AlreadyFused            an adapter is in the base already, and --strict was asked for
    │   └── DuplicateTarget         two modules of one adapter update the same rows
    ├── Unsupported            6    recognised, but not something bake can fuse
    ├── NonFinite              7    NaN or infinity in the input, or overflow of the output dtype
    ├── OutputRefused          8
    │   ├── OutputExists            the output is there already
    │   ├── SameFile                the output is one of the inputs
    │   ├── OutputBusy              another bake is writing this output right now
    │   └── NoSpace                 the disk cannot hold the output
    ├── VerificationFailed     9    the written file is not what was planned
    └── Interrupted            130  Ctrl-C, or 143 for SIGTERM, 129 for SIGHUP

`code` is stable and meant for programs; `details` holds whatever names the fault precisely.
"""

from __future__ import annotations

from typing import Any, ClassVar


class BakeError(Exception):
    """Something bake has no better name for: a bug in bake.

    Of every refusal `message` is for people, `code` and `details` are for programs.
    """

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "internal"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return self.message


class UsageError(BakeError):
    """The request cannot be meant as it is written."""

    exit_code = 2
    code = "usage"


class AdapterNotFound(UsageError):
    """No adapter answers to this name, or more than one does."""

    code = "adapter-not-found"


class InputError(BakeError):
    """A file cannot be read, or is not what its format promises."""

    exit_code = 3
    code = "unreadable"


class HeaderError(InputError):
    """A safetensors header breaks a rule of the format."""

    code = "malformed-header"


class FolderError(InputError):
    """A model folder lacks a part, or its index and its shards disagree."""

    code = "malformed-folder"


class PickleRefused(InputError):
    """A pickle asks for more than tensors and plain containers."""

    code = "pickle-refused"


class InputChanged(InputError):
    """A file is no longer the one that was planned with."""

    code = "input-changed"


class UnmatchedModules(BakeError):
    """Some or all modules of an adapter have no place in the base."""

    exit_code = 4
    code = "unmatched-modules"


class Mismatch(BakeError):
    """Adapter and base do not fit together."""

    exit_code = 5
    code = "mismatch"


class FamilyMismatch(Mismatch):
    """The adapter was made for another model family."""

    code = "family-mismatch"


class ShapeMismatch(Mismatch):
    """A module's update has another shape than the tensor it names."""

    code = "shape-mismatch"


class AlreadyFused(Mismatch):
    """An adapter is in the base already, and that was to be refused."""

    code = "already-fused"


class DuplicateTarget(Mismatch):
    """Two different modules of one adapter update the same rows of the same tensor."""

    code = "duplicate-target"


class Unsupported(BakeError):
    """The file is recognised, but it is nothing bake can fuse."""

    exit_code = 6
    code = "unsupported"


class NonFinite(BakeError):
    """NaN or infinity in an input, or a sum that overflows the output dtype."""

    exit_code = 7
    code = "non-finite"


class OutputRefused(BakeError):
    """The output cannot be written where it was asked for."""

    exit_code = 8
    code = "output-refused"


class OutputExists(OutputRefused):
    """There is a file or folder at the output path already."""

    code = "output-exists"


class SameFile(OutputRefused):
    """The output is one of the inputs."""

    code = "output-is-input"


class OutputBusy(OutputRefused):
    """Another process is writing this output at this moment."""

    code = "output-busy"


class NoSpace(OutputRefused):
    """The disk cannot hold the output."""

    code = "no-space"


class VerificationFailed(BakeError):
    """What was written differs from what was planned."""

    exit_code = 9
    code = "verification-failed"


class Interrupted(BakeError):
    """The user or the system asked bake to stop."""

    exit_code = 130
    code = "interrupted"
