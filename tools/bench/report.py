"""What the rows of `lwfed bench` come to. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lwfed.console import counted

Record = Mapping[str, Any]
INTERRUPTED = "interrupted"
TITLE = 42  # columns
WORDS = {"peak_memory": "less peak memory", "time": "less time a step", "bytes": "fewer bytes a round", "flops": "fewer true FLOPs"}
MEMORY = {
    "peak": "peak_mb",
    "libraries": "baseline_mb",
    "training": "training_mb",
    "others": "others_mb",
    "swap": "swap_mb",
    "files": "files_mb",
}
REST = {"s/step": "step_s", "CPU s/step": "cpu_s", "s/epoch": "epoch_s", "GMAC/step": "gmacs", "MB/round": "bytes"}


def totals(stages: Sequence[Record]) -> dict[str, float]:
    """Of one row: the largest memory of its stages, since a device must fit them all; means of the rest."""
    largest = max(stages, key=lambda one: float(one["memory"]["peak_mb"]))["memory"]

    def mean(name: str) -> float:
        return sum(float(one[name]) for one in stages) / len(stages)

    return {
        **{name: largest[name] for name in ("peak_mb", "baseline_mb", "training_mb", "computing_mb", "others_mb", "swap_mb", "files_mb")},
        **{name: mean(name) for name in ("step_s", "cpu_s", "epoch_s", "gmacs", "bytes")},
    }


def factors(theirs: Record, ours: Record) -> dict[str, float]:
    """How many times less ours takes, of two totals."""
    return {
        "peak_memory": round(theirs["peak_mb"] / ours["peak_mb"], 2),
        "time": round(theirs["step_s"] / ours["step_s"], 2),
        "bytes": round(theirs["bytes"] / ours["bytes"], 2),
        "flops": round(theirs["gmacs"] / ours["gmacs"], 2),
        "memory_above_libraries": round(theirs["training_mb"] / ours["training_mb"], 2),
    }


def ratios(rows: Sequence[Record], baselines: Sequence[str]) -> dict[str, Any] | None:
    """Ours against the first of `baselines` that was measured, and against ours end to end; None where nothing can be compared."""
    complete = {row["name"]: row["stages"] for row in rows if row["stages"] and not row["reason"]}
    against = next((name for name in baselines if name in complete), None)
    if against is None or "ours" not in complete:
        return None
    ours = complete["ours"]
    found = {"against": against, "stages": len(ours), **factors(totals(complete[against]), totals(ours))}
    found["last_stage"] = factors(totals(complete[against]), totals(ours[-1:]))
    for name, title in (("ours_torch", "torch"), ("ours_reused", "reused")):
        if name in complete:
            found[title] = factors(totals(complete[against]), totals(complete[name]))
    if "published_kernels" in complete:
        found["same_products"] = factors(totals(complete["published_kernels"]), totals(ours))
    if "ours_end_to_end" in complete:
        found["same_chunking"] = factors(totals(complete["ours_end_to_end"]), totals(ours))
    return found


def lines(report: Record) -> Iterator[str]:
    """For a terminal: ratios first."""
    yield report["title"]
    if report["interrupted"]:
        yield "Interrupted: what had been measured until then."
    yield ""
    yield from _ratio_lines(report)
    views = report["views"]
    yield f"Making a view takes {views['ours_us']:.0f} us in blocks, {views['published_us']:.0f} us image by image: {views['ratio']:.1f}x."
    yield ""
    yield from _header()
    for row in report["rows"]:
        if row["stages"] and row["reason"] in ("", INTERRUPTED):
            yield _line(row["title"], totals(row["stages"]), len(row["stages"]))
            if row["reason"]:
                yield f"  interrupted after its stage {row['stages'][-1]['stage']}"
            if len(row["stages"]) > 1:
                yield _line(f"  its stage {row['stages'][-1]['stage']}", totals(row["stages"][-1:]), 1)
            yield from _planned(row["stages"][-1])
        else:
            yield f"{row['title']:{TITLE}}  left out: {row['reason']}"
    yield ""
    yield f"Before: {report['before']}."
    yield f"After:  {report['after']}."
    yield from report["notes"]


def _ratio_lines(report: Record) -> Iterator[str]:
    found = report["ratios"]
    if found is None:
        yield "No ratios: ours, or everything to compare it with, could not be measured here; the reasons are below."
        yield ""
        return
    titles = {row["name"]: row["title"] for row in report["rows"]}
    several = found["stages"] > 1
    yield f"ours, against {titles[found['against']]}" + (f", over {found['stages']} stages (the last one)" if several else "")
    for name, words in WORDS.items():
        yield f"{found[name]:8.2f}x  {words}" + (f"  ({found['last_stage'][name]:.2f}x)" if several else "")
    yield f"{found['memory_above_libraries']:8.2f}x  less memory beside libraries"
    if "torch" in found:
        yield f"{found['torch']['time']:8.2f}x  less time a step with frozen layers in torch, without ONNX Runtime"
    if "reused" in found:
        yield f"{found['reused']['time']:8.2f}x  less time a step with one pair of views of each image for the whole run"
    if "same_products" in found:
        yield f"{found['same_products']['time']:8.2f}x  less time a step where the baseline has our matrix products"
    if "same_chunking" in found:
        same = found["same_chunking"]
        yield (
            f"Against end to end with the same chunking, which is what training layer by layer gains by itself: {same['peak_memory']:.2f}x "
            f"memory, {same['time']:.2f}x time, {same['bytes']:.2f}x bytes."
        )
    yield ""


def _header() -> Iterator[str]:
    yield f"{'':{TITLE}}{'MB of memory':>{sum(len(name) + 2 for name in MEMORY)}}"
    yield f"{'':{TITLE}}" + "".join(f"{name:>{len(name) + 2}}" for name in (*MEMORY, *REST))


def _planned(stage: Record) -> Iterator[str]:
    """How the agent chose to run frozen layers, and why."""
    if (planned := stage.get("planned")) and stage["stage"] > 1:
        how = f"{planned['prefix']}, {counted(planned['micro_batch'], 'image')} at a time"
        yield f"  stage {stage['stage']}: frozen layers by {how} ({planned['reason']})"


def _line(title: str, row: Mapping[str, float], stages: int) -> str:
    title = f"{title} ({stages} stages)" if stages > 1 else title
    memory = "".join(f"{row[key]:{len(name) + 2}.0f}" for name, key in MEMORY.items())
    scaled = {**row, "bytes": row["bytes"] / 1e6}
    rest = (f"{scaled[key]:{len(name) + 2}.{1 if scaled[key] < 100 else 0}f}" for name, key in REST.items())
    return f"{title:{TITLE}}{memory}{''.join(rest)}"
