"""POST /graders/run."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import APIRouter, Depends, Request

from bridge_engine.rewards import stated_answer
from bridge_engine.rewards.verifier import VERSION
from service.body import parse, read_body
from service.errors import responses
from service.graders.bench import GradingBench
from service.graders.schemas import EXAMPLES, Grade, GradersRun, Grades

router = APIRouter(prefix="/graders", tags=["graders"])

Body = Annotated[tuple[bytes, str], Depends(read_body)]


def _bench(request: Request) -> GradingBench:
    return cast(GradingBench, request.app.state.grading)


@router.post(
    "/run",
    operation_id="run_grader",
    summary="Try a grader",
    responses=responses(400, 413, 415, 422, 429),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/GradersRun"},
                    "examples": EXAMPLES,
                }
            },
        }
    },
)
def run_grader(body: Body, bench: Annotated[GradingBench, Depends(_bench)]) -> Grades:
    """Judges given answers as a job would, before one is launched.

    Each answer has two seconds and the whole request sixty; what is not judged by then is unjudged.
    """
    asked = parse(body, GradersRun)
    cases = [item.case() for item in asked.items]
    verdicts = bench.run(asked.grader, cases)
    data = [
        Grade.of(verdict, stated_answer(case.text, case.prompt))
        for verdict, case in zip(verdicts, cases, strict=True)
    ]
    names = [grade.verdict for grade in data]
    return Grades(
        grader=asked.grader,
        version=VERSION,
        data=data,
        right=names.count("right"),
        wrong=names.count("wrong"),
        unjudged=names.count("unjudged"),
    )
