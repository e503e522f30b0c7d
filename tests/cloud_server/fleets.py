"""What the tests of a server in a fleet share."""

from lwfed.wire.messages import Hello, Start


def start(boot, process=None):
    """That of the agent's process of this number."""
    return Start(boot=boot, nonce=f"{boot if process is None else process:016x}")


HELLO = Hello(start=start(1), lwfed="0", python="3", torch=None, machine="aarch64", cores=4, memory_mb=900, images=100, source="folder")


def undisturbed(world, *settings, collapses=None):
    fleet = world(*settings)
    fleet.collapses = collapses
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name)
    return fleet


def of(said, event, **fields):
    return [one for one in said if one["event"] == event and all(one.get(key) == value for key, value in fields.items())]


def counted(fleet):
    """Device -> code -> how often, as it is stored."""
    fleet.server._reception.sum_up()
    return {device.id: dict(device.complaints) for device in fleet.course.store.devices()}
