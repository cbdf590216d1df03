#!/usr/bin/env bash
# Style, types, and whether the documents' tables are those of bench/results. Usage: tools/lint.sh [--fix]
# Takes the tools of .venv where it exists (make build).
# --fix formats the code and repairs what the tools can repair; what they cannot is reported. Exits 1 on findings.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

fix=false
case "${1:-}" in
    "") ;;
    --fix) fix=true ;;
    *) sed -n 2,4p "$0" >&2; exit 2 ;;
esac

mapfile -t cpp < <(find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' | sort)
python=(qcomm tests bench tools setup.py)
findings=0

check() {
    echo "lint: $1 $2"
    "$@" || findings=1
}

for tool in ruff mypy clang-format; do
    if ! command -v "$tool" >/dev/null; then
        echo "lint: $tool is missing; \`make build\` installs it into .venv" >&2
        exit 2
    fi
done

if $fix; then
    ruff check --fix "${python[@]}" >/dev/null || true  # what is left is reported below
    ruff format --quiet "${python[@]}"
    clang-format -i "${cpp[@]}"
fi
check ruff check --output-format=concise "${python[@]}"
check ruff format --check "${python[@]}"
check mypy --strict qcomm/
check clang-format --dry-run -Werror "${cpp[@]}"
check python3 tools/make_tables.py --check

exit "$findings"
