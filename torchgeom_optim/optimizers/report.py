"""Which parameter of a model gets which rule."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ParameterRule", "RuleReport"]


class ParameterRule(NamedTuple):
    """One row of a :class:`RuleReport`.

    Attributes:
        name: as in ``model.named_parameters()``, or the place in the groups where no model was given.
        shape: of the parameter.
        rule: that it gets.
        note: why, where it is not plain.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    note: str


class RuleReport(tuple[ParameterRule, ...]):
    """Every parameter with the rule that it gets; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("parameter", "shape", "rule", "note")]
        rows += [(r.name, "x".join(map(str, r.shape)) or "scalar", r.rule, r.note) for r in self]
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[3]] for row in rows]
        return "\n".join("  ".join(line).rstrip() for line in lines)
