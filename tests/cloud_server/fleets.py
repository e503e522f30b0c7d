"""What the tests of a server in a fleet share."""


def undisturbed(world, *settings, collapses=None):
    fleet = world(*settings)
    fleet.collapses = collapses
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name)
    return fleet


def of(said, event, **fields):
    return [one for one in said if one["event"] == event and all(one.get(key) == value for key, value in fields.items())]
