"""Problems with a worked solution as training rows, for training on a source's own chains of thought without a teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trl_reasoning_distill.data.conversion import Demonstration, training_row
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources import RejectedRow


def worked_rows(
    problems: Iterable[Problem], response_format: ReasoningFormat
) -> tuple[list[dict[str, Any]], list[RejectedRow]]:
    """A training row for each problem that has a solution and an answer.

    Args:
        problems: Those without either give no row, and no reason: there is nothing to write.
        response_format: How the completions are written.

    Returns:
        Rows as `select` writes them (`prompt`, `completion`, `problem_id`, `kind`, `source`, `answer`), and the problems that this format
        cannot hold, with the reason.
    """
    rows, rejected = [], []
    for problem in problems:
        response = problem.response or problem.answer
        if problem.solution is None or response is None:
            continue
        demonstration = Demonstration(problem.question, problem.solution, response, problem.answer)
        try:
            row = training_row(demonstration, response_format)
        except ValueError as error:
            rejected.append(RejectedRow(problem.id, str(error), "not_rendered", problem.to_row()))
            continue
        rows.append(row | {"problem_id": problem.id, "kind": problem.kind, "source": problem.source})
    return rows, rejected
