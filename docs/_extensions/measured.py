"""A directive for measured figures: a table from benchmarks/results, so that no number is typed twice.

```{measured} what_does_a_whitening_step_cost
:where: job=lenet*
:columns: job, candidate, ratio to SGD
```
"""

from __future__ import annotations

import fnmatch
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from benchmarks.report import questions
from benchmarks.results_tables import environment_line, load, markdown, tables


class Measured(SphinxDirective):
    """The rows of a result, chosen, and where they were measured."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"where": directives.unchanged, "columns": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Nodes of the table."""
        name = self.arguments[0]
        if name not in questions():
            raise self.error(f"{name}: there is no such benchmark")
        record = load(name)
        if record is None:
            return self._parsed([f"*Not measured yet:* `{name}`."])
        where = [pair.split("=", 1) for pair in self.options.get("where", "").split("; ") if pair]
        columns = [column.strip() for column in self.options.get("columns", "").split("; ") if column]
        for rows in tables(record).values():
            of = [row for row in rows if all(fnmatch.fnmatchcase(str(row.get(key)), text) for key, text in where)]
            if of and all(any(column in row for row in of) for column in columns):
                return self._parsed([*markdown(of, columns).splitlines(), "", environment_line(record)])
        return self._parsed([f"*Not measured yet in this form:* `{name}`."])

    def _parsed(self, lines: list[str]) -> list[nodes.Node]:
        container = nodes.container()
        self.state.nested_parse(StringList(lines, source="benchmarks/results"), 0, container)
        return list(container.children)


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True}
