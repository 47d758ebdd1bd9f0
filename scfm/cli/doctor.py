"""`scfm doctor`."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Annotated, Any

from cyclopts import Parameter

from scfm.cli._files import tell

PACKAGES = ("single-cell-fm", "torch", "lightning", "anndata", "scanpy", "numpy", "scipy", "safetensors")


def doctor(*, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Show versions, the device, and which compiled kernels are active, and why.

    Parameters
    ----------
    json
        Print one JSON object instead of words.
    """
    facts = examine()
    tell(facts, as_json=json, text=describe(facts))


def examine() -> dict[str, Any]:
    """Look at everything that decides how scfm runs here."""
    import torch

    from scfm import data, ops

    mps = torch.backends.mps.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu",
        "devices": [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "attention": ops.extension_info(),
        "encoder": data.host_info(),
    }


def describe(facts: dict[str, Any]) -> str:
    attention, encoder = facts["attention"], facts["encoder"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    devices = f" ({', '.join(facts['devices'])})" if facts["devices"] else ""
    kernel = f"compiled, {attention['isa']}" if attention["available"] else "plain torch"
    lines = [
        ("python", f"{facts['python']} on {facts['platform']}"),
        ("packages", packages),
        ("device", f"{facts['device']}{devices}, {facts['threads']} CPU threads"),
        ("attention", f"{kernel} ({attention['reason']}; backends: {', '.join(attention['backends'])})"),
        ("encoder", f"{'compiled' if encoder['available'] else 'NumPy'} ({encoder['reason']})"),
    ]
    if not (attention["available"] and encoder["available"]):
        lines.append(("advice", "everything works, more slowly; install with a C++ compiler to have the kernels"))
    return "\n".join(f"{name:<10} {value}" for name, value in lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
