"""What a figure depends on besides the code: device, driver, clocks, versions, date and revision."""

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

QUERY = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
PACKAGES = {
    "Liger": "liger-kernel",
    "QuACK": "quack-kernels",
    "CCE": "cut-cross-entropy",
    "flash-attn": "flash-attn",
    "triton": "triton",
}
UNKNOWN = "unknown"
NUMBERS = {"family": "cpu family", "model": "model", "stepping": "stepping"}


def facts(device: str) -> dict[str, str]:
    found = {
        **(_cuda() if device == "cuda" else _cpu()),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "revision": _revision(),
    }
    for name, package in PACKAGES.items() if device == "cuda" else ():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> dict[str, str]:
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else UNKNOWN
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        **_processor(),
        "instruction set": platform.machine() if capability == "DEFAULT" else capability,
        "cores": str(cores()),
        "load": load,
        "threads": str(torch.get_num_threads()),
    }


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Its name without trademarks, number of cores and clock; and the numbers that tell those of one name apart."""
    said = cpuinfo.read_text() if cpuinfo.exists() else ""
    entries = dict(re.findall(r"^(.+?)\s*: (.+)$", said.partition("\n\n")[0], re.MULTILINE))
    name = entries.get("model name") or platform.processor() or platform.machine() or UNKNOWN
    name = re.sub(r"\((R|TM|tm)\)|\b(CPU|Processor|\d+-Core)\b|@.*", "", name)
    numbers = {key: entries[field] for key, field in NUMBERS.items() if field in entries}
    return {"device": " ".join(name.split()), **numbers}


def _cuda() -> dict[str, str]:
    device = torch.cuda.get_device_properties(0)
    smi = _under_load()
    return {
        "device": device.name,
        "multiprocessors": str(device.multi_processor_count),
        "L2": f"{device.L2_cache_size >> 20} MiB",
        "driver": smi["driver_version"],
        "SM clock under load": f"{smi['clocks.sm']} MHz of {smi['clocks.max.sm']}",
        "memory clock under load": f"{smi['clocks.mem']} MHz of {smi['clocks.max.mem']}",
        "power limit": f"{smi['power.limit']} W",
        "CUDA": torch.version.cuda or UNKNOWN,
    }


def _under_load() -> dict[str, str]:
    """What nvidia-smi reports while copies run: an idle device clocks down."""
    source = torch.ones(1 << 28, device="cuda")
    copy = torch.empty_like(source)
    for _ in range(4000):  # 2 seconds of an H200
        copy.copy_(source)
    device = f"GPU-{getattr(torch.cuda.get_device_properties(0), 'uuid', '')}"
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    answer = _ask(command + ["-i", device]) or _ask(command)
    torch.cuda.synchronize()
    values = [value.strip() for value in answer.splitlines()[0].split(",")] if answer else []
    return dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else dict.fromkeys(QUERY, UNKNOWN)


def _revision() -> str:
    here = ["git", "-C", str(Path(__file__).parent)]
    revision = _ask([*here, "rev-parse", "--short=12", "HEAD"])
    changed = _ask([*here, "status", "--porcelain", "--untracked-files=no"])
    return (revision or UNKNOWN) + (" with changes" if changed else "")


def _ask(command: list[str]) -> str:
    """What the command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
