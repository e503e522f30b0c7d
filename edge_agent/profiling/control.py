"""An agent's control process that trains once: ``python -m lwfed.edge_agent.profiling.control`` (`lwfed.child`).

In:   {"order": what `lwfed.edge_agent.worker` reads, "threads", "sample_s", "state": folder}
Out:  {"event": "ready", "pid", "before_mb"}  the training process and its high-water mark, when it has made its imports
      what the training process says from then on; its "needs_mb" with what this one takes

It holds what `edge-agent join` holds, journal, blob stores, session and MQTT client, made the same way, and drives the
training process with the same code; it is only connected to nothing.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from lwfed.child import Json, Said, serve
from lwfed.console import Console
from lwfed.edge_agent import events
from lwfed.edge_agent.agent import Agent, Join
from lwfed.edge_agent.process import FromChild, TrainingProcess
from lwfed.edge_agent.resources import HIGH_WATER, share_mb, status_mb
from lwfed.edge_agent.screen import Screen
from lwfed.transport.address import BrokerAddress
from lwfed.transport.mqtt import MqttTransport


class Control:
    def __init__(self) -> None:
        self._agent: Agent | None = None

    def handle(self, data: Json, say: Callable[[Json], None]) -> None:
        join = Join(data["order"]["data"], "default", "profile", Path(data["state"]), wait_s=1)
        self._agent = Agent(join, MqttTransport(BrokerAddress.parse("mqtt://127.0.0.1")), Screen(Console()))
        heard: queue.SimpleQueue[FromChild] = queue.SimpleQueue()
        process = TrainingProcess(heard.put, data["threads"])
        running = True
        while running:
            process.sample()
            try:
                said = heard.get(timeout=max(0.0, (process.next_sample or time.monotonic() + data["sample_s"]) - time.monotonic()))
            except queue.Empty:
                continue
            event = process.hear(said)
            if isinstance(event, events.WorkerReady):
                before_mb = status_mb(Path("/proc", str(process.pid)), HIGH_WATER)
                say({"event": "ready", "pid": process.pid, "before_mb": before_mb or 0.0})
                process.train(data["order"], data["sample_s"])
            elif isinstance(event, events.WorkerError):
                say({"event": "error", "kind": event.kind, "message": event.message})
                running = False
            elif isinstance(event, events.WorkerPlanned):
                say({"event": "planned", **asdict(replace(event, needs_mb=round(event.needs_mb + share_mb(), 1)))})
            elif isinstance(said, Said):
                say(said.data)
                running = said.data["event"] != "done"


def main() -> None:
    serve(Control().handle, {"event": "started"})


if __name__ == "__main__":
    main()
