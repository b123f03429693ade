"""The `bridge` command. It imports neither the service nor the engine's torch side: starting it
takes a fraction of a second, and every process it needs is a child of its own."""

from __future__ import annotations

import errno
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from bridge_client import asking, hints, output
from bridge_client._core import default_url
from bridge_client.cli_chat import chat
from bridge_client.cli_control import projects
from bridge_client.cli_eval import evaluations
from bridge_client.cli_jobs import LimitOption, OutputOption, connect, jobs
from bridge_client.client import Client
from bridge_client.errors import (
    APIStatusError,
    BridgeError,
    CannotStartError,
    ConnectionError,
    UsageError,
)
from bridge_client.home import Home
from bridge_client.output import Output
from bridge_client.text import escape


class Commands(TyperGroup):
    """Turns errors into one sentence on standard error and an exit status, in one place."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CannotStartError as error:
            if error.status:
                output.complain(str(error), lines=True)
            else:
                output.note(str(error))
            ctx.exit(error.status)
        except UsageError as error:
            output.complain(str(error), lines=True)
            ctx.exit(output.EXIT_USAGE)
        except ConnectionError as error:
            output.complain(str(error))
            ctx.exit(output.EXIT_UNREACHABLE)
        except APIStatusError as error:
            output.complain(str(error))
            if len(error.errors) > 1:
                output.mistakes(
                    (str(item.get("param", "")), str(item.get("message", "")))
                    for item in error.errors[:20]
                )
            ctx.exit(output.EXIT_USAGE if error.status in (400, 422) else output.EXIT_FAILED)
        except BridgeError as error:
            output.complain(str(error))
            ctx.exit(output.EXIT_FAILED)
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read our output has had enough
                raise
            where = f"{error.filename}: " if error.filename else ""
            output.complain(f"{where}{error.strerror or error}")
            ctx.exit(output.EXIT_FAILED)


app = typer.Typer(
    cls=Commands,
    help="Bridge: train reasoning models with SFT and RL joined, and use what was trained.",
    epilog="Exit status: 0 success, 1 failure, 2 wrong usage or spec, 3 the job was cancelled, "
    "4 no service answers, 130 stopped watching.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Upload datasets and list them.", no_args_is_help=True)
adapters = typer.Typer(help="List trained adapters, or download one.")
app.add_typer(jobs, name="jobs")
app.add_typer(evaluations, name="eval")
app.add_typer(projects, name="projects")
app.add_typer(data, name="data")
app.add_typer(adapters, name="adapters")

HomeOption = Annotated[
    Optional[Path],  # noqa: UP045 - Typer reads the annotation at run time
    typer.Option(
        "--home", envvar="BRIDGE_HOME", help="Folder of the embedded service; default ./.bridge."
    ),
]


@app.callback()
def main(
    context: typer.Context,
    url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            envvar="BRIDGE_URL",
            help="Where the service answers; default: the one `bridge up` started here.",
        ),
    ] = None,
) -> None:
    output.escape_what_cannot_be_shown()
    context.obj = url or default_url()


@app.command()
def up(
    port: Annotated[
        int, typer.Option(envvar="BRIDGE_PORT", min=1, max=65535, help="Port of the API.")
    ] = 8000,
    home: HomeOption = None,
    host: Annotated[
        str, typer.Option(envvar="BRIDGE_HOST", help="Address the API listens on.")
    ] = "127.0.0.1",
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when ready; `bridge down` stops it.")
    ] = False,
) -> None:
    """Start an embedded service: API, worker and inference, with SQLite. Ctrl-C stops it."""
    from bridge_client import supervisor

    place = Home(home)
    running = place.running()
    if running and (running.ready or not detach):
        how = "already runs" if running.ready else "is starting"
        print(f"Bridge {how} in {place.path} at {running.url}")
        print(f"Stop it with `{hints.down(place)}`.")
        return
    if detach:
        state = supervisor.detach(place, port, host)
        print(f"Bridge is ready at {state.url} (logs in {place.logs})")
        print(f"Stop it with `{hints.down(place)}`.")
        for hint in hints.elsewhere(place, state.url):
            print(hint)
        return
    place.create()
    print(f"Starting Bridge in {place.path} (logs in {place.logs}) …", flush=True)
    status = supervisor.serve(place, port, host, lambda line: print(line, flush=True))
    print("Bridge has stopped.")
    raise typer.Exit(status)


@app.command()
def down(home: HomeOption = None) -> None:
    """Stop the embedded service. A running job saves its state and goes on at the next start."""
    from bridge_client import supervisor

    place = Home(home)
    there = place.answering()
    interrupted = _running_jobs(there.url) if there else []
    stopped = supervisor.stop(place)
    if stopped is None:
        print(f"Nothing runs in {place.path}.")
    elif stopped.leftovers:
        print(f"The supervisor of {stopped.url} had been killed.")
        print(f"Stopped what it had left running: {', '.join(stopped.leftovers)}.")
    else:
        print(f"Bridge at {stopped.url} has stopped.")
    for job_id in interrupted:
        output.line(f"{job_id} was running: it goes on at the next `bridge up`.")


def _running_jobs(url: str) -> list[str]:
    """The jobs that run, of every project; none where the service does not say."""
    try:
        with Client(url, timeout=5, retries=0) as client:
            projects = client.projects()
        found = []
        for project in projects:
            with Client(url, project=project.id, timeout=5, retries=0) as client:
                found += [job.id for job in client.jobs(status="running")]
        return found
    except BridgeError:
        return []


@app.command()
def demo(
    home: HomeOption = None,
    port: Annotated[
        int, typer.Option(envvar="BRIDGE_PORT", min=1, max=65535, help="Port to prefer.")
    ] = 8000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training run.")] = 0,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Optimisation steps; default: those of the demo's spec."),
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the service at the end.")] = False,
) -> None:
    """Train a tiny model with BRIDGE on arithmetic, watch it learn, ask it a question."""
    from bridge_client.demo import run

    raise typer.Exit(run(Home(home), port=port, seed=seed, steps=steps, stop_after=stop))


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The problem, as in the training data.")],
    adapter: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--adapter", "-a", help="JOB (its best), JOB@STEP, JOB@best or JOB@latest."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--model",
            "-m",
            help="A base model, to see what it says untrained, in its own chat template, if any.",
        ),
    ] = None,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Longest answer, in tokens."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest.")] = 0.0,
    n: Annotated[int, typer.Option("-n", min=1, help="How many answers.")] = 1,
    seed: Annotated[Optional[int], typer.Option(help="Of the sampling.")] = None,  # noqa: UP045
    raw: Annotated[
        bool, typer.Option("--raw", help="The prompt as it is, without a template.")
    ] = False,
    output_as: OutputOption = Output.TEXT,
) -> None:
    """Let a trained adapter answer. Only the answer is printed."""
    if (adapter is None) == (model is None):
        raise typer.BadParameter("give one of --adapter and --model; see `bridge adapters`")
    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "n": n}
    settings |= {"seed": seed, "raw": raw or None}
    client = connect(context)
    if model is not None:
        answer = asking.generate(client, prompt, model, **settings)
    else:
        answer = client.generate(prompt, adapter=adapter, **settings)
    if output_as is Output.JSON:
        output.print_json(answer)
    else:
        output.show_generation(answer)


app.command()(chat)


@app.command()
def alias(
    context: typer.Context,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="A name of your own; without it all of them are listed."),
    ] = None,
    adapter: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="The adapter it shall mean: JOB (its best), JOB@STEP, JOB@latest."),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Forget the name.")] = False,
) -> None:
    """Give an adapter a name of your own, move it to another, or list such names."""
    client = connect(context)
    if name is None:
        rows = [
            [escape(a.name), escape(a.adapter), output.when(a.updated_at)] for a in client.aliases()
        ]
        output.table(["ALIAS", "ADAPTER", "SINCE"], rows)
    elif delete and adapter is None:
        client.delete_alias(name)
    elif adapter is not None and not delete:
        output.line(client.set_alias(name, adapter).adapter)
    else:
        raise typer.BadParameter("give an adapter, or --delete")


@adapters.callback(invoke_without_command=True)
def list_adapters(
    context: typer.Context, limit: LimitOption = 20, output_as: OutputOption = Output.TEXT
) -> None:
    """List trained adapters, or download one."""
    if context.invoked_subcommand is not None:
        return
    found = list(islice(connect(context).adapters(page_size=limit), limit))
    if output_as is Output.JSON:
        output.print_json(found)
    else:
        output.show_adapters(found)


@app.command("grade")
def grade_answers(
    grader: Annotated[
        str, typer.Option("--grader", "-g", help="`math`, `numeric` or `exact`.")
    ] = "math",
    tolerance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="Relative, for measured numbers; default 0.01."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds of computing for one answer.")
    ] = 5.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that judge.")] = 1,
    file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--file", "-f", exists=True, dir_okay=False, help="Instead of stdin."),
    ] = None,
) -> None:
    """Judge JSON lines {gold, answer} from standard input; write each with its verdict and reason.

    Needs no service. Exit status 1 if a line could not be read; the others are judged all the same.
    """
    import sys

    from pydantic import ValidationError

    from bridge_client import grading
    from bridge_engine.rewards.graders import GraderSpec

    try:
        spec = GraderSpec.model_validate({"name": grader, "tolerance": tolerance})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise typer.BadParameter(f"{first['loc'][0]}: {first['msg']}") from None
    with file.open("rb") if file else sys.stdin.buffer as source:
        counts = grading.run(
            (line.decode("utf-8", "replace") for line in source),
            spec,
            timeout=timeout,
            workers=workers,
            write=lambda line: print(line, flush=True),
            complain=output.complain,
        )
    shown = ", ".join(f"{counts[name]} {name}" for name in ("right", "wrong", "unjudged"))
    output.err().print(shown + (f", {counts['bad']} unreadable" if counts["bad"] else ""))
    if counts["bad"]:
        raise typer.Exit(output.EXIT_FAILED)


@adapters.command()
def download(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="JOB (its best), JOB@STEP, JOB@best, JOB@latest.")],
    to: Annotated[Path, typer.Option(file_okay=False, help="Folder to download it into.")] = Path(
        "."
    ),
    unpack: Annotated[
        bool, typer.Option("--unpack", help="Leave the folder that PEFT loads, not the archive.")
    ] = False,
) -> None:
    """Download an adapter and verify it; prints the path of the zip archive."""
    print(connect(context).download_adapter(name, to, unpack=unpack))


@app.command()
def methods(output_as: OutputOption = Output.TEXT) -> None:
    """List the training methods and their options. Needs no service."""
    from bridge_client import methods as page

    if output_as is Output.JSON:
        output.print_json(page.describe())
    else:
        page.show()


@data.command()
def upload(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True)],
    output_as: OutputOption = Output.TEXT,
) -> None:
    """Upload a dataset and print its id, which is its name in a spec."""
    dataset = connect(context).upload(file)
    if output_as is Output.JSON:
        output.print_json(dataset)
    else:
        output.line(dataset.id)
        output.err().print(f"{dataset.rows} rows, {dataset.with_solution} with a worked solution")


@data.command("list")
def list_data(context: typer.Context, output_as: OutputOption = Output.TEXT) -> None:
    """List uploaded datasets."""
    found = list(connect(context).datasets())
    if output_as is Output.JSON:
        output.print_json(found)
    else:
        rows = [
            [escape(d.id), escape(d.name or ""), str(d.rows or 0), str(d.with_solution or 0)]
            for d in found
        ]
        output.table(["DATASET", "NAME", "ROWS", "WITH SOLUTION"], rows)


if __name__ == "__main__":
    app()
