"""What a scenario found: figures and violations."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

#: A violation that happens a thousand times is told so often.
_MOST_TOLD = 20


@dataclass
class Report:
    """Of one scenario, or of one variant of it.

    Attributes
    ----------
    scenario : str
    seed : int
        With which it can be repeated.
    figures : dict
        What was counted and measured, by name.
    violations : list of str
        What must not have happened.
    """

    scenario: str
    seed: int
    figures: dict[str, Any] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def violated(self, what: str) -> None:
        """Something happened that must not; threads may call this."""
        self.violations.append(what)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "scenario": self.scenario,
            "seed": self.seed,
            "figures": self.figures,
            "violations": self.violations,
        }

    def __str__(self) -> str:
        lines = [f"{self.scenario} (seed {self.seed})"]
        width = max(map(len, self.figures), default=0)
        lines += [f"  {name:{width}}  {_shown(value)}" for name, value in self.figures.items()]
        told = Counter(self.violations)
        lines += [
            f"  VIOLATED{f' {times} times' if times > 1 else ''}: {what}"
            for what, times in list(told.items())[:_MOST_TOLD]
        ]
        if len(told) > _MOST_TOLD:
            lines.append(f"  ... and {len(told) - _MOST_TOLD} more violations")
        return "\n".join(lines)


def _shown(value: Any) -> str:
    return (
        f"{value:,.6g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
