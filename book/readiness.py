"""One run as plain data, and the pages that tell whether it is ready: overview, checklist, sign-offs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from myst import badge, code, div, table, text

from stackpkg import params, runs
from stackpkg.governance import seal, standing

Run = dict[str, Any]
COLOURS = ("green", "amber", "red", "waived")
MARK = {"green": "✓", "amber": "◐", "red": "✗", "waived": "○"}
SHOWN = 8  # of what is missing; the rest is one click away


def duration(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def gather(folder: Path) -> Run:
    """The run as plain data. Stage states come from the runner's locks, never from a notebook's own metadata."""
    stages = {}
    for name in sorted({path.stem for path in (*folder.glob("nb/*.ipynb"), *Path("notebooks").glob("*.ipynb"))}):
        lock = folder / "lock" / f"{name}.json"
        found = runs.read_json(lock) if lock.exists() else {"state": "not run"}
        stages[name] = {key: found.get(key) for key in ("state", "started", "seconds", "error", "cell")}
    profile, (items, problems) = folder / "config/params.yaml", standing.live(folder)
    statements = {path.stem: runs.read_json(path)["predicate"] for path in sorted(folder.glob("signoffs/*.json"))}
    return {
        "run": folder.name,
        "built": runs.now(),
        "stages": stages,
        "items": items,
        "statements": statements,
        "signoffs": {said["role"]: said for said in statements.values()},
        "demonstration": any(said["demonstration"] for said in statements.values()),
        "seal": sealed(folder, problems),
        "params": yaml.safe_load(profile.read_text(encoding="utf-8")) if profile.exists() else {},
        "environment": runs.read_json(folder / "config/environment.json")
        if (folder / "config/environment.json").exists()
        else {},
        "defaults": params.validate({}).model_dump(mode="json"),
    }


def sealed(folder: Path, problems: list[str]) -> Run:
    """The seal as it stood when the book was built: digest, files, and what `stackpkg verify` has against it."""
    sums = folder / "SHA256SUMS"
    if not sums.exists():
        return {"digest": "", "files": 0, "problems": []}
    return {"digest": runs.digest(sums), "files": sums.read_text(encoding="utf-8").count("\n"), "problems": problems}


def counts(run: Run) -> Counter[str]:
    return Counter(item["status"] for item in run["items"])


def approved(run: Run) -> list[str]:
    """Roles that have signed, and against whose statements verification has nothing."""
    wrong = {problem.split(".json")[0].split("-")[0] for problem in run["seal"]["problems"]}
    return [role for role in seal.ROLES if role in run["signoffs"] and f"signoffs/{role}" not in wrong]


def broken(run: Run) -> list[str]:
    """What speaks against the run: a stage, a line or the seal failed. Markdown, with links."""
    found = [
        f"{badge('failed')} stage [](notebooks/{name}.ipynb){told(stage)}"
        for name, stage in run["stages"].items()
        if stage["state"] == "failed"
    ]
    found += [f"{badge('red')} {lead(item)}" for item in run["items"] if item["status"] == "red"]
    if run["seal"]["problems"]:
        first = text(run["seal"]["problems"][0][:200])
        found.append(f"{badge('red', 'seal')} [{len(run['seal']['problems'])} problem(s)](signoff/archive.md): {first}")
    return found


def waiting(run: Run) -> list[str]:
    states = Counter(stage["state"] for stage in run["stages"].values())
    left = [f"{states[state]} {state}" for state in states if state not in ("ok", "failed")]
    return [f"{badge('not', 'stages')} {text(', '.join(left))} of {len(run['stages'])}"] if left else []


def open_points(run: Run) -> list[str]:
    """What is not there yet, though nothing is wrong with it."""
    found = []
    if not run["items"]:
        found.append(f"{badge('not', 'checklist')} there is no checklist yet")
    found += [f"{badge('amber')} {lead(item)}" for item in run["items"] if item["status"] == "amber"]
    if not run["seal"]["digest"]:
        found.append(f"{badge('not', 'seal')} not sealed yet")
    if without := [role for role in seal.ROLES if role not in approved(run)]:
        found.append(f"{badge('not', 'sign-offs')} no [approval](signoff/archive.md) by {text(', '.join(without))}")
    if run["demonstration"]:
        found.append(f"{badge('demonstration', 'keys')} [signed](signoff/archive.md) with demonstration keys only")
    return found


def told(stage: Run) -> str:
    error = (stage["error"] or "").strip().splitlines()
    return f": {code(error[-1][:200])}" if error else ""


def lead(item: Run) -> str:
    """A line's name as a link, and the first reason why it is not green."""
    reason = text(item["reasons"][0][:200]) if item["reasons"] else ""
    return f"[{text(item['id'])}](#{anchor(item)}) {text(item['text'][:160].rstrip('.'))}: {reason}"


def anchor(item: Run) -> str:
    return f"line-{item['id'].lower()}"


def verdict(run: Run) -> tuple[str, str, str]:
    """Class of the box, the word, and one sentence."""
    if broken(run):
        return "no", "Not ready.", "Something failed."
    if waiting(run) or open_points(run):
        return "wait", "Not ready yet.", "Nothing failed; what follows is still open."
    return "yes", "Ready.", "Every stage, line and signature holds."


def status(run: Run, others: list[Run]) -> str:
    kind, word, sentence = verdict(run)
    missing = [*waiting(run), *broken(run), *open_points(run)]
    more = f"\n- and [{len(missing) - SHOWN} more](signoff/checklist.md)" * (len(missing) > SHOWN)
    parts = [div(f"verdict {kind}", f"**{word}** {text(sentence)}"), div("tiles", *tiles(run), fence=":::::")]
    if missing:
        parts += ["## What is missing\n", "\n".join(f"- {point}" for point in missing[:SHOWN]) + more + "\n"]
    if run["items"]:
        parts += ["## Readiness board\n", BOARD, board(run), f"{legend()}\n"]
    if others:
        parts += ["## Runs of this site\n", "[Compared](compare.md) line by line, parameter by parameter.\n"]
        parts.append(summaries([run, *others]))
    return "\n".join([*parts, "## Stages\n", stages(run)])


BOARD = "Each chip is a line of the checklist and leads to its checks, its evidence and their digests.\n"


def legend() -> str:
    words = {"green": "its checks pass", "amber": "they pass, something is known to be missing", "red": "a check fails"}
    words |= {"waived": "a reviewer lets it pass, for a reason and until a day"}
    return ", ".join(f"{chip(MARK[colour], colour)} {word}" for colour, word in words.items()) + "\\."


def chip(label: str, colour: str) -> str:
    return f"{{span .chip .{colour}}}`{label}`"


def board(run: Run) -> str:
    rows = []
    for workstream in dict.fromkeys(item["workstream"] for item in run["items"]):
        mine = [item for item in run["items"] if item["workstream"] == workstream]
        chips = [f"[{chip(item['id'] + ' ' + MARK[item['status']], item['status'])}](#{anchor(item)})" for item in mine]
        green = sum(item["status"] == "green" for item in mine)
        rows.append([text(workstream), f"{green} of {len(mine)}", " ".join(chips)])
    return table("workstream | green | lines", rows)


def stages(run: Run) -> str:
    rows = []
    for name, stage in run["stages"].items():
        note = told(stage).removeprefix(": ") if stage["state"] != "ok" else ""
        rows.append([f"[](notebooks/{name}.ipynb)", badge(stage["state"]), text(duration(stage["seconds"])), note])
    return table("stage | state | took | note", rows)


def tiles(run: Run) -> list[str]:
    found, total = counts(run), len(run["items"])
    ok = sum(stage["state"] == "ok" for stage in run["stages"].values())
    failed = sum(stage["state"] == "failed" for stage in run["stages"].values())
    took = sum(stage["seconds"] or 0 for stage in run["stages"].values())
    colours = " ".join(badge(colour, f"{found[colour]} {colour}") for colour in COLOURS if found[colour])
    stage = badge("failed", f"{failed} failed") if failed else f"{text(duration(took))} in all"
    green = f"{found['green']} of {total} green" if total else "none yet"
    said = {
        "Checklist": (green, colours or "the last notebook writes it"),
        "Stages": (f"{ok} of {len(run['stages'])} ok", stage),
        "Seal": seal_tile(run["seal"]),
        "Sign\\-offs": (f"{len(approved(run))} of {len(seal.ROLES)} roles", signed(run)),
    }
    return [div("tile", name, f"**{head}**", below, fence="::::") for name, (head, below) in said.items()]


def seal_tile(found: Run) -> tuple[str, str]:
    if not found["digest"]:
        return "not sealed", "the last stage ends in it"
    if found["problems"]:
        return "does not verify", badge("red", f"{len(found['problems'])} problem(s)")
    return "verified", f"{found['files']} files, {code(found['digest'][:12])}"


def signed(run: Run) -> str:
    return (
        badge("demonstration keys")
        if run["demonstration"]
        else "reviewers' keys"
        if run["signoffs"]
        else "not signed yet"
    )


def checklist(run: Run) -> str:
    if not run["items"]:
        return "This run has no checklist yet: its last notebook writes `checklist.yaml`.\n"
    rows = [
        [f"[{text(item['id'])}](#{anchor(item)})", badge(item["status"]), text(item["text"]), str(len(item["files"]))]
        for item in run["items"]
    ]
    parts = [table("line | state | what | files", rows)]
    for workstream in dict.fromkeys(item["workstream"] for item in run["items"]):
        parts.append(f"## {text(workstream)}\n")
        parts += [line(item, run) for item in run["items"] if item["workstream"] == workstream]
    return "\n".join(parts)


def line(item: Run, run: Run) -> str:
    parts = [f"({anchor(item)})=\n### {text(item['id'])} {badge(item['status'])}\n\n{text(item['text'])}\n"]
    in_table = {check["why"] for check in item["checks"]}
    parts += [f"- {text(reason)}" for reason in item["reasons"] if reason not in in_table]
    parts.append("")
    if item["checks"]:
        rows = [check_row(check, item["files"]) for check in item["checks"]]
        parts.append(table("measured | seen | must be | check | in", rows))
    notebooks = [f"[](../notebooks/{name}.ipynb)" for name in item["notebooks"] if name in run["stages"]]
    parts.append(f"From {', '.join(notebooks)}\\.\n" if notebooks else "")
    if item["files"]:
        digests = [[archived(path), code(digest)] for path, digest in item["files"].items()]
        parts.append(f":::{{dropdown}} Evidence: {len(digests)} files\n{table('file | sha256', digests)}\n:::\n")
    return "\n".join(parts)


def check_row(check: Run, files: Run) -> list[str]:
    state = badge("failed") if check["why"] else badge("passed")
    path = f"evidence/{check['evidence']}.json"
    where = f"{archived(path)} {code(files[path][:12])}" if path in files else code(path)
    return [code(check["value"]), code(check["seen"]), code(f"{check['op']} {check['limit']}"), state, where]


def archived(path: str, up: str = "..") -> str:
    """A link to the copy of an evidence file when the book carries one, else its path."""
    if Path("reports", path).is_file():
        return f"{{span .report}}`{path}`"
    return f"[{code(path)}](<{up}/archive/{path}>)" if Path("archive", path).is_file() else code(path)


def archive(run: Run, others: list[Run], folder: Path) -> str:
    parts = []
    if run["demonstration"]:
        parts.append(
            ":::{danger} Demonstration keys\n"
            "Throw-away keys made these signatures on the spot. They show how signing works and approve nothing.\n:::\n"
        )
    if not run["signoffs"]:
        parts.append("This run is not signed yet.\n")
    else:
        head = "role | reviewer | decision | conditions | at | keys | files"
        parts.append(table(head, [signoff_row(name, item) for name, item in run["statements"].items()]))
    for problem in run["seal"]["problems"]:
        parts.append(f"- {badge('red', 'problem')} {text(problem)}")
    sums = folder / "SHA256SUMS"
    if sums.exists():
        lines = sums.read_text(encoding="utf-8").rstrip()
        state = "do not hold" if run["seal"]["problems"] else "held"
        parts.append(f"\n{run['seal']['files']} files are sealed; digest of the list {code(run['seal']['digest'])}\\. "
                     f"When this book was built, seal and signatures {state}\\.\n")  # fmt: skip
        parts.append(f"````text\n{lines}\n````\n")
    else:
        parts.append("This run is not sealed yet: there is no `SHA256SUMS`.\n")
    return "\n".join([*parts, *(["## All runs of this site\n", summaries([run, *others])] if others else [])])


def signoff_row(name: str, item: Run) -> list[str]:
    keys = badge("demonstration") if item["demonstration"] else badge("reviewer")
    names = " ".join(archived(f"signoffs/{name}.json{end}") for end in ("", ".sig"))
    conditions = "; ".join(condition["text"] for condition in item.get("conditions") or [])
    said = (item["role"], item.get("reviewer"), item.get("decision"), conditions, item.get("at"))
    return [*map(text, said), keys, names]


def summaries(found: list[Run]) -> str:
    """A row for each run: verdict, checklist, seal, what each role decided."""
    rows = []
    for run in sorted(found, key=lambda run: run["run"]):
        kind, word, _ = verdict(run)
        colours = " ".join(
            badge(colour, f"{counts(run)[colour]} {colour}") for colour in COLOURS if counts(run)[colour]
        )
        said = [text(run["signoffs"].get(role, {}).get("decision", "")) for role in seal.ROLES]
        state = badge({"yes": "green", "no": "red"}.get(kind, "amber"), word.rstrip("."))
        about = [state, colours or text("no checklist"), code(run["seal"]["digest"][:12]) or text("not sealed")]
        keys = badge("demonstration") if run["demonstration"] else ""
        rows.append([code(run["run"]), *about, *said, keys])
    return table(" | ".join(["run", "verdict", "checklist", "seal", *seal.ROLES, "keys"]), rows)
