# What the batch scripts of this folder share; sourced, not run. The folder that the job was submitted from is the repository.
# shellcheck shell=bash

#: Exit statuses of a run that stopped on request, with and without a checkpoint of its last step (docs/recovery.md).
STOPPED=75
NOT_STOPPED_IN_TIME=76
#: Requeues without a new checkpoint after which a job stays stopped.
MAX_REQUEUES_WITHOUT_PROGRESS=2

die() {
    echo "error: $*" >&2
    exit 1
}

# Step of the newest complete checkpoint; 0 without one. The marker says that it is complete: the tracker file
# (latest_checkpointed_iteration.txt) may name one that was removed or damaged since, or be lost itself.
saved_step() {
    local marker step newest=0
    for marker in "$RUN_DIR"/checkpoints/iter_*/COMPLETE; do
        step=${marker%/COMPLETE}
        step=${step##*/iter_}
        # iter_0000010.tmp is half written, and without any the pattern stands for itself.
        [[ -f $marker && $step =~ ^[0-9]+$ ]] || continue
        ((10#$step <= newest)) || newest=$((10#$step))
    done
    echo "$newest"
}

# Counts the starts of this run folder since its newest checkpoint, and gives up when it is too many.
require_progress() {
    local file=$RUN_DIR/slurm_starts step last=-1 starts=0
    step=$(saved_step)
    [[ ! -f $file ]] || read -r last starts <"$file"
    if ((last == step)); then starts=$((starts + 1)); else starts=1; fi
    if ((starts > MAX_REQUEUES_WITHOUT_PROGRESS)); then
        die "no step was saved in the last $MAX_REQUEUES_WITHOUT_PROGRESS starts (step $step): the job is not started again.
       Look at the log, save more often (checkpoint.every), and remove $file"
    fi
    mkdir -p "$RUN_DIR"
    echo "$step $starts" >"$file"
}

# run_until_stopped <command...>: run it, pass requests to stop on, and requeue the job when it has stopped for one.
run_until_stopped() {
    local status=0 child=
    trap '[[ -z $child ]] || kill -USR1 "$child" 2>/dev/null || true' USR1 TERM
    "$@" &
    child=$!
    # A trapped signal ends `wait`, not the child.
    while :; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    trap - USR1 TERM
    case $status in
    0)
        touch "$RUN_DIR/FINISHED"
        echo "finished: $RUN_DIR"
        ;;
    "$STOPPED" | "$NOT_STOPPED_IN_TIME")
        echo "stopped on request at step $(saved_step), status $status: requeued"
        scontrol requeue "$SLURM_JOB_ID"
        ;;
    *) echo "error: the run ended with status $status; the job is not requeued" >&2 ;;
    esac
    return "$status"
}

# start <overrides...>: everything of a batch script but who starts the launchers, which `launch` does.
start() {
    [[ -n ${RUN_DIR:-} ]] || die "RUN_DIR=<folder that all nodes see> is needed: it is where a requeued job finds its checkpoints"
    [[ -f scripts/train_ppo.sh ]] || die "submit from the root of the repository: $PWD has no scripts/train_ppo.sh"
    if [[ -e $RUN_DIR/FINISHED ]]; then
        echo "finished already: $RUN_DIR/FINISHED is there"
        return 0
    fi
    local -a overrides=("run.dir=$RUN_DIR" "$@")
    if (($(saved_step) > 0)); then overrides+=("checkpoint.load=$RUN_DIR"); fi
    if [[ ${DRY_RUN:-0} = 1 ]]; then
        launch "${overrides[@]}"
        return 0
    fi
    require_progress
    run_until_stopped launch "${overrides[@]}"
}
