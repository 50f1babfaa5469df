#!/bin/sh
# What kubectl has no command for: a Job that has either succeeded or failed.
#
#   job.sh wait NAMESPACE JOB SECONDS    prints its log; 0 if it has succeeded, 1 if it failed or has not ended in time
#   job.sh forget-failed NAMESPACE JOB   removes it if it has failed, so that applying it runs it again
#
# skaffold runs it as a hook, and names the context; KUBECTL may name another kubectl.
set -eu

kube() {
    "${KUBECTL:-kubectl}" ${SKAFFOLD_KUBE_CONTEXT:+--context "$SKAFFOLD_KUBE_CONTEXT"} --namespace "$namespace" "$@"
}

# Complete, Failed, or nothing.
ended() {
    kube get job "$job" --ignore-not-found \
        --output 'jsonpath={.status.conditions[?(@.status=="True")].type}' |
        tr ' ' '\n' | grep -x -e Complete -e Failed || true
}

logs() {
    kube logs --selector "batch.kubernetes.io/job-name=$job" --all-containers --prefix --tail=200 || true
}

verb=${1:-} namespace=${2:-} job=${3:-}
if [ -z "$job" ]; then
    sed -n 's/^#   //p' "$0" >&2
    exit 2
fi

case $verb in
wait)
    seconds=${4:?how long to wait}
    until=$(($(date +%s) + seconds))
    echo "waiting for the job $job, at most $seconds s"
    while :; do
        state=$(ended)
        case $state in
        Complete)
            logs
            echo "the job $job has succeeded"
            exit 0
            ;;
        Failed)
            logs
            echo "error: the job $job has failed; nothing after it is rolled out" >&2
            exit 1
            ;;
        esac
        if [ "$(date +%s)" -ge "$until" ]; then
            logs
            kube get pods --selector "batch.kubernetes.io/job-name=$job" --output wide || true
            echo "error: the job $job has not ended within $seconds s; nothing after it is rolled out" >&2
            exit 1
        fi
        sleep "${POLL_SECONDS:-2}"
    done
    ;;
forget-failed)
    if [ "$(ended)" = Failed ]; then
        echo "the job $job has failed before: it is removed, to be run again"
        kube delete job "$job" --ignore-not-found --cascade=foreground --wait
    fi
    ;;
*)
    sed -n 's/^#   //p' "$0" >&2
    exit 2
    ;;
esac
