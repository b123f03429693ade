"""`python -m bridge_engine run SPEC --dir RUN`: one training process, complete in its directory.

Exit status: 0 done, 1 failed (the last event says why), 75 stopped by SIGTERM with state saved:
run it again to go on. Run again at any time, it takes up the newest whole checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bridge_engine.errors import EngineError
from bridge_engine.events import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EventWriter,
    Failed,
    Log,
    Phase,
)
from bridge_engine.spec import TrainSpec
from bridge_engine.spec_checks import check_spec, fill_defaults
from bridge_engine.spec_errors import field_errors
from bridge_engine.spec_yaml import load_yaml


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bridge_engine", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="train what a spec describes")
    run_parser.add_argument("spec", type=Path, help="YAML or JSON job spec")
    run_parser.add_argument("--dir", type=Path, required=True, help="run directory")
    run_parser.add_argument(
        "--parent-pipe", type=int, help="file descriptor that closes when the parent dies"
    )
    options = parser.parse_args(arguments)
    if options.parent_pipe is not None:
        _die_with_parent(options.parent_pipe)
    return run(options.spec, options.dir)


def run(spec_path: Path, directory: Path) -> int:
    """Runs a spec file in a directory; every outcome is an event and an exit status."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive(directory):
        events = EventWriter(directory)
        try:
            return _train(read_spec(spec_path), directory, events, stop)
        except EngineError as error:  # explains itself: a traceback would only bury it
            print(error.message, file=sys.stderr)
            events.emit(_as_event(error))
        except BaseException as error:
            traceback.print_exc()
            events.emit(_as_event(error))
        return EXIT_FAILED


def _train(spec: TrainSpec, directory: Path, events: EventWriter, stop: threading.Event) -> int:
    events.emit(Phase(phase="loading"))
    # torch is imported here, after everything that can be refused without it
    from bridge_engine.compute import configure
    from bridge_engine.trainer import Trainer

    environment = configure(spec)
    _record(environment, directory / "environment.json", events)
    events.emit(Log(message=f"{environment['device']}, {environment['threads']} threads"))
    trainer = Trainer(spec, directory, events, stop_requested=stop.is_set)
    with trainer.verifier:
        return EXIT_DONE if trainer.run() else EXIT_STOPPED


def _record(environment: dict[str, Any], file: Path, events: EventWriter) -> None:
    """Writes down where the run runs; says so if an earlier attempt ran elsewhere."""
    if file.exists():
        before = json.loads(file.read_text())
        changed = [
            f"{k}: {before.get(k)} → {v}" for k, v in environment.items() if before.get(k) != v
        ]
        if changed:
            message = "not the machine of the last attempt, so not to the last bit its numbers: "
            events.emit(Log(level="warning", message=message + ", ".join(changed)))
    file.write_text(json.dumps(environment, indent=1))


def read_spec(path: Path) -> TrainSpec:
    """A spec file, validated against everything that is known without training."""
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
        spec = TrainSpec.model_validate(document)
        problems = check_spec(spec)
    except ValidationError as error:
        problems = field_errors(error)
    if problems:
        lines = "\n".join(f"  {p.param}: {p.message}" for p in problems)
        raise EngineError(f"{path} is not a valid spec:\n{lines}", code="invalid_spec")
    return fill_defaults(spec)


class exclusive:
    """Holds the run directory: two engines in one directory would tear each other's files."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "engine.lock"

    def __enter__(self) -> None:
        import fcntl

        self.file = self.path.open("w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"another engine is running in {self.path.parent}", file=sys.stderr)
            raise SystemExit(EXIT_FAILED) from None
        self.file.write(f"{os.getpid()} {platform.node()}\n")
        self.file.flush()

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _as_event(error: BaseException) -> Failed:
    """An exception as the job's error: who is to act, and on what."""
    from bridge_engine.checkpoint import is_disk_full

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
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failed(
            step=None,
            category="oom",
            code="out_of_memory",
            message="memory ran out; lower runtime.micro_batch first, then rollout.batch_size and "
            "rollout.max_new_tokens",
            param="runtime.micro_batch",
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


def _die_with_parent(descriptor: int) -> None:
    """Ends this process when the pipe's other end closes: an orphan must not train on."""

    def watch() -> None:
        while os.read(descriptor, 1):
            pass
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
