"""`python -m bridge_engine run SPEC --dir RUN`: one job's process, complete in its directory.

Exit status: 0 done, 1 failed (the last event says why), 75 stopped by SIGTERM with state saved:
run it again to go on. Run again at any time, it takes up the newest whole checkpoint.

`torchrun --nproc-per-node N -m bridge_engine run …` trains with N processes (docs/scale.md).
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

import yaml

from bridge_engine.distributed.ranks import World, join
from bridge_engine.errors import EngineError
from bridge_engine.evaluation.checks import read_card
from bridge_engine.evaluation.presets import AdapterCard
from bridge_engine.evaluation.spec import EvaluationSpec
from bridge_engine.events import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EventWriter,
    Failed,
    Log,
    Phase,
)
from bridge_engine.process import lifeline
from bridge_engine.process.identity import ProcessIdentity
from bridge_engine.process.memory import is_out_of_memory, out_of_memory
from bridge_engine.spec.job import InvalidSpec, JobSpec, check, fill, parse_spec
from bridge_engine.spec.yaml import load_yaml
from bridge_engine.state.initial_parameters import FOLDER


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bridge_engine", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="do what a spec describes")
    run_parser.add_argument("spec", type=Path, help="YAML or JSON job spec")
    run_parser.add_argument("--dir", type=Path, required=True, help="run directory")
    run_parser.add_argument(
        "--parent-pipe", type=int, help="file descriptor that closes when the parent dies"
    )
    run_parser.add_argument(
        "--deadline", type=int, help="file descriptor of the moment until when the run may go on"
    )
    options = parser.parse_args(arguments)
    if options.parent_pipe is not None:
        lifeline.hold(options.parent_pipe, options.deadline)
    _tell_where_on_request()
    return run(options.spec, options.dir)


def run(spec_path: Path, directory: Path) -> int:
    """Runs a spec file in a directory; every outcome is an event and an exit status."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    directory.mkdir(parents=True, exist_ok=True)
    with join() as world, exclusive(directory, world):
        events = world.events(directory)
        try:
            return _run(read_spec(spec_path, directory), directory, events, stop, world)
        except EngineError as error:  # explains itself: a traceback would only bury it
            if error.category == "oom":  # but for the sizes, which are in it
                traceback.print_exc()
            print(error.message, file=sys.stderr)
            failure = _as_event(error)
        except BaseException as error:
            traceback.print_exc()
            failure = _as_event(error)
        world.fail(failure, events)
        return EXIT_FAILED


def _run(
    spec: JobSpec, directory: Path, events: EventWriter, stop: threading.Event, world: World
) -> int:
    events.emit(Phase(phase="loading"))
    # torch is imported here, after everything that can be refused without it
    from bridge_engine.evaluation.job import Evaluation
    from bridge_engine.process.compute import configure
    from bridge_engine.process.processor import processor
    from bridge_engine.spec.identity import spec_sha256
    from bridge_engine.trainer import Trainer

    environment = configure(spec, world)
    file = directory / "environment.json"
    if world.is_first:
        _say_if_elsewhere(environment, file, events)
    events.emit(Log(message=_as_text(environment)))

    def record(data_sha256: dict[str, str]) -> None:
        hashes = {"spec_sha256": spec_sha256(spec), "data_sha256": data_sha256}
        file.write_text(json.dumps(environment | hashes, indent=1))

    try:
        work: Evaluation | Trainer
        if isinstance(spec, EvaluationSpec):
            made_on = environment | {"processor": processor()}
            work = Evaluation(spec, directory, events, stop.is_set, world, made_on, record)
        else:
            work = Trainer(spec, directory, events, stop.is_set, world, record)
        with work:
            return EXIT_DONE if work.run() else EXIT_STOPPED
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(spec) from error


def _say_if_elsewhere(environment: dict[str, Any], file: Path, events: EventWriter) -> None:
    """Warns if an earlier attempt ran in another environment."""
    if file.exists():
        before = json.loads(file.read_text())
        changed = [
            f"{k}: {before.get(k)} → {v}" for k, v in environment.items() if before.get(k) != v
        ]
        if changed:
            message = "not the machine of the last attempt, so not to the last bit its numbers: "
            events.emit(Log(level="warning", message=message + ", ".join(changed)))


def _as_text(environment: dict[str, Any]) -> str:
    text = f"{environment['device']}, {environment['threads']} threads"
    processes = environment["processes"]
    return text if processes == 1 else f"{processes} processes of {text}"


def read_spec(path: Path, directory: Path | None = None) -> JobSpec:
    """A spec file, validated against everything that is known without computing. `directory` is
    where the adapter lies that an evaluation is of."""
    try:
        document: Any = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror}", code="unreadable_spec") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise EngineError(
            f"{path} is not valid YAML or JSON: {error}", code="invalid_spec"
        ) from None
    if not isinstance(document, dict):
        raise EngineError(f"{path} must hold a mapping of fields", code="invalid_spec")
    try:
        spec = parse_spec(document)
        card = adapter_card(spec, directory)
        problems = check(spec, card)
    except InvalidSpec as error:
        problems = error.errors
    if problems:
        lines = "\n".join(f"  {p.param}: {p.message}" for p in problems)
        raise EngineError(f"{path} is not a valid spec:\n{lines}", code="invalid_spec")
    return fill(spec, card)


def adapter_card(spec: JobSpec, directory: Path | None) -> AdapterCard | None:
    """What the adapter that is to be evaluated says of itself; None where none is loaded."""
    if not isinstance(spec, EvaluationSpec) or spec.adapter is None or directory is None:
        return None
    return None if spec.completions_of is not None else read_card(directory / FOLDER)


class exclusive:
    """Holds the run directory: two engines in one directory would tear each other's files."""

    def __init__(self, directory: Path, world: World) -> None:
        self.path = directory / "engine.lock"
        self.world = world
        self.file: TextIO | None = None

    def __enter__(self) -> None:
        if not self.world.first(self._take):
            raise SystemExit(EXIT_FAILED)

    def _take(self) -> bool:
        import fcntl

        self.file = self.path.open("a")  # "w" would wipe out who holds it
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"another engine is running in {self.path.parent}", file=sys.stderr)
            return False
        self.file.truncate(0)
        me = ProcessIdentity.of(os.getpid())
        self.file.write(json.dumps(me.as_dict() if me else {"pid": os.getpid()}) + "\n")
        self.file.flush()
        return True

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def _as_event(error: BaseException) -> Failed:
    """An exception as the job's error: who is to act, and on what."""
    from bridge_engine.state.checkpoint import is_disk_full

    if isinstance(error, EngineError):
        where = "" if error.step is None else f"at step {error.step}: "
        return Failed(
            step=error.step,
            category=error.category,
            code=error.code,
            message=where + error.message,
            param=error.param,
            retryable=error.retryable,
        )
    if is_disk_full(error):
        return Failed(
            step=None,
            category="infra",
            code="disk_full",
            message=f"the disk is full ({error}); free some space and run the job again, it goes "
            "on from its last checkpoint",
            retryable=True,
        )
    if isinstance(error, KeyboardInterrupt):
        return Failed(step=None, category="infra", code="interrupted", message="interrupted")
    return Failed(
        step=None,
        category="internal",
        code="engine_error",
        message=f"{type(error).__name__}: {error}; the traceback is in the job's log",
    )


def _tell_where_on_request() -> None:
    """Upon SIGUSR1, and in a crash, every thread's stack goes to the log: the worker asks for it
    when nothing has been heard for long."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
