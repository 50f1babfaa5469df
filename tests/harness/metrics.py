"""What a process serves to Prometheus, scraped and parsed as Prometheus does it."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.harness.process import ServiceProcess


@dataclass(frozen=True)
class Scrape:
    """Everything that was served, but for what tells of the process and of the target."""

    samples: tuple[Sample, ...]
    # By family: its unit's suffix and the like are part of the name, as Prometheus has it.
    types: dict[str, str]

    def all(self, name: str, **labels: str) -> Iterator[Sample]:
        """The samples of a name that have these labels."""
        return (one for one in self.samples if one.name == name and labels.items() <= one.labels.items())

    def value(self, name: str, **labels: str) -> float:
        """Their sum; fails if there are none."""
        values = [one.value for one in self.all(name, **labels)]
        assert values, f"there is no {name} {labels}"
        return sum(values)

    def has(self, name: str, **labels: str) -> bool:
        """Whether there is any."""
        return any(True for _ in self.all(name, **labels))


def parsed(text: str) -> Scrape:
    """What a scrape says."""
    families = [
        family
        for family in text_string_to_metric_families(text)
        if not family.name.startswith("process_") and family.name != "target_info"
    ]
    samples = tuple(sample for family in families for sample in family.samples)
    return Scrape(samples, {family.name: family.type for family in families})


async def scrape(process: ServiceProcess) -> Scrape:
    """What a service serves now; it has a metrics address."""
    served = await process.wait_log("metrics are served", pid=process.pid)
    return parsed(await read_url(f"http://{served['address']}{served['path']}"))


async def read_url(url: str) -> str:
    """What is served at a URL."""

    def get() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())

    return await asyncio.to_thread(get)
