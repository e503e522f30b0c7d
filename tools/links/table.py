"""The same run over links of different quality: what each costs, and that each gives the same encoder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lwfed.tools import account
from lwfed.tools.fleet import run_fleet
from lwfed.tools.links.proxy import Counts, Link, Proxy
from lwfed.tools.machine import machine
from lwfed.transport.address import BrokerAddress

PRESET, DATA, DEVICES, ROUNDS = "demo", "digits", 2, 4
SETTINGS = (  # 0.35 million trained parameters, which are no work for a processor
    *("model.width=128", "model.depth=1", f"stages.rounds_per_stage={ROUNDS}", "train.epochs=1", "train.batch_size=256"),
    *("calibration.every=never", "evaluation.data=null", f"rounds.min_devices={DEVICES}", f"data.devices={DEVICES}"),
)
KBYTE = 1000
LINKS = {
    "10 MB/s": Link(rate=10_000 * KBYTE),
    "1 MB/s, 300 ms late": Link(rate=1000 * KBYTE, delay_s=0.3),
    "50 kB/s": Link(rate=50 * KBYTE),
    "50 kB/s, stalls": Link(rate=50 * KBYTE, stall_every_s=30.0, stall_s=8.0),
    "50 kB/s, a cut a minute": Link(rate=50 * KBYTE, cut_every_s=60.0),
}
NOTES = (
    f"{DEVICES} devices, {ROUNDS} rounds. Bytes are those of a device, as a proxy counts them: MQTT with acknowledgements and pings.",
    "Beyond: more than over the first link. Late: each way. Stalls: nothing passes for 8 s, twice a minute.",
)
HEADER = f"{'':24}{'s/round':>9}{'kB down':>9}{'kB up':>8}{'beyond':>8}{'cuts':>6}{'a cut':>7}{'updates':>9}"


def run_links(codec: str, broker: str, as_json: bool) -> bool:
    """Whether every link gave all updates and the same encoder."""
    rows: list[dict[str, Any]] = []
    for name, link in LINKS.items():
        click.echo(name, err=True)
        rows.append(measure(name, link, broker, [*SETTINGS, f"transfer.codec={codec}"], rows[0] if rows else None))
    report = make_report(codec, rows)
    click.echo(json.dumps(report) if as_json else "\n".join(lines(report)))
    return bool(report["lost"] == 0 and report["encoders"] == 1)


def measure(name: str, link: Link, broker: str, settings: Sequence[str], first: Mapping[str, Any] | None) -> dict[str, Any]:
    """One run with every device behind `link`: its record."""
    with tempfile.TemporaryDirectory(prefix="lwfed-links-") as scratch, contextlib.ExitStack() as stack:
        proxies: list[Proxy] = []

        def way(number: int, url: str) -> str:
            target = BrokerAddress.parse(url)
            proxies.append(stack.enter_context(Proxy((target.host, target.port), link, seed=number)))
            return f"mqtt://127.0.0.1:{proxies[-1].port}"

        events = run_fleet(PRESET, settings, DATA, Path(scratch), lambda program, said: None, broker, way)
        encoder = Path(next(event["encoder"] for event in events if event["event"] == "finished"))
        sha256 = hashlib.sha256(encoder.read_bytes()).hexdigest()
    return {"name": name, **record(events, [proxy.counts for proxy in proxies], first), "encoder_sha256": sha256}


def record(events: Sequence[account.Event], counts: Sequence[Counts], first: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of a run with what its proxies counted; bytes are of a device, `beyond_bytes` those more than in `first`."""
    rounds = [event for event in events if event["event"] == "round"]
    closed = [event for event in rounds if event["status"] == "closed"]
    down, up = (sum(getattr(one, name) for one in counts) / len(counts) for name in ("down_bytes", "up_bytes"))
    cuts = sum(one.cuts for one in counts)
    beyond = down + up - (first["down_bytes"] + first["up_bytes"] if first else down + up)
    return {
        "seconds_per_round": round((closed[-1]["time"] - rounds[0]["time"]) / len(closed), 1),
        "down_bytes": round(down),
        "up_bytes": round(up),
        "beyond_bytes": round(beyond),
        "cuts": cuts,
        "beyond_bytes_per_cut": round(beyond * len(counts) / cuts) if cuts else None,
        "updates": sum(event["event"] == "contribution" for event in events),
    }


def make_report(codec: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`lost` counts updates that were not taken; `encoders` different ones, of which there should be one."""
    return {
        "codec": codec,
        "links": list(rows),
        "lost": sum(DEVICES * ROUNDS - row["updates"] for row in rows),
        "encoders": len({row["encoder_sha256"] for row in rows}),
        "notes": list(NOTES),
        "machine": machine(),
    }


def lines(report: Mapping[str, Any]) -> list[str]:
    """For people."""
    all_ = DEVICES * ROUNDS
    result = "all the same encoder" if report["encoders"] == 1 else f"{report['encoders']} DIFFERENT ENCODERS"
    rows = [_line(row, f"{row['updates']} of {all_}") for row in report["links"]]
    return [HEADER, *rows, "", f"{report['codec']}: {result}, {report['lost']} updates lost", *report["notes"]]


def _line(row: Mapping[str, Any], updates: str) -> str:
    down, up, beyond = (row[key] / KBYTE for key in ("down_bytes", "up_bytes", "beyond_bytes"))
    each = "" if row["beyond_bytes_per_cut"] is None else f"{row['beyond_bytes_per_cut'] / KBYTE:.0f}"
    return f"{row['name']:24}{row['seconds_per_round']:9.1f}{down:9.0f}{up:8.0f}{beyond:8.0f}{row['cuts']:6}{each:>7}{updates:>9}"
