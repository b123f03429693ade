"""`bridge jobs pause|resume|retry|fork|prioritize`, and `bridge projects …`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from bridge_client import output, specs
from bridge_client.cli_jobs import (
    JobArgument,
    OutputOption,
    PriorityOption,
    ProjectOption,
    connect,
    follow,
    jobs,
    queued,
    show_status,
)
from bridge_client.errors import APIStatusError
from bridge_client.models import Project
from bridge_client.output import Output
from bridge_client.text import escape

projects = typer.Typer(help="Projects, their quotas, what they have used.", no_args_is_help=True)

RunningOption = Annotated[
    Optional[int],  # noqa: UP045 - Typer reads the annotation at run time
    typer.Option(min=0, help="Jobs that may run at the same time; default: any number."),
]
HoursOption = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(min=0, help="GPU hours after which none is started any more; default: no limit."),
]


@jobs.command()
def pause(
    context: typer.Context, job_id: JobArgument, output_as: OutputOption = Output.TEXT
) -> None:
    """Pause a job: it saves and leaves its worker until it is resumed."""
    show_status(connect(context).pause(job_id), output_as)


@jobs.command()
def resume(
    context: typer.Context, job_id: JobArgument, output_as: OutputOption = Output.TEXT
) -> None:
    """Resume a paused job. It goes on from its newest checkpoint."""
    show_status(connect(context).resume(job_id), output_as)


@jobs.command()
def retry(
    context: typer.Context, job_id: JobArgument, output_as: OutputOption = Output.TEXT
) -> None:
    """Try a failed or cancelled job again. It goes on from its newest checkpoint."""
    show_status(connect(context).retry(job_id), output_as)


@jobs.command()
def prioritize(
    context: typer.Context,
    job_id: JobArgument,
    priority: Annotated[
        int, typer.Option("--priority", "-p", min=-100, max=100, help="Higher ones go first.")
    ],
    output_as: OutputOption = Output.TEXT,
) -> None:
    """Change the priority of a job that waits."""
    job = connect(context).prioritize(job_id, priority)
    if output_as is Output.JSON:
        output.print_json(job)
    else:
        output.line(f"{job.id} priority {job.priority}")


@jobs.command()
def fork(
    context: typer.Context,
    job_id: JobArgument,
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a field, e.g. --set steps=50; KEY=@FILE: to a file's text.",
        ),
    ] = None,
    from_checkpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Start from its parameters: a step, best or latest.", metavar="STEP"),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Follow the new job to its end.")
    ] = False,
    priority: PriorityOption = None,
    project: ProjectOption = None,
    idempotency_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Forking again with the same key makes no second job."),
    ] = None,
    output_as: OutputOption = Output.TEXT,
) -> None:
    """Make a new job from a job's spec, with changes; the job itself stays as it is."""
    client = connect(context, project)
    step: int | str | None = from_checkpoint
    if from_checkpoint is not None and from_checkpoint.isdecimal():
        step = int(from_checkpoint)
    job = client.fork(
        job_id,
        specs.override({}, settings or []),
        from_checkpoint=step,
        priority=priority,
        idempotency_key=idempotency_key,
    )
    if watch:
        follow(client, job, output_as)
    elif output_as is Output.JSON:
        output.print_json(job)
    else:
        queued(job)


@projects.command("list")
def list_projects(context: typer.Context, output_as: OutputOption = Output.TEXT) -> None:
    """List projects."""
    found = connect(context).projects()
    if output_as is Output.JSON:
        output.print_json(found)
    else:
        output.table(["PROJECT", "NAME", "RUNNING AT MOST", "GPU HOURS", "USED"], map(_row, found))


@projects.command()
def create(
    context: typer.Context,
    project_id: Annotated[str, typer.Argument(metavar="PROJECT", help="The id to name it by.")],
    name: Annotated[Optional[str], typer.Option(help="A name for people.")] = None,  # noqa: UP045
    max_running: RunningOption = None,
    gpu_hours: HoursOption = None,
    output_as: OutputOption = Output.TEXT,
) -> None:
    """Make a project."""
    try:
        made = connect(context).create_project(
            name or project_id, id=project_id, max_running=max_running, gpu_hours=gpu_hours
        )
    except APIStatusError as error:
        if error.code != "project_exists":
            raise
        output.complain(
            f"there is a project {project_id!r} already; `bridge projects update {project_id}` "
            "changes it"
        )
        raise typer.Exit(output.EXIT_FAILED) from None
    _show(made, output_as)


@projects.command()
def update(
    context: typer.Context,
    project_id: Annotated[str, typer.Argument(metavar="PROJECT", help="The project's id.")],
    name: Annotated[Optional[str], typer.Option(help="A name for people.")] = None,  # noqa: UP045
    max_running: RunningOption = None,
    gpu_hours: HoursOption = None,
    output_as: OutputOption = Output.TEXT,
) -> None:
    """Give a project these quotas; one that is left out is lifted. The name stays."""
    client = connect(context)
    named = {project.id: project.name for project in client.projects()}
    changed = client.update_project(
        project_id,
        name or named.get(project_id) or project_id,
        max_running=max_running,
        gpu_hours=gpu_hours,
    )
    _show(changed, output_as)


def _show(project: Project, output_as: Output) -> None:
    if output_as is Output.JSON:
        output.print_json(project)
    else:
        output.line(project.id)


def _row(project: Project) -> list[str]:
    quotas = (project.max_running, project.gpu_hours)
    shown = ["" if quota is None else f"{quota:g}" for quota in quotas]
    return [
        escape(project.id),
        escape(project.name or ""),
        *shown,
        f"{project.gpu_seconds_used / 3600:.2f}",
    ]
