"""The closing table: what pytest-benchmark's own has no columns for."""

from collections.abc import Collection, Iterator

from measure import Result

HEADER = ("", "median", "GB/s", "peak MB", "x eager", "x compile")


def lines(results: Collection[Result]) -> Iterator[str]:
    yield _line(HEADER)
    for result in results:
        goals = ", ".join(f"{goal} {verdict}" for goal, verdict in result.goals().items())
        heading = f"{result.case.name} ({_number(result.traffic / 1e6)} MB)"
        if goals:
            heading += f"  goals: {goals}"
        yield heading if result.times.quiet else f"{heading}  BUSY"
        for provider in result.peak:
            yield _line(
                (
                    f"  {provider}",
                    _duration(result.times.seconds(provider)),
                    _number(result.bandwidth(provider) / 1e9),
                    _number(result.peak[provider] / 1e6),
                    _ratio(result.speedup(provider, "eager")),
                    _ratio(result.speedup(provider, "compile")),
                )
            )
    if not all(result.times.quiet for result in results):
        yield "BUSY: other processes held a core throughout; the times mean little. Try again, or with fewer --threads."
    yield "MB beside a case: its minimum traffic. peak MB: allocated beyond the input and the target."


def _line(cells: tuple[str, ...]) -> str:
    first, *rest = cells
    return f"{first:<12}" + "".join(f"{cell:>12}" for cell in rest)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
