# Runs named steps, one line each, and remembers which failed. Sourced by scripts/test.

failed=()
skipped=()
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# step NAME COMMAND...
step() {
    local name=$1 start=$SECONDS code=0
    shift
    printf '%-28s' "$name"
    if [ -n "${V:-}" ]; then
        echo
        "$@" </dev/null || code=$?
        printf '%-28s' "$name"
    else
        "$@" </dev/null >"$log" 2>&1 || code=$?
    fi
    if [ "$code" = 0 ]; then
        printf 'ok %6d s\n' $((SECONDS - start))
        [ -n "${V:-}" ] || grep -E '^(test result:|note: |skipped: |not shown)|^test .* ok \([0-9.]+ s\)$' "$log" || true
    else
        printf 'FAILED %2d s\n' $((SECONDS - start))
        # Not the tests that passed.
        [ -n "${V:-}" ] || grep -vE '^test .* \.\.\. ok$' "$log" || true
        failed+=("$name")
    fi
}

# skip NAME REASON
skip() {
    printf '%-28sskipped: %s\n' "$1" "$2"
    skipped+=("$1")
}

# fail NAME REASON: for a step that cannot even begin.
fail() {
    printf '%-28sFAILED: %s\n' "$1" "$2"
    failed+=("$1")
}

# The last line, and the exit code.
finish() {
    local name
    for name in "${skipped[@]}"; do echo "not checked: $name"; done
    if [ "${#failed[@]}" != 0 ]; then
        printf 'failed after %d s:' "$SECONDS"
        printf ' [%s]' "${failed[@]}"
        echo
        exit 1
    fi
    echo "all passed in $SECONDS s"
}
