"""Temperature and throttling, where the system tells: a hot board trains slower than a measurement of a minute says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

UNKNOWN = "not readable here"
# Of `vcgencmd get_throttled`, which the kernel of a Raspberry Pi has as a file too.
PI_FILE = Path("devices/platform/soc/soc:firmware/get_throttled")
PI_FLAGS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
PI_SINCE = 16  # these bits higher: has happened since the start


@dataclass(frozen=True)
class Condition:
    temperature_c: float | None  # of the hottest sensor
    frequency_mhz: float | None  # mean of the cores
    throttling: str | None
    load: float  # mean number of busy programs in the last minute

    @property
    def text(self) -> str:
        temperature = UNKNOWN if self.temperature_c is None else f"{self.temperature_c:.0f} C"
        frequency = UNKNOWN if self.frequency_mhz is None else f"{self.frequency_mhz:.0f} MHz"
        return f"temperature {temperature}, clock {frequency}, throttling {self.throttling or UNKNOWN}, load {self.load:.1f}"


def condition(sys: Path = Path("/sys")) -> Condition:
    return Condition(_temperature(), _frequency(), _throttling(sys), round(psutil.getloadavg()[0], 2))


def _temperature() -> float | None:
    read = getattr(psutil, "sensors_temperatures", None)
    found = [sensor.current for group in (read() if read else {}).values() for sensor in group if sensor.current]
    return max(found, default=None)


def _frequency() -> float | None:
    try:
        found = psutil.cpu_freq()
    except (AttributeError, OSError, NotImplementedError):
        return None
    return round(found.current, 1) if found and found.current else None


def _throttling(sys: Path) -> str | None:
    try:
        flags = int((sys / PI_FILE).read_text(), 16)
    except (OSError, ValueError):
        counts = [_count(file) for file in sys.glob("devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")]
        return f"{sum(counts)} times since the start" if counts else None
    said = [f"{words} {when}" for shift, when in ((0, "now"), (PI_SINCE, "since the start")) for words in _flags(flags >> shift)]
    return ", ".join(said) or "none"


def _flags(bits: int) -> list[str]:
    return [words for bit, words in PI_FLAGS.items() if bits >> bit & 1]


def _count(file: Path) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0
