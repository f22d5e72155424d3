#!/usr/bin/env bash
# A SLURM cluster of this one machine, and the smallest sweep on it: submitted, preempted in the middle, ended.
#
# On Debian, as root: apt-get install slurm-wlm munge; then: bash tests/slurm.sh
# Run by hand, not by the suite: it starts munge, slurmctld and slurmd, with a configuration of its own in a temporary
# folder, and stops them at the end. Last seen working with SLURM 22.05 on Debian 12: both jobs were preempted, requeued
# (SLURM waits two minutes before it starts such a job again) and ended every run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
$python -m ouroboros base --profile smoke
folder=$(mktemp -d)
export SLURM_CONF=$folder/slurm.conf
host=$(hostname -s)

cat > "$SLURM_CONF" <<END
ClusterName=single
SlurmctldHost=$host
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MpiDefault=none
ReturnToService=2
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$host CPUs=$(nproc) RealMemory=8000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
END

stop() {
    kill "$(cat "$folder/slurmd.pid")" "$(cat "$folder/slurmctld.pid")" 2>/dev/null || true
    kill "$munged" 2>/dev/null || true
}
trap stop EXIT
mkdir -p "$folder/state" "$folder/spool" /run/munge
chown munge: /run/munge
runuser -u munge -- munged --foreground 2> "$folder/munged.log" & munged=$!
sleep 1
slurmctld
slurmd
until sinfo -h -o %T | grep -q idle; do sleep 1; done
sinfo

rm -rf results/smoke/runs
$python -m ouroboros runs --profile smoke --cluster slurm --jobs "$(nproc)" & sweep=$!
until $python -m ouroboros status --profile smoke | tail -1 | grep -q running; do sleep 1; done
squeue
# another user's work takes the whole machine: the jobs of the sweep are signalled, requeued and start again after it
srun --partition high --cpus-per-task "$(nproc)" --mem 100 sleep 5
squeue
wait "$sweep"
$python -m ouroboros status --profile smoke | tail -1
$python -m ouroboros rerun controller-d4-r4-corrected-s0 --profile smoke
grep -hE "Caught signal|Requeued|requeue" .cache/jobs/smoke/*/*.err | sort | uniq -c || true
