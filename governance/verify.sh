#!/bin/sh
# Verify a sealed run without Python: POSIX tools, coreutils and ssh-keygen.
#   governance/verify.sh RUN_FOLDER ALLOWED_SIGNERS
# Prints one line per problem, `file: reason`; exit status 0 only when every role approved exactly this tree.
set -u
LC_ALL=C
export LC_ALL
[ $# -eq 2 ] && [ -d "$1" ] && [ -f "$2" ] || { echo "usage: verify.sh RUN_FOLDER ALLOWED_SIGNERS" >&2; exit 2; }
signers=$(realpath "$2")
cd "$1" || exit 2
run=$(basename "$(pwd -P)")
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
bad=0
complain() { printf '%s\n' "$1"; bad=1; }

if grep -v '^#' "$signers" | grep -v '^[[:space:]]*$' | grep -qv 'namespaces='; then
    complain "$(basename "$signers"): a line without namespaces="
fi

# 1. The tree is what SHA256SUMS says, file for file.
find . ! -type f ! -type d | sed 's|^\./||; s|$|: a link or special file|' >"$work/odd"
find . -name '*[\\[:cntrl:]]*' | sed 's|^\./||; s|$|: a name with a backslash or control character|' >>"$work/odd"
[ -s "$work/odd" ] && complain "$(cat "$work/odd")"
if [ -f SHA256SUMS ]; then
    find . -type f ! -path './signoffs/*' ! -path ./SHA256SUMS -exec sha256sum {} + | sed 's|  \./|  |' | sort -k 2 >"$work/now"
    if ! cmp -s "$work/now" SHA256SUMS; then
        sort "$work/now" >"$work/a"
        sort SHA256SUMS >"$work/b"
        comm -3 "$work/a" "$work/b" | tr -d '\t' | cut -c 67- | grep . | sort -u >"$work/names"
        [ -s "$work/names" ] || echo SHA256SUMS >"$work/names"
        complain "$(sed 's|$|: added, missing or changed since the seal|' "$work/names")"
    fi
    digest=$(sha256sum <SHA256SUMS | cut -d ' ' -f 1)
else
    complain "SHA256SUMS: missing; this run is not sealed"
fi

# 2. Every role signed this manifest, with a key allowed for that role, and approved.
armoured() { # exactly the bytes ssh-keygen writes, version 1 (the signature does not cover its own envelope)
    sed '1d;$d' "$1" | tr -d '\n' | base64 -d >"$work/blob" 2>/dev/null || return 1
    { echo '-----BEGIN SSH SIGNATURE-----'; base64 -w 70 "$work/blob"; echo '-----END SSH SIGNATURE-----'; } | cmp -s - "$1" &&
        sed -n 2p "$1" | grep -q '^U1NIU0lHAAAAAQAA'
}
holds() { [ "$(grep -cFx -e "$2" "$1")" = 1 ]; }
for role in architecture infrastructure safety; do
    [ -f SHA256SUMS ] || break
    said=signoffs/$role.json
    [ -f "$said" ] || complain "$said: missing"
    [ -f "$said.sig" ] || complain "$said.sig: missing"
    [ -f "$said" ] && [ -f "$said.sig" ] || continue
    reviewer=$(sed -n 's/^  "reviewer": "\([A-Za-z0-9._+-]*@[A-Za-z0-9.-]*\)",$/\1/p' "$said")
    if ! armoured "$said.sig" || ! ssh-keygen -Y verify -f "$signers" -I "$reviewer" -n "stackpkg-readiness-$role" \
        -s "$said.sig" <"$said" >/dev/null 2>&1; then
        complain "$said: $said.sig is not ${reviewer:-anybody}'s signature of it for the role $role"
        continue
    fi
    case $reviewer in *@demonstration.invalid) demonstration=true ;; *) demonstration=false ;; esac
    for line in '  "decision": "approve",' "  \"demonstration\": $demonstration," "  \"role\": \"$role\"," "  \"run\": \"$run\""; do
        holds "$said" "$line" || complain "$said: does not say $line"
    done
    holds "$said" "    \"sha256\": \"$digest\"" || complain "SHA256SUMS: $said signed a different manifest"
    [ "$demonstration" = false ] || echo "DEMONSTRATION KEYS: not an approval ($role)" >&2
done
for file in signoffs/* signoffs/.[!.]*; do
    case $file in
    signoffs/architecture.json | signoffs/infrastructure.json | signoffs/safety.json) ;;
    signoffs/architecture.json.sig | signoffs/infrastructure.json.sig | signoffs/safety.json.sig) ;;
    *) [ -e "$file" ] && complain "$file: not a sign-off of a role" ;;
    esac
done
[ "$bad" = 0 ] && echo "VERIFIED $run" || { echo "NOT VERIFIED $run"; exit 1; }
