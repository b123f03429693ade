"""`bridge eval …`: score a base model or an adapter, look at scores, compare them."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from bridge_client import evaluations as page
from bridge_client import output, specs
from bridge_client.asking import is_base
from bridge_client.cli_jobs import (
    JobArgument,
    OutputOption,
    PriorityOption,
    ProjectOption,
    connect,
    refuse_mistakes,
    show_dry_run,
    watched,
)
from bridge_client.client import Client
from bridge_client.models import Job
from bridge_client.output import Output


class Evaluations(TyperGroup):
    """`bridge eval MODEL` is short for `bridge eval run MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


evaluations = typer.Typer(
    cls=Evaluations,
    help="Score a model on benchmarks: `bridge eval MODEL --on gsm8k`; compare scores.",
    no_args_is_help=True,
)

SettingsOption = Annotated[
    Optional[list[str]],  # noqa: UP045 - Typer reads the annotation at run time
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any field, e.g. --set sampling.batch_size=8; KEY=@FILE: a file's text.",
    ),
]
DetachOption = Annotated[
    bool, typer.Option("--detach", "-d", help="Print the job's id and do not wait for its end.")
]


@evaluations.command()
def run(
    context: typer.Context,
    subject: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_ADAPTER",
            help="A base model, or an adapter: JOB (its best), JOB@STEP, JOB@latest, an alias.",
        ),
    ],
    on: Annotated[
        list[str],
        typer.Option("--on", help="Benchmarks or datasets, several with commas or repeated."),
    ],
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--limit", "-n", min=1, help="At most so many problems of each."),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="bridge, qwen2.5-math, simplerl or luffy: what is not said here.")
    ] = "bridge",
    samples: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--samples", "-k", min=1, help="Answers to each problem."),
    ] = None,
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="0 always takes the likeliest token."),
    ] = None,
    top_p: Annotated[Optional[float], typer.Option(min=0, max=1)] = None,  # noqa: UP045
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Longest answer."),
    ] = None,
    grader: Annotated[str, typer.Option("--grader", "-g", help="math, numeric or exact.")] = "math",
    seed: Annotated[int, typer.Option(min=0, help="Of all draws.")] = 0,
    settings: SettingsOption = None,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A name for the job."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the full spec; queue nothing.")
    ] = False,
    detach: DetachOption = False,
    priority: PriorityOption = None,
    project: ProjectOption = None,
    output_as: OutputOption = Output.TEXT,
) -> None:
    """Evaluate a model: submits an evaluation job, watches it and prints its scores.

    Exit status: 0 succeeded, 1 failed, 3 cancelled.
    """
    client = connect(context, project)
    sets = [one.strip() for part in on for one in part.split(",")]
    sampling = {
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_tokens,
    }
    spec: dict[str, Any] = {
        "kind": "eval",
        **({"name": name} if name else {}),
        "benchmarks": [_set(one, limit) for one in sets],
        "preset": preset,
        "sampling": {key: value for key, value in sampling.items() if value is not None},
        "grader": grader,
        "seed": seed,
    }
    spec = specs.override(spec, settings or [])
    refuse_mistakes(spec, "the evaluation")
    spec |= _subject(client, subject)
    if dry_run:
        show_dry_run(client, spec, output_as)
        return
    _show(client, client.submit(spec, priority=priority), output_as, detach)


@evaluations.command()
def show(
    context: typer.Context, job_id: JobArgument, output_as: OutputOption = Output.TEXT
) -> None:
    """Print the scores of a finished evaluation."""
    scores = connect(context).scores(job_id)
    if output_as is Output.JSON:
        output.print_json(scores)
    else:
        page.show(scores)


@evaluations.command()
def compare(
    context: typer.Context,
    ours: Annotated[str, typer.Argument(metavar="JOB", help="An evaluation.")],
    theirs: Annotated[str, typer.Argument(metavar="JOB", help="The one it is compared with.")],
    output_as: OutputOption = Output.TEXT,
) -> None:
    """Print the difference of two evaluations, paired by problem, with its 95 % interval."""
    scores = connect(context).scores(ours, against=theirs)
    if output_as is Output.JSON:
        output.print_json(scores.against)
    else:
        page.compare(scores)


@evaluations.command()
def regrade(
    context: typer.Context,
    job_id: JobArgument,
    grader: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--grader", "-g", help="math, numeric or exact; default: as before."),
    ] = None,
    detach: DetachOption = False,
    output_as: OutputOption = Output.TEXT,
) -> None:
    """Judge the answers of a finished evaluation anew, as an evaluation of its own. Nothing is
    sampled."""
    client = connect(context)
    _show(client, client.regrade(job_id, grader=grader), output_as, detach)


@evaluations.command()
def answers(context: typer.Context, job_id: JobArgument) -> None:
    """Print every answer of a finished evaluation with its verdict, a problem a JSON line."""
    for line in connect(context).completions(job_id):
        output.print_json(line, indent=None)


def _set(name: str, limit: int | None) -> dict[str, Any]:
    """A set by its short form, `gsm8k` or `gsm8k/train`, with a limit."""
    from bridge_engine.spec.train import dataset_from_name

    found: dict[str, Any] = dict(dataset_from_name(name))
    return found if limit is None else {**found, "limit": limit}


def _subject(client: Client, name: str) -> dict[str, str]:
    """The adapter of this name, if there is one or can be none but that; else the base model."""
    return {"model" if is_base(client, name) else "adapter": name}


def _show(client: Client, job: Job, output_as: Output, detach: bool) -> None:
    """Follows an evaluation to its end and prints its scores."""
    if detach:
        if output_as is Output.JSON:
            output.print_json(job)
        else:
            output.line(job.id)
        return
    job = watched(client, job)
    if job.status != "succeeded":
        output.print_json(job) if output_as is Output.JSON else output.show_job(job)
        raise typer.Exit(output.EXIT_OF_JOB.get(job.status, output.EXIT_FAILED))
    scores = client.scores(job.id)
    if output_as is Output.JSON:
        output.print_json(scores)
    else:
        page.show(scores)
