"""Where images come from: folders and data sets known by name. Importing this package imports neither numpy nor Pillow."""

from lwfed.data.source import Source, open_source

__all__ = ["Source", "open_source"]
