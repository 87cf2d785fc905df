"""What a verification found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_LISTED = 20


@dataclass
class Report:
    """Counts and findings; `ok` means that nothing at all was found wrong."""

    mode: str  # "sample" or "full"
    untouched_tensors: int = 0
    untouched_bytes: int = 0  # compared with the base
    untouched_identical: bool = True
    touched_tensors: int = 0  # recomputed, wholly or in part
    elements: int = 0  # recomputed in float64
    equal: int = 0  # of these, equal to the float64 value rounded once
    max_ulp: float = 0.0  # largest error, in units of the last place of the larger of base and result
    worst: str | None = None  # tensor with that error
    embeddings: int = 0  # appended to a model, or files beside it, compared with what the adapters hold
    embeddings_not_found: list[str] = field(default_factory=list)  # files beside it that are not there any more
    findings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def equal_share(self) -> float:
        """Share of the recomputed elements that are correctly rounded; 1 where none were touched."""
        return self.equal / self.elements if self.elements else 1.0

    def include(self, other: Report) -> None:
        """Add what another report, on further tensors, has found."""
        self.touched_tensors += other.touched_tensors
        self.elements += other.elements
        self.equal += other.equal
        if self.worst is None or other.max_ulp > self.max_ulp:
            self.max_ulp, self.worst = max(self.max_ulp, other.max_ulp), other.worst
        self.findings += other.findings

    def add(self, finding: str) -> None:
        self.findings.append(finding)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return {
            "ok": self.ok,
            "mode": self.mode,
            "untouched_identical": self.untouched_identical,
            "untouched": {"tensors": self.untouched_tensors, "bytes": self.untouched_bytes},
            "touched": {"tensors": self.touched_tensors},
            "elements": self.elements,
            "equal": self.equal,
            "equal_share": self.equal_share,
            "max_ulp": self.max_ulp,
            "worst": self.worst,
            "embeddings": {"checked": self.embeddings, "not_found": self.embeddings_not_found},
            "findings": self.findings,
        }

    def summary(self) -> str:
        """The findings as text, the first few of them."""
        more = f"\n... and {len(self.findings) - _LISTED} more" if len(self.findings) > _LISTED else ""
        return "\n".join(self.findings[:_LISTED]) + more
