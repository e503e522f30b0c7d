from lwfed.config.load import load_config, presets
from lwfed.config.schema import AggregationSection, DataSection, ModelSection, RunConfig, SslSection, TransferSection, ViewsSection

__all__ = [
    "AggregationSection",
    "DataSection",
    "ModelSection",
    "RunConfig",
    "SslSection",
    "TransferSection",
    "ViewsSection",
    "load_config",
    "presets",
]
