"""A job that was accepted ends well, with the bytes of an undisturbed run, whatever dies meanwhile.

Each round posts jobs, lets faults happen to the house while they run, and looks at what came of it.
What happens is a function of the round's seed; when exactly it meets whom is not. To see a round
again: `BRIDGE_FAULTS=7 BRIDGE_FAULT_SEED=n python -m pytest tests/faults/test_faults.py`.
"""

from __future__ import annotations

import time

import pytest

from tests.faults.checks import Undisturbed, assert_all_is_well, specs
from tests.faults.conftest import PER_ROUND, SEEDS, Figures
from tests.faults.faults import Injector, plan
from tests.faults.house import House

WITHIN = 420.0
"""Seconds in which all jobs must have ended once everything works again; a busy machine is slow."""


@pytest.mark.parametrize("seed", SEEDS)
def test_no_fault_costs_a_job_more_than_time(
    house: House, undisturbed: Undisturbed, figures: Figures, seed: int
) -> None:
    began, faults, done = time.monotonic(), plan(seed, PER_ROUND), []
    jobs = [house.submit(spec) for spec in specs(seed)]
    injector = Injector(house)
    try:
        for fault in faults:
            # A job for the fault to befall: one that comes by at every failpoint.
            if house.have_ended(jobs) or ": " in fault.kind:
                jobs += [house.submit(spec) for spec in specs(seed)[-1:]]
            time.sleep(fault.delay)
            took = injector.inject(fault)
            (figures.injected if took else figures.missed)[fault.kind] += 1
            done.append(f"{fault}{'' if took else ': found nothing to befall'}")
        injector.finish()
        house.heal()
        _wait_for(house, jobs)
        assert_all_is_well(house, jobs, undisturbed)
    except BaseException:
        injector.finish()
        house.heal()
        script = "\n  ".join(done)
        print(f"seed {seed}, jobs {jobs}; what happened:\n  {script}\n{house.logs()}")
        raise
    figures.rounds += 1
    figures.jobs += len(jobs)
    figures.recoveries += sum(house.store.get_job(job_id).attempt - 1 for job_id in jobs)
    figures.seconds += time.monotonic() - began
    figures.write()


def _wait_for(house: House, jobs: list[str]) -> None:
    until = time.monotonic() + WITHIN
    while not house.have_ended(jobs):
        if time.monotonic() > until:
            states = [house.store.get_job(job_id) for job_id in jobs]
            said = [(j.id, j.status, j.attempt, j.progress_step) for j in states]
            raise AssertionError(f"not all jobs have ended: {said}")
        time.sleep(0.2)
