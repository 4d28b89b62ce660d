"""A settings file for a gated server, drafted from what a registry holds."""

import json
from collections.abc import Sequence

from mlflow_kdguard.policy import Policy

_TEXT = """\
# Settings of a gated registry server, drafted by `kdguard adopt` from what {registry} holds.
# Read every line before you start a server with it (KDGUARD_SERVER=this file); paths are relative
# to this file. docs/reference/server.md explains every key.

# Raise it with every change, also of a key, a policy or a revocation.
version: 1

# What certificates call this registry: its URI as clients see it.
registry: [{identity}]

# audit blocks nothing and logs what it would have refused: look at it with `kdguard sweep`, then
# write enforce.
mode: audit

# The packaged policy guards {guarded}.
# Name your own: it must pin the data that you measure on.
# policy: policy.yaml

# Folder of the .pub records whose owners you trust, at least one verifier's (kdguard keygen).
keys: keys/

# Where a version's bytes may lie: {counted}.
allow:
{allowed}
{strange}
# Promoted bytes are copied here. Clients must be able to read it, and no server route to write it.
content: {{root: {content}}}

# Signs the log's head (kdguard keygen log.pem), and the file outside of the database that keeps
# every head: put it on another disk.
log: {{key: log.pem, head: log-head.jsonl}}
"""


def settings(
    registry: str, *, policy: Policy, roots: Sequence[tuple[str, int]], strange: Sequence[str]
) -> str:
    """The draft: YAML with comments. `roots` are proposed, each with its number of versions;
    `strange` are locations below none of them."""
    guarded = [f"@{name}" for name in policy.guarded.aliases]
    guarded += [f"stage {name}" for name in policy.guarded.stages]
    return _TEXT.format(
        registry=_line(registry),
        identity=json.dumps(registry),
        guarded=", ".join(guarded),
        counted=f"{sum(count for _, count in roots)} versions lie below these",
        allowed="\n".join(f"  - {json.dumps(root)}  # {count} versions" for root, count in roots)
        or '  - "mlflow-artifacts:/"  # nothing is registered yet: the server\'s own artifacts',
        strange=_commented(strange),
        content=json.dumps("file:///srv/kdguard-content"),
    )


def _commented(strange: Sequence[str]) -> str:
    if not strange:
        return ""
    lines = ["# Not proposed, because no run of this registry wrote there; who did?"]
    lines += [f"#  - {json.dumps(place)}" for place in strange[:20]]
    if len(strange) > 20:
        lines.append(f"# … and {len(strange) - 20} more (see --json)")
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    return "".join(c for c in text if c.isprintable())
