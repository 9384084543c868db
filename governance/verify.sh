#!/bin/sh
# Verify a sealed run without Python: a POSIX shell, tools every Linux has (coreutils, findutils, grep, sed, diffutils)
# and ssh-keygen. Where git and a repository are, the tags of its sign-offs are read too.
#   governance/verify.sh RUN_FOLDER TRUST_FOLDER
# TRUST_FOLDER holds allowed_signers, policy.yaml and revoked_keys; the log of runs, LOG.jsonl, lies beside RUN_FOLDER.
# Prints one line per problem, `file: reason`; exit status 0 only when every role approved exactly this tree.
set -u
LC_ALL=C
export LC_ALL
[ $# -eq 2 ] && [ -d "$1" ] && [ -d "$2" ] || { echo "usage: verify.sh RUN_FOLDER TRUST_FOLDER" >&2; exit 2; }
trust=$(realpath "$2")
cd "$1" || exit 2
run=$(basename "$(pwd -P)")
today=$(date -u +%Y-%m-%d)
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
bad=0
complain() { printf '%s\n' "$1"; bad=1; }
each() { while IFS= read -r line; do complain "$1$line$2"; done; } # a problem for each line of the input
finish() { [ "$bad" = 0 ] && echo "VERIFIED $run" || { echo "NOT VERIFIED $run"; exit 1; }; }
late() { expr "x$1" '<' "x$today" >/dev/null; }

# 1. Whom we trust: all three files, a policy in exactly its form.
for file in allowed_signers policy.yaml revoked_keys; do
    [ -f "$trust/$file" ] || complain "$file: missing, so nothing can be trusted"
done
[ "$bad" = 0 ] || finish
grep -v '^#' "$trust/allowed_signers" | grep '[^[:space:]]' | grep -qv 'namespaces=' &&
    complain "allowed_signers: a line without namespaces="
grep -v '^#' "$trust/policy.yaml" | grep '[^[:space:]]' >"$work/policy"
{
    echo quorum:
    for role in architecture infrastructure safety; do grep -E "^  $role: [1-9]\$" "$work/policy"; done
    echo authors:
    grep -E '^- [a-z0-9@.-]+ [A-Za-z0-9+/=]+$' "$work/policy"
} >"$work/form"
cmp -s "$work/policy" "$work/form" || { complain "policy.yaml: not in the form that its comments show"; finish; }
sed -n 's/^- //p' "$work/policy" >"$work/keys"
ssh-keygen -lf "$work/keys" 2>/dev/null | sed -n 's/.*\(SHA256:[^ ]*\).*/\1/p' >"$work/authors"
[ -s "$work/authors" ] && [ "$(wc -l <"$work/authors")" = "$(wc -l <"$work/keys")" ] ||
    complain "policy.yaml: names no author's key, or one that ssh-keygen can't read"

# 2. The tree is what SHA256SUMS says, file for file.
find . ! -type f ! -type d | sed 's|^\./||' | each '' ': a link or special file' >"$work/odd"
find . -name '*[![:print:]]*' -o -name '*\\*' | sed 's|^\./||' |
    each '' ': a name outside printable ASCII can pass for another' >>"$work/odd"
[ -s "$work/odd" ] && complain "$(cat "$work/odd")"
if [ -f SHA256SUMS ]; then
    find . -type f ! -path './signoffs/*' ! -path ./SHA256SUMS -exec sha256sum {} + | sed 's|  \./|  |' | sort -k 2 >"$work/now"
    if ! cmp -s "$work/now" SHA256SUMS; then
        sort -u "$work/now" >"$work/a"
        sort -u SHA256SUMS >"$work/b"
        cut -c 67- "$work/a" | grep . | sort -u >"$work/here"
        cut -c 67- "$work/b" | grep . | sort -u >"$work/there"
        comm -3 "$work/a" "$work/b" | tr -d '\t' | cut -c 67- | grep . | sort -u >"$work/differ"
        comm -12 "$work/here" "$work/there" | comm -12 - "$work/differ" | each '' ': changed since the seal' >"$work/found"
        comm -23 "$work/here" "$work/there" | each '' ': added since the seal' >>"$work/found"
        comm -13 "$work/here" "$work/there" | each '' ': missing, or renamed, since the seal' >>"$work/found"
        grep -E '^/|//|(^|/)\.{1,2}(/|$)' "$work/there" | each '' ': a path out of the archive, in SHA256SUMS' >>"$work/found"
        [ -s "$work/found" ] || [ -s "$work/odd" ] || echo "SHA256SUMS: lines reordered or repeated" >"$work/found"
        [ -s "$work/found" ] && complain "$(cat "$work/found")"
        bad=1
    fi
    digest=$(sha256sum <SHA256SUMS | cut -d ' ' -f 1)
else
    complain "SHA256SUMS: missing; this run is not sealed"
fi

# 3. The log: every line names the digest of the one before; the last lines about this run are about what lies here.
log=../LOG.jsonl
hex='[0-9a-f]{64}'
form="{\"at\": \"[0-9T:+-]+\", \"file\": \"(SHA256SUMS|signoffs/[a-z]+(-[2-9])?\\.json)\", \"previous\": \"$hex\", \
\"run\": \"[A-Za-z0-9._-]+\", \"sha256\": \"$hex\"}"
chain() {
    previous=$(printf '%064d' 0)
    number=1
    while IFS= read -r line || [ -n "$line" ]; do
        printf '%s\n' "$line" | grep -Eqx "$form" || return 1
        case $line in *"\"previous\": \"$previous\""*) ;; *) return 1 ;; esac
        previous=$(printf '%s\n' "$line" | sha256sum | cut -d ' ' -f 1)
        number=$((number + 1))
    done <"$log"
    [ "$number" -gt 1 ]
}
if [ ! -f "$log" ]; then
    complain "LOG.jsonl: missing; it lies beside the run, one line for each seal"
elif ! chain; then
    complain "LOG.jsonl: line $number breaks the chain"
else
    grep -F "\"run\": \"$run\"" "$log" | sed 's/.*"file": "\([^"]*\)".*"sha256": "\([^"]*\)".*/\1 \2/' >"$work/mine"
    first=$(grep -n '^SHA256SUMS ' "$work/mine" | tail -n 1 | cut -d : -f 1)
    tail -n "+${first:-1}" "$work/mine" >"$work/last"
    [ -n "$first" ] && [ "$(head -n 1 "$work/last")" = "SHA256SUMS ${digest:-}" ] ||
        complain "LOG.jsonl: the last seal entered for $run is another"
    [ -z "$first" ] || for file in $(grep -v '^SHA256SUMS ' "$work/last" | cut -d ' ' -f 1 | sort -u); do
        [ -f "$file" ] && [ "$(grep -F "$file " "$work/last" | tail -n 1)" = "$file $(sha256sum <"$file" | cut -d ' ' -f 1)" ] ||
            complain "$file: not what was entered in LOG.jsonl when it was signed"
    done
fi
tags() { git -C "$1" tag --list "signoff/$run/*" --format='%(refname:short) %(contents:body)' 2>/dev/null; }
if told=$(tags "$trust") || told=$(tags ..); then # where the keys lie, else where the log lies
    [ -z "$told" ] || [ ! -f "$log" ] || while IFS= read -r line || [ -n "$line" ]; do
        printf '%s\n' "$line" | sha256sum | cut -d ' ' -f 1
    done <"$log" >"$work/lines"
    touch "$work/lines"
    printf '%s\n' "$told" | sed -n '/^signoff\/[^ ]* manifest [0-9a-f]*$/{
        N
        s/ manifest [0-9a-f]*\nlog \([0-9a-f]*\)$/ \1/p
    }' >"$work/tags"
    while read -r tag entry; do
        grep -qx "$entry" "$work/lines" || complain "LOG.jsonl: the line that git's tag $tag names is gone"
    done <"$work/tags"
else
    echo "git's tags were not looked at: no git, or no repository around the keys or the log" >&2
fi

# 4. It was sealed under our policy, and no condition of an earlier sign-off is overdue.
cmp -s approval/policy.yaml "$trust/policy.yaml" ||
    complain "approval/policy.yaml: not the policy to verify with; seal the run anew under it, or give the folder of its day"
[ ! -f approval/conditions.json ] ||
    for day in $(sed -n 's/^  "open_until": "\([0-9-]\{10\}\)",\{0,1\}$/\1/p' approval/conditions.json); do
        late "$day" && complain "approval/conditions.json: a condition that was due $day is open"
    done

# 5. Every role signed this manifest, with valid keys of its own, and approved.
armoured() { # exactly the bytes ssh-keygen writes, version 1 (the signature does not cover its own envelope)
    sed '1d;$d' "$1" | tr -d '\n' | base64 -d >"$work/blob" 2>/dev/null || return 1
    { echo '-----BEGIN SSH SIGNATURE-----'; base64 -w 70 "$work/blob"; echo '-----END SSH SIGNATURE-----'; } | cmp -s - "$1" &&
        sed -n 2p "$1" | grep -q '^U1NIU0lHAAAAAQAA'
}
field() { # the value of a key of the predicate, if it is there once
    [ "$(grep -c "^  \"$1\": " "$said")" = 1 ] && sed -n "s/^  \"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\$/\1/p" "$said"
}
signer() { # sets key and why; why is empty when the signature counts
    key=
    why="its .sig is no whole signature of it for the role $role"
    armoured "$said.sig" || return
    set -- -n "stackpkg-readiness-$role" -s "$said.sig"
    good=$(ssh-keygen -Y check-novalidate "$@" <"$said" 2>/dev/null) || return
    key=${good##* }
    why=
    set -- -f "$trust/allowed_signers" -I "$reviewer" "$@"
    ssh-keygen -Y verify "$@" -r "$trust/revoked_keys" <"$said" >/dev/null 2>&1 && return
    why="is not $reviewer's for the role $role"
    if ssh-keygen -Y verify "$@" <"$said" >/dev/null 2>"$work/told"; then
        why="is revoked"
    elif grep -q 'key has expired' "$work/told"; then
        why="has expired"
    elif grep -q 'not yet valid' "$work/told"; then
        why="is not valid yet"
    fi
    why="the key $key $why"
}
judge() { # complains of everything for which the statement $said does not count
    for file in "$said" "$said.sig"; do [ -f "$file" ] || { complain "$file: missing"; wrong=1; }; done
    [ "$wrong" = 0 ] || return
    reviewer=$(field reviewer | grep -x '[A-Za-z0-9._+-]*@[A-Za-z0-9.-]*')
    if [ -z "$reviewer" ] || [ "$(field decision)" = "" ] || ! grep -qx ' "predicateType": "urn:stackpkg:readiness-signoff:v1",' "$said"; then
        object "not a statement in the form that signing writes"
        return
    fi
    signer
    [ -z "$why" ] || { object "$why"; return; }
    case $reviewer in *@demonstration.invalid) demonstration=true ;; *) demonstration=false ;; esac
    [ "$(field demonstration)" = "$demonstration" ] || object "demonstration is not $demonstration"
    [ "$(field role)" = "$role" ] || object "role is $(field role), not $role"
    [ "$(field run)" = "$run" ] || object "run is $(field run), not $run"
    case $(field decision) in approve | approve-with-conditions) ;; *) object "$reviewer decided: $(field decision)" ;; esac
    for day in $(sed -n 's/^    "due": "\([0-9-]*\)",$/\1/p' "$said"); do late "$day" && object "a condition was due $day"; done
    for day in $(sed -n 's/^    "expires": "\([0-9-]*\)",$/\1/p' "$said"); do late "$day" && object "a waiver expired $day"; done
    [ "$(sed -n 's/^    "sha256": "\(.*\)"$/\1/p' "$said")" = "$digest" ] || object "signed a different manifest, another SHA256SUMS than this"
    ! grep -qxF "$key" "$work/authors" || object "signed with an author's key, $key; whoever makes a run does not approve it"
    [ "$demonstration" = false ] || echo "DEMONSTRATION KEYS: not an approval ($role)" >&2
}
object() { complain "$said: $1"; wrong=1; }
: >"$work/used"
[ ! -f SHA256SUMS ] || for role in architecture infrastructure safety; do
    approvals=0
    for said in "signoffs/$role.json" "signoffs/$role-"[2-9].json "signoffs/$role-"[2-9].json.sig; do
        [ -e "$said" ] || [ -e "$said.sig" ] || continue
        case $said in *.sig) [ ! -e "${said%.sig}" ] || continue; said=${said%.sig} ;; esac
        wrong=0
        key=
        judge
        [ -z "$key" ] || ! grep -qxF "$key" "$work/used" || object "signed with a key that has signed before, $key"
        echo "${key:-none}" >>"$work/used"
        [ "$wrong" = 1 ] || approvals=$((approvals + 1))
    done
    quorum=$(sed -n "s/^  $role: //p" "$work/policy")
    [ "$approvals" -ge "$quorum" ] || complain "signoffs/$role.json: $approvals of $quorum approvals by $role"
done
for file in signoffs/* signoffs/.[!.]*; do
    [ -e "$file" ] || [ -h "$file" ] || continue
    printf '%s' "$file" | grep -Eqx 'signoffs/(architecture|infrastructure|safety)(-[2-9])?\.json(\.sig)?' ||
        complain "$file: not a sign-off of a role"
done
finish
