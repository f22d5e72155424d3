"""Many runs, through submitit: as jobs on this machine or on a SLURM cluster, by one code path.

Each job is a `Worker`: it makes missing runs until none is left that no other job has (`status.claim`). So any number
of jobs may be under way, be killed, be requeued or be submitted again.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError
from tqdm import tqdm

from . import rates
from .corpus import prepare
from .errors import Busy, InputError, Preempted
from .experiment import Profile, RunSpec

POLL_SECONDS = {"local": 0.5, "slurm": 10.0}  # the clusters, and how often each is asked for its jobs
MONTHS = 60 * 24 * 90  # minutes: a local job ends when its runs do
SIGNAL_SECONDS = 120  # SLURM warns so long before a time limit: an update and a checkpoint fit in


def missing(profile: Profile, root: Path, purpose: str) -> list[RunSpec]:
    """The declared runs of a purpose (`rate` or `matrix`) that have no finished log."""
    declared = profile.search_runs() if purpose == "rate" else profile.runs()
    return [spec for spec in declared if not (profile.folder(root) / "runs" / spec.id / "manifest.json").exists()]


@dataclass(frozen=True)
class Worker:
    """What a job does. Returns None, or in one line why it ended early: an InputError's message, or a SIGTERM."""

    profile: Profile
    root: Path
    purpose: str

    def __call__(self) -> str | None:
        import torch

        torch.set_num_threads(1)  # a run's numbers don't depend on how many run beside it
        try:
            while any([self._make(spec) for spec in missing(self.profile, self.root, self.purpose)]):
                pass  # until other jobs have all that is left
        except InputError as error:
            return str(error)
        except Preempted as stopped:
            if "SLURM_JOB_ID" in os.environ:
                _wait_for_the_cluster(stopped.signal)
            return str(stopped)
        return None

    def _make(self, spec: RunSpec) -> bool:
        from .training import execute

        try:
            execute(self.profile, spec.id, self.root, progress=False)
        except Busy:
            return False
        return True

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit requeues: the same job, which goes on from the checkpoint of its run."""
        return submitit.helpers.DelayedSubmission(self)


def _wait_for_the_cluster(number: int) -> None:
    """After SIGUSR2 (a time limit, or a preemption) let submitit requeue the job; after SIGTERM wait for the end.

    SLURM requeues a preempted job only if it is still there when its grace is over, and never a cancelled one.
    """
    if number == signal.SIGUSR2:
        signal.raise_signal(number)
    while True:
        time.sleep(1)


def _executor(profile: Profile, root: Path, jobs: int, cluster: str) -> submitit.AutoExecutor:
    needs = profile.resources
    try:
        executor = submitit.AutoExecutor(root / ".cache" / "jobs" / profile.name, cluster=cluster,
                                         slurm_max_num_timeout=needs.requeues)
    except RuntimeError as error:  # no srun
        raise InputError(f"cluster '{cluster}': {error}; submit from a machine of the cluster, or leave --cluster "
                         "out") from None
    optional = {"gpus_per_node": needs.gpus, "slurm_partition": needs.partition, "slurm_account": needs.account}
    executor.update_parameters(
        name=f"ouroboros-{profile.name}", timeout_min=needs.minutes if cluster == "slurm" else MONTHS,
        cpus_per_task=needs.cpus, mem_gb=needs.memory_gb, slurm_signal_delay_s=SIGNAL_SECONDS,
        slurm_additional_parameters={"requeue": True}, **{name: value for name, value in optional.items() if value})
    return executor


def run_missing(profile: Profile, root: Path, jobs: int, purpose: str, cluster: str = "local") -> None:
    """Make the missing runs by `jobs` jobs at a time and wait for them; after the search, write rates.json.

    Raises InputError with what stopped a job, and Preempted on SIGTERM: local jobs save their runs' state first, those
    of a cluster go on.
    """
    from .training import load_base

    root = Path(root).resolve()
    prepare(profile, root)  # once, before the jobs need it
    load_base(profile, root)
    if wanted := missing(profile, root, purpose):
        os.environ["OMP_NUM_THREADS"] = "1"  # the jobs inherit it
        executor, worker = _executor(profile, root, jobs, cluster), Worker(profile, root, purpose)
        with executor.batch():
            made = [executor.submit(worker) for _ in range(min(jobs, len(wanted)))]
        with tqdm(total=len(wanted), desc=f"{profile.name}: {purpose}") as bar:
            _wait(made, cluster, lambda: bar.update(len(wanted) - len(missing(profile, root, purpose)) - bar.n))
        for job in made:
            if ended := _ended(job):
                raise InputError(ended)
    if purpose == "rate":
        rates.write(profile, root)


def _wait(jobs: list[submitit.Job], cluster: str, show: Callable[[], object]) -> None:
    """Until all jobs are done. Raises Preempted when this process is asked to stop."""
    from .resume import asked_to_stop

    with asked_to_stop() as stop:
        while not all(job.done() for job in jobs):
            time.sleep(POLL_SECONDS[cluster])
            show()
            if stop() and cluster != "local":
                raise Preempted("asked to stop; the cluster's jobs go on, the same command waits for them", stop())
            for job in jobs if stop() else ():  # again and again: between two runs a job doesn't listen
                if not job.done():
                    os.kill(int(job.job_id), signal.SIGTERM)  # a local job's id is its process
        show()
        if stop():
            raise Preempted("asked to stop, the state of the runs under way is saved; run the same command again",
                            stop())


def _ended(job: submitit.Job) -> str | None:
    """Why a job ended early, in one line; None if it didn't. A job that failed by a bug shows its traceback."""
    try:
        return job.result()
    except FailedJobError:
        raise
    except UncompletedJobError:
        return f"job {job.job_id} was killed (out of memory?); its own words: {job.paths.stderr}"
