"""Many runs, through submitit: as jobs on this machine or on a SLURM cluster, by one code path.

Each job is a `Worker`: it makes missing runs until none is left that no other job has (`status.hold`). So any number
of jobs may be under way, be killed, be requeued or be submitted again.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import submitit
from safetensors import SafetensorError
from submitit.core.utils import FailedJobError, UncompletedJobError
from tqdm import tqdm

from ..errors import Busy, InputError, Preempted, unwritable
from ..experiment.forecast import Speed
from ..experiment.learning_rates import read_searches, waits
from ..experiment.plan import RunSpec
from ..experiment.profile import Profile
from .corpus import prepare
from .status import is_running, missing

POLL_SECONDS = {"local": 0.5, "slurm": 10.0}  # the clusters, and how often each is asked for its jobs
MONTHS = 60 * 24 * 90  # minutes: a local job ends when its runs do
SIGNAL_SECONDS = 120  # SLURM warns so long before a time limit: an update and a checkpoint fit in


@dataclass(frozen=True)
class Worker:
    """What a job does. Returns None, or in one line why it ended early: an InputError's message, or a SIGTERM."""

    profile: Profile
    root: Path
    purpose: str | None
    cluster: str
    gpus: str = ""  # of this machine, those that the job may use, as CUDA_VISIBLE_DEVICES names them

    def __call__(self) -> str | None:
        if self.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus
        import torch

        self.profile.register_arms()  # this process hasn't read the profile's file
        torch.set_num_threads(1)  # a run's numbers don't depend on how many run beside it
        try:
            while left := missing(self.profile, self.root, self.purpose):
                searches = read_searches(self.profile, self.root)
                ready = [spec for spec in left if not waits(spec, self.profile, searches)]
                # the plan's order is kept: after each run it is asked anew what comes first, as a search may have ended
                if not any(self._make(spec) for spec in ready):  # other jobs have all that can be made now
                    if len(ready) == len(left):
                        break
                    searched = any(is_running(self.profile.name, spec.id, self.root) for spec in ready)
                    if not searched and missing(self.profile, self.root, self.purpose) == left:
                        break  # what is left waits for a search that nobody makes
                    time.sleep(POLL_SECONDS[self.cluster])
        except InputError as error:
            return str(error)
        except (OSError, SafetensorError) as error:
            return unwritable(error)
        except Preempted as stopped:
            if self.cluster == "slurm":
                _wait_for_the_cluster(stopped.signal)
            return str(stopped)
        return None

    def _make(self, spec: RunSpec) -> bool:
        from .run import execute

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


def _executor(profile: Profile, root: Path, cluster: str) -> submitit.AutoExecutor:
    needs = profile.resources
    # a folder for each sweep: job numbers may come again, and then submitit would take old results for new ones
    folder = root / ".cache" / "jobs" / profile.name / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=needs.requeues)
    except RuntimeError as error:  # no srun
        raise InputError(f"cluster '{cluster}': {error}; submit from a machine of the cluster, or leave --cluster "
                         "out") from None
    optional = {"gpus_per_node": needs.gpus, "slurm_partition": needs.partition, "slurm_account": needs.account}
    executor.update_parameters(
        name=f"ouroboros-{profile.name}", timeout_min=needs.minutes if cluster == "slurm" else MONTHS,
        cpus_per_task=needs.cpus, mem_gb=needs.memory_gb, slurm_signal_delay_s=SIGNAL_SECONDS,
        slurm_additional_parameters={"requeue": True}, **{name: value for name, value in optional.items() if value})
    return executor


def run_missing(profile: Profile, root: Path, jobs: int, purpose: str | None = None, cluster: str = "local",
                ready: Callable[[], None] = lambda: None) -> None:
    """Make the missing runs of the plan, or of one purpose, by `jobs` jobs at a time, in the plan's order, and wait;
    `ready` is called where nothing is left that would be refused.

    Raises InputError with what stopped a job, and for a log that isn't of the run of its name; Preempted on SIGTERM:
    local jobs save their runs' state first, those of a cluster go on.
    """
    from .build import load_base
    from .own_arm import load_own

    root = Path(root).resolve()
    missing(profile, root)  # says which log isn't its run's, before anything is made
    base = load_base(profile, root)  # says that there is none, before minutes of text are read
    prepare(profile, root)  # once, before the jobs need it
    for arm in profile.own_arms:  # says what is wrong with a class, before anything is made
        load_own(arm, profile, base.config, root)
    ready()
    if wanted := missing(profile, root, purpose):
        os.environ["OMP_NUM_THREADS"] = "1"  # the jobs inherit it
        made = _submit(_executor(profile, root, cluster), Worker(profile, root, purpose, cluster),
                       min(jobs, len(wanted)), profile.resources.gpus)
        found = wanted
        with tqdm(total=len(wanted), desc=f"{profile.name}: {purpose or 'plan'}") as bar:
            def left() -> list[RunSpec]:
                nonlocal found
                if any(profile.run_path(spec.id, root).exists() for spec in found):  # else nothing changed
                    found = missing(profile, root, purpose)
                    bar.update(len(wanted) - len(found) - bar.n)
                return found

            _wait(lambda: not left() or all(job.done() for job in made), made, cluster)
            for job in made:
                if job.done() and (ended := _ended(job)):
                    raise InputError(ended)
            # what is left is made by the jobs of another sweep
            _wait(lambda: not any(is_running(profile.name, spec.id, root) for spec in left()), [], cluster)
            if left():
                raise InputError(f"{len(found)} runs are left, '{found[0].id}' first, and no job makes them any more; "
                                 "run the same command again")


def speed(profile: Profile, jobs: int) -> Speed:
    """What one of `jobs` runs at once sustains: as the profile says of its device, else measured here, in a minute."""
    if given := profile.resources.teraflops:
        return Speed(given * 1e12, given * 1e12, f"assumed: resources.teraflops of profile {profile.name}")
    from . import measure

    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        measured = list(pool.map(measure.speed, [profile] * jobs))
    updates, evaluations = (sum(values) / jobs for values in zip(*measured, strict=True))
    return Speed(updates, evaluations, "measured here just now")


def _submit(executor: submitit.AutoExecutor, worker: Worker, count: int, gpus: int) -> list[submitit.Job]:
    """`count` jobs: an array of a cluster, or processes here, which take this machine's GPUs in turn."""
    if worker.cluster == "slurm":
        with executor.batch():
            return [executor.submit(worker) for _ in range(count)]
    jobs, visible = [], _visible_gpus() if gpus else []
    if visible and gpus > len(visible):
        raise InputError(f"profile '{worker.profile.name}': field 'resources.gpus': {gpus}, but {len(visible)} can be "
                         "seen here; lower it, or set CUDA_VISIBLE_DEVICES")
    for number in range(count):
        mine = [visible[(number * gpus + place) % len(visible)] for place in range(gpus)] if visible else []
        jobs.append(executor.submit(replace(worker, gpus=",".join(map(str, mine)))))
    return jobs


def _visible_gpus() -> list[int]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not named:
        return list(range(torch.cuda.device_count()))
    if not all(gpu.isdecimal() for gpu in named.split(",")):
        raise InputError(f"CUDA_VISIBLE_DEVICES '{named}': jobs are given GPUs by number; name them so, as 0,1")
    return [int(gpu) for gpu in named.split(",")]


def _wait(ready: Callable[[], bool], jobs: list[submitit.Job], cluster: str) -> None:
    """Until it is ready. Raises Preempted when this process is asked to stop; local `jobs` save their state first."""
    from .resume import asked_to_stop

    with asked_to_stop() as stop:
        while not ready():
            time.sleep(POLL_SECONDS[cluster])
            if stop() and cluster != "local":
                raise Preempted("asked to stop; the cluster's jobs go on: python -m ouroboros status", stop())
            if stop() and all(job.done() for job in jobs):
                break
            for job in jobs if stop() else ():  # again and again: between two runs a job doesn't listen
                if not job.done():
                    os.kill(int(job.job_id), signal.SIGTERM)  # a local job's id is its process
        if stop():
            raise Preempted("asked to stop, the state of the runs under way is saved; run the same command again",
                            stop())


def _ended(job: submitit.Job) -> str | None:
    """Why a job ended early, in one line; None if it didn't. A job that failed by a bug shows its traceback."""
    try:
        return job.result()
    except FailedJobError:  # a kind of the next one, but with the job's own traceback
        raise
    except UncompletedJobError:
        return f"job {job.job_id} was killed (out of memory?); its own words: {job.paths.stderr}"
