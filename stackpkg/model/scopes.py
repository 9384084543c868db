"""Roles and scopes: which token may read which. Rules from YAML, compiled for a batch without an L x L tensor.

Attention carries what the key knows to the query. An edge is allowed if a rule lets the query's role read the key's,
another lets the key's role write to the query's, both in mask classes that hold between the two tokens, and no wall
lies between them. No rule opens a wall; where no rule speaks, the edge is denied, that of a token to itself too.

    CAUSAL        any earlier token                           SEGMENT     one segment (a message, a document)
    TOOL_SCOPE    one tool call                               RET_SCOPE   one retrieved record
    SAFETY_SCOPE  one protected scope

    Walls: a token of one tool call never reads another call's, one of a retrieved record never another record's, and
    what a protected scope holds is read from inside it alone.

Rules bind single edges. What a token has read travels on with it, so a role reaches another through a third that may
read it; to close such a path, deny its first edge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from torch import Tensor

from stackpkg import runs
from stackpkg.schema import CLASSES, ROLES, Section, allowed

PROTECTED = CLASSES.index("SAFETY_SCOPE") - 1  # its column of `spans`


class Scopes(NamedTuple):
    """What attention needs of the rules for one batch. Causality and packed documents are attention's own matter."""

    of: Tensor  # int64 [b, L], scope class of each token, 0..S-1
    allowed: Tensor  # bool [b, L, S], classes the token may read
    enforce: bool  # forbidden edges are masked; else their share of attention is measured


class Rules(NamedTuple):
    read: Tensor  # bool [reader, source, class]
    write: Tensor  # bool [source, reader, class]


def _known(names: tuple[str, ...]) -> BeforeValidator:
    def check(given: Any) -> Any:
        if given in names:
            return given
        raise ValueError(f"{given!r} is unknown; {allowed(given, names)}")

    return BeforeValidator(check)


Role = Annotated[str, _known(ROLES)]


class Rule(Section):
    """`role` may read `reads`, and write to `writes`, where the mask class `within` holds."""

    role: Role
    reads: list[Role] = Field(default_factory=list)
    writes: list[Role] = Field(default_factory=list)
    within: Annotated[str, _known(CLASSES)]


def rules(values: Any) -> Rules:
    """Rules from a list of mappings; those of one pair add up. Raises `ValueError` that names every bad key."""
    try:
        listed = TypeAdapter(list[Rule]).validate_python(values)
    except ValidationError as error:
        told = [f"rule {'.'.join(map(str, e['loc']))}: {e['msg']}; given {e['input']!r}" for e in error.errors()]
        keys = f"a rule has the keys {', '.join(Rule.model_fields)}"
        raise ValueError("\n".join(["the rules are not valid:", *told, keys])) from None
    found = Rules(*(torch.zeros(len(ROLES), len(ROLES), len(CLASSES), dtype=torch.bool) for _ in Rules._fields))
    for rule in listed:
        for table, others in zip(found, (rule.reads, rule.writes), strict=True):
            for other in others:
                table[ROLES.index(rule.role), ROLES.index(other), CLASSES.index(rule.within)] = True
    return found


def load(path: Path | None = None) -> Rules:
    """The rules of a YAML file, by default `params/scopes.yaml`."""
    path = path or runs.root() / "params/scopes.yaml"
    try:
        return rules(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from None


def _edges(rules: Rules, roles: Tensor, spans: Tensor, source_roles: Tensor, source_spans: Tensor) -> Tensor:
    """bool [b, n, m]: may reader n read source m, causality aside?"""
    reader, source = roles[:, :, None], source_roles[:, None]
    mine, theirs = spans[:, :, None], source_spans[:, None]
    same = (mine == theirs) & (theirs >= 0)
    holds = torch.cat((torch.ones_like(same[..., :1]), same), -1)  # [b, n, m, class]
    agreed = (rules.read.to(roles.device)[reader, source] & holds).any(-1)
    agreed &= (rules.write.to(roles.device)[source, reader] & holds).any(-1)
    protected = torch.tensor([name == "SAFETY_SCOPE" for name in CLASSES[2:]], device=roles.device)
    wall = (theirs[..., 1:] >= 0) & ~same[..., 1:] & (protected | (mine[..., 1:] >= 0))
    return agreed & ~wall.any(-1)


def _check(roles: Tensor, spans: Tensor) -> None:
    wanted = (*roles.shape, len(CLASSES) - 1)
    if roles.ndim != 2 or tuple(spans.shape) != wanted or roles.is_floating_point() or spans.is_floating_point():
        raise ValueError(
            f"roles {roles.dtype} {list(roles.shape)}, spans {spans.dtype} {list(spans.shape)}; allowed: integers "
            f"[b, L] and [b, L, {len(CLASSES) - 1}], the columns of spans being {CLASSES[1:]}"
        )
    if roles.numel() and not 0 <= int(roles.min()) <= int(roles.max()) < len(ROLES):
        raise ValueError(f"roles from {int(roles.min())} to {int(roles.max())}; allowed: an index of {ROLES}")


@torch.no_grad()
def compile(rules: Rules, roles: Tensor, spans: Tensor, enforce: bool) -> Scopes:
    """The rules for one batch. `roles` [b, L]: index in `ROLES`. `spans` [b, L, 4]: number of the segment, tool call,
    protected scope and retrieved record that a token is in, -1 where it is in none.

    Tokens that the rules can't tell apart as sources share a class, so S counts the roles and spans of a row and does
    not grow with L. Raises `ValueError` for wrong shapes, types or roles.
    """
    _check(roles, spans)
    batch, length = roles.shape
    # A segment matters only to sources that a SEGMENT rule names; ordinary messages of one role are one class.
    bound = (rules.read[..., 1].any(0) | rules.write[..., 1].any(1)).to(roles.device)[roles]
    traits = torch.cat((roles[..., None], torch.where(bound, spans[..., 0], -1)[..., None], spans[..., 1:]), -1)
    rows = torch.arange(batch, device=roles.device)[:, None, None].expand(-1, length, 1)
    # Sorted by row first, so the classes of a row are consecutive numbers.
    _, found = torch.unique(torch.cat((rows, traits), -1).flatten(0, 1), dim=0, return_inverse=True)
    of = found.view(batch, length) - found.view(batch, length).amin(1, keepdim=True)
    table = traits.new_zeros(batch, int(of.max()) + 1, traits.shape[-1])  # a class that a row lacks has no tokens
    table.scatter_(1, of[..., None].expand_as(traits), traits)
    return Scopes(of, _edges(rules, roles, spans, table[..., 0], table[..., 1:]), enforce)


def mask(rules: Rules, roles: Tensor, spans: Tensor) -> Tensor:
    """bool [b, L, L], entry (q, k): may q read k, causality included? For tests and small cases."""
    _check(roles, spans)
    return _edges(rules, roles, spans, roles, spans).tril()
