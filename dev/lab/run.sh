#!/bin/sh
# make lab E=E1[,E2,my.yaml]: runs experiments; again: goes on. LAB: the folder (out/lab); JOBS: how many stages at a
# time (all cores), THREADS of each (1: two jobs of one thread use two cores better than one of two);
# TRAINER=train_moe_cu; OPTIONS of Snakemake, as in
# OPTIONS="--executor slurm --default-resources slurm_partition=NAME".
set -e
here=$(cd "$(dirname "$0")" && pwd)
E=${1:?make lab E=NAME: an experiment of dev/lab/experiments or a YAML file}
# FROM: where a YAML file is named from; Snakemake works in LAB
export LAB="${LAB:-$here/../../out/lab}" FROM="$PWD" OMP_WAIT_POLICY=passive
mkdir -p "$LAB" && LAB=$(cd "$LAB" && pwd)
python3 -c 'import snakemake, pandas, scipy, yaml' 2>/dev/null ||
    { echo "lab: python3 -m pip install -r dev/lab/requirements.txt" >&2; exit 2; }
run() {
    python3 -m snakemake --snakefile "$here/Snakefile" --directory "$LAB" --config experiments="$E" "$@"
}
# Snakemake's lock would outlive a machine that is taken away; this one does not
exec 9>"$LAB/lock"
flock -n 9 || { echo "lab: another run is at work in $LAB" >&2; exit 2; }
rm -f "$LAB/status"
jobs=${JOBS:-$(nproc)}
# --quiet all would also hide what is wrong with an experiment
{ run --jobs "$jobs" --cores $((jobs * ${THREADS:-1})) --rerun-incomplete --rerun-triggers mtime --keep-going --nolock \
    --quiet rules progress reason host $OPTIONS 2>&1 9>&- || echo $? >"$LAB/status"; } |
    grep --line-buffered -v '^Select jobs\|^Execute [0-9]\|^Building DAG\|^Using shell\|^Complete log\|^Elapsed' || true
python3 "$here/lab.py" collect
[ ! -f "$LAB/status" ] || { status=$(cat "$LAB/status"); exit "${status:-1}"; }
