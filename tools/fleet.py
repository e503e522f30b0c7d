"""A whole run as processes of this machine: broker, server and devices, as users start them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lwfed.config import load_config
from lwfed.tools.account import Event
from lwfed.tools.programs import Programs

OnSaid = Callable[[str, Event], None]  # a program, and what it has said


def run_fleet(
    preset: str,
    settings: Sequence[str],
    data: str,
    state: Path,
    on_said: OnSaid,
    broker: str = "embedded",
    way: Callable[[int, str], str] = lambda number, url: url,
) -> list[Event]:
    """All events of the server, which starts a `broker` of that kind; device `number` reaches it at `way(number, url)`.

    Devices are started one after the other: their numbers, which decide on splits and seeds, go by the order of arrival.
    Raises WorkerFailed when a program fails.
    """
    config = load_config(preset, settings)
    sets = [f"--set={setting}" for setting in settings]
    events: list[Event] = []
    with Programs() as programs:
        place = ("--broker", broker, "--port", "0", "--state", str(state / "server"))
        programs.start("server", "lwfed.cloud_server.cli", "serve", "--config", preset, *sets, *place, "--until-done")
        url, joined = "", 0
        while (line := programs.next()).said is not None or line.program != "server":
            if line.said is None:
                continue
            on_said(line.program, line.said)
            if line.program != "server":
                continue
            events.append(line.said)
            match line.said:
                case {"event": "broker"}:
                    url = line.said["url"]
                case {"event": "device", "status": "joined"}:
                    joined += 1
                case _:
                    continue
            if joined < config.data.devices:
                name = f"device-{joined}"
                place = ("--name", name, "--state", str(state / name), "--fleet", config.run.fleet)
                programs.start(name, "lwfed.edge_agent.cli", "join", way(joined, url), "--data", data, *place, "--wait", "60")
    return events
