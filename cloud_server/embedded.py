"""The embedded broker as a process of its own: ``python -m lwfed.cloud_server.embedded HOST PORT``.

amqtt, for demos and tests on this machine: it neither enforces keep-alive nor hides retained messages from those who
may not see them, so it listens on the loopback interface alone.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import sys
import warnings


async def _serve(host: str, port: int) -> None:
    from amqtt.broker import Broker
    from amqtt.contexts import BrokerConfig, ListenerConfig

    class OneConnectionEach(Broker):  # type: ignore[misc]  # amqtt is not typed
        """Ends the connection of a client whose id another one takes (MQTT 3.1.1, section 3.1.4); amqtt leaves it there, deaf."""

        async def _delete_session(self, client_id: str) -> None:
            _, former = self._sessions.get(client_id, (None, None))
            await super()._delete_session(client_id)
            if former is not None:
                await former.handle_connection_closed()

    plugins = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    config = BrokerConfig(listeners={"default": ListenerConfig(bind=f"{host}:{port}")}, plugins=plugins)
    await OneConnectionEach(config).start()
    await asyncio.Event().wait()


def main() -> None:
    host, port = sys.argv[1], int(sys.argv[2])
    if not ipaddress.ip_address(host).is_loopback:
        sys.exit(f"the embedded broker listens on the loopback interface only, not on {host}")
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    asyncio.run(_serve(host, port))


if __name__ == "__main__":
    main()
