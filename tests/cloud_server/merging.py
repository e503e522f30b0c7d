"""What the tests of aggregation share."""

from lwfed.cloud_server.aggregate import combine, screen
from lwfed.cloud_server.updates import Updates
from lwfed.config import AggregationSection

RULES = ("mean", "l_dawa", "median", "trimmed_mean", "krum", "multi_krum")
ROBUST = RULES[2:]


def settings_of(rule, **more):
    """With what the rule needs, where that is not stated."""
    needs = {"trimmed_mean": {"trim": 0.2}, "krum": {"byzantine": 1}, "multi_krum": {"byzantine": 1}}.get(rule, {})
    return AggregationSection(**{"trim": None, "byzantine": None, "clip_norm": None, "rule": rule, **needs, **more})


def merge_parts(settings, received, shares):
    """Part -> name -> tensor after the round."""
    updates = Updates(received, shares)
    return dict(combine(settings, screen(settings, updates), updates))


def screened(settings, received, shares):
    return screen(settings, Updates(received, shares))
