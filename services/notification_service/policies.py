"""Policies: how often and how fast each channel tries, from the operator's file over the settings.

    [[policies]]
    name = "webhook"          # the channel: email or webhook
    tries = 12                # before a delivery is parked
    retry_base = 5.0          # bound of the pause after the first attempt, seconds
    retry_factor = 4.0        # by what the bound grows with each further attempt
    retry_cap = 3600.0        # the greatest bound, seconds
    timeout = 10.0            # of one attempt, seconds
    max_age = 259200.0        # a delivery is given up so long after its first attempt, seconds
    parked_holds = true       # a parked delivery holds back the later ones of its user and channel
    retry_codes = [404]       # answers that are worth another attempt although they look final
    refuse_codes = [503]      # answers that are final although they look worth another attempt

What is left out is as the settings have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from notification_service.domain import CARRIERS
from notification_service.retries import Policy
from servicekit import configfile

_Code = Annotated[int, Field(ge=100, le=599)]

# Keys whose fields of a Policy have another name.
_FIELDS = {"retry_base": "base", "retry_factor": "factor", "retry_cap": "cap"}


class PolicyEntry(configfile.Entry):
    """One policy; the fields are the keys of its table."""

    name: Annotated[str, configfile.one_of(CARRIERS)]
    tries: int | None = Field(None, ge=1, le=100)
    retry_base: float | None = Field(None, gt=0)
    retry_factor: float | None = Field(None, ge=1)
    retry_cap: float | None = Field(None, gt=0)
    timeout: float | None = Field(None, gt=0, le=300)
    max_age: float | None = Field(None, gt=0, le=31 * 86_400)
    parked_holds: bool | None = None
    retry_codes: frozenset[_Code] | None = None
    refuse_codes: frozenset[_Code] | None = None


def load(path: Path | None, default: Policy, lease: float) -> Mapping[str, Policy]:
    """The policy of each channel. Raises InvalidConfigError, also if a time-out is more than half a lease."""
    entries = configfile.read(path, "policies", PolicyEntry) if path else ()
    policies = dict.fromkeys(CARRIERS, default)
    for entry in entries:
        given = entry.model_dump(exclude={"name"}, exclude_none=True)
        policies[entry.name] = replace(default, **{_FIELDS.get(key, key): value for key, value in given.items()})
    problems = [
        f"{path}: policy {name!r}: timeout: must be at most half of TIDINGS_NOTIFICATIONS_LEASE"
        for name, policy in policies.items()
        if 2 * policy.timeout > lease
    ]
    if problems:
        raise configfile.InvalidConfigError("\n".join(problems))
    return policies
