"""`bridge jobs …`: submit, look at, follow and cancel jobs. What else steers them is in
`cli_control`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from bridge_client import comparison, output, specs
from bridge_client.client import Client
from bridge_client.models import Job
from bridge_client.output import Output
from bridge_client.text import plain

jobs = typer.Typer(help="Submit, look at, follow and steer jobs.", no_args_is_help=True)

OutputOption = Annotated[
    Output, typer.Option("-o", "--output", help="`json` prints pure JSON on standard output.")
]
JobArgument = Annotated[str, typer.Argument(help="The job's id.", metavar="JOB")]
LimitOption = Annotated[
    int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many.")
]


ProjectOption = Annotated[
    Optional[str],  # noqa: UP045 - Typer reads the annotation at run time
    typer.Option("--project", envvar="BRIDGE_PROJECT", help="The project's id."),
]
PriorityOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=-100, max=100, help="Jobs of a higher one are started first; default 0."),
]


def connect(context: typer.Context, project: str | None = None) -> Client:
    """A client of the service this command line is meant for; closed when the command ends."""
    return context.with_resource(Client(context.find_root().obj, project=project))


@jobs.command()
def submit(
    context: typer.Context,
    spec: Annotated[Path, typer.Argument(help="A YAML or JSON file.", metavar="SPEC")],
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045 - Typer reads the annotation at run time
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a field, e.g. --set steps=50; KEY=@FILE: to a file's text.",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Follow the job to its end.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the full spec; queue nothing.")
    ] = False,
    idempotency_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Submitting again with the same key makes no second job."),
    ] = None,
    priority: PriorityOption = None,
    project: ProjectOption = None,
    output_as: OutputOption = Output.TEXT,
) -> None:
    """Submit a job. A spec that cannot be right is refused before anything is sent.

    Exit status with --watch: 0 succeeded, 1 failed, 3 cancelled.
    """
    job_spec = specs.override(specs.read(spec), settings or [])
    refuse_mistakes(job_spec, str(spec))
    client = connect(context, project)
    if dry_run:
        show_dry_run(client, job_spec, output_as)
        return
    job = client.submit(job_spec, idempotency_key=idempotency_key, priority=priority)
    if watch:
        follow(client, job, output_as)
    elif output_as is Output.JSON:
        output.print_json(job)
    else:
        queued(job)


@jobs.command("list")
def list_jobs(
    context: typer.Context,
    limit: LimitOption = 20,
    status: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Only jobs of this status, e.g. running."),
    ] = None,
    kind: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Only jobs of this kind: train or eval."),
    ] = None,
    project: ProjectOption = None,
    output_as: OutputOption = Output.TEXT,
) -> None:
    """List jobs, newest first."""
    client = connect(context, project)
    jobs_there = client.jobs(status=status, kind=kind, page_size=min(limit, 100))
    found = list(islice(jobs_there, limit))
    if output_as is Output.JSON:
        output.print_json(found)
    elif not found:
        output.err().print("no jobs; submit one with `bridge jobs submit SPEC`")
    else:
        columns = ["JOB", "STATUS", "METHOD", "MODEL", "STEP", "LATEST", "CREATED", "NAME"]
        output.table(columns, [output.job_row(job) for job in found])


@jobs.command()
def show(
    context: typer.Context, job_id: JobArgument, output_as: OutputOption = Output.TEXT
) -> None:
    """Show one job: where it stands, how it ended, its adapter."""
    job = connect(context).job(job_id)
    if output_as is Output.JSON:
        output.print_json(job)
    else:
        output.show_job(job)


@jobs.command()
def watch(
    context: typer.Context, job_id: JobArgument, output_as: OutputOption = Output.TEXT
) -> None:
    """Follow a job to its end. Ctrl-C stops watching, not the job.

    Exit status: 0 succeeded, 1 failed, 3 cancelled.
    """
    client = connect(context)
    follow(client, client.job(job_id), output_as)


@jobs.command()
def cancel(
    context: typer.Context, job_id: JobArgument, output_as: OutputOption = Output.TEXT
) -> None:
    """Cancel a job. What it has trained and saved so far is kept."""
    show_status(connect(context).cancel(job_id), output_as)


@jobs.command()
def delete(
    context: typer.Context,
    job_id: JobArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a job that has ended: its figures, checkpoints and adapters."""
    client = connect(context)
    if not yes:
        _confirm_deletion(client, job_id)
    client.delete(job_id)


def _confirm_deletion(client: Client, job_id: str) -> None:
    """Asks, unless there is nothing to ask: a job that has not ended cannot be deleted."""
    job = client.job(job_id)
    if not job.terminal:
        first = "" if job.status == "cancelling" else f"`bridge jobs cancel {job_id}`, "
        output.complain(f"{job_id} is {job.status}: {first}wait for its end, then delete it")
        raise typer.Exit(output.EXIT_FAILED)
    names = [one.name for one in client.aliases() if one.adapter.startswith(f"{job_id}@")]
    aliases = "".join(f", and the alias {name}" for name in names)
    question = f"Delete {job_id} with all its checkpoints and adapters{aliases}?"
    typer.confirm(plain(question), abort=True)


@jobs.command()
def logs(
    context: typer.Context,
    job_id: JobArgument,
    tail: Annotated[int, typer.Option(min=1, help="At most this many lines, the last ones.")] = 200,
) -> None:
    """Print what the training process of a job wrote."""
    logged = connect(context).logs(job_id, tail=tail)
    if not logged:
        output.note(f"{job_id} has logged nothing")
    print(plain(logged, lines=True), end="")


@jobs.command()
def metrics(
    context: typer.Context,
    job_id: JobArgument,
    keys: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--key", "-k", help="Only this metric; may be given several times."),
    ] = None,
    output_as: OutputOption = Output.TEXT,
) -> None:
    """Show a job's metrics: a summary as text, every point as JSON."""
    found = connect(context).metrics(job_id, keys=keys)
    if output_as is Output.JSON:
        output.print_json(found)
    else:
        output.show_metrics(found)


@jobs.command()
def compare(
    context: typer.Context,
    job_ids: Annotated[list[str], typer.Argument(help="Training jobs.", metavar="JOB JOB…")],
    output_as: OutputOption = Output.TEXT,
) -> None:
    """Put training jobs side by side, the best first, with what each has cost.

    Says in which fields their specs differ beside method and seed: such jobs were not asked alike.
    """
    client = connect(context)
    found = [client.job(job_id) for job_id in dict.fromkeys(job_ids)]
    for job in found:
        if job.kind != "train":
            raise typer.BadParameter(
                f"{job.id} is an evaluation; `bridge eval compare` compares those"
            )
    compared = comparison.compare(found)
    if output_as is Output.JSON:
        output.print_json(compared)
    else:
        comparison.show(compared)


def refuse_mistakes(spec: dict[str, Any], name: str) -> None:
    """Leaves with what is wrong about a spec, as far as it can be known here."""
    problems = specs.problems(spec)
    if problems:
        many = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        output.complain(f"{name} has {many}; nothing was sent")
        output.mistakes((problem.param, problem.message) for problem in problems)
        raise typer.Exit(output.EXIT_USAGE)


def show_dry_run(client: Client, spec: dict[str, Any], output_as: Output) -> None:
    """What the service would make of the spec, and what it would cost."""
    resolved = client.dry_run(spec)
    if output_as is Output.JSON:
        output.print_json(resolved)
    else:
        print(_yaml(resolved.spec), end="")
        output.err().print("[bold]estimates[/]")
        output.err().print(_yaml(resolved.estimates), markup=False, end="")
        for warning in resolved.warnings:
            output.note(f"warning: {warning}")


def queued(job: Job) -> None:
    """The id alone on standard output, and how to go on."""
    output.line(job.id)
    output.note(f"{job.status}; follow it with `bridge jobs watch {job.id}`")


def show_status(job: Job, output_as: Output) -> None:
    """The id and the status, for whoever asked for another one."""
    if output_as is Output.JSON:
        output.print_json(job)
    else:
        output.line(f"{job.id} {job.status}")


def follow(client: Client, job: Job, output_as: Output) -> None:
    """Watches a job to its end, says how it ended, and leaves with its exit status."""
    job = watched(client, job)
    if output_as is Output.JSON:
        output.print_json(job)
    else:
        output.show_job(job)
    raise typer.Exit(output.EXIT_OF_JOB.get(job.status, output.EXIT_FAILED))


def watched(client: Client, job: Job) -> Job:
    """Watches a job to its end; the job as it ended."""
    try:
        told = f"watching {job.id} ({job.status}); Ctrl-C stops the watching, not the job"
        output.note(told)
        return client.wait(job.id, progress=True)
    except KeyboardInterrupt:
        output.note("")
        output.note(
            f"No longer watching; {job.id} goes on. Watch again with `bridge jobs watch "
            f"{job.id}`, end it with `bridge jobs cancel {job.id}`."
        )
        raise typer.Exit(output.EXIT_DETACHED) from None


def _yaml(value: Any) -> str:
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
