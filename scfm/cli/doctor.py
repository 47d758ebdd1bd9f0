"""`scfm doctor`."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Annotated, Any

from cyclopts import Parameter

from scfm.cli._files import tell
from scfm.cli._registry import command

HEAD_WIDTH = 64  # of the models that most people use
PACKAGES = ("single-cell-fm", "torch", "lightning", "anndata", "scanpy", "numpy", "scipy", "safetensors")


@command(example="scfm doctor")
def doctor(*, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Show versions, the device, and which code computes attention, and why.

    Parameters
    ----------
    json
        Print one JSON object instead of words.
    """
    facts = examine()
    tell(facts, as_json=json, text=describe(facts))


def examine() -> dict[str, Any]:
    """Collect everything that decides how scfm runs on this machine."""
    import torch

    from scfm import data, ops

    mps = torch.backends.mps.is_available()
    device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device,
        "devices": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "attention": ops.extension_info(),
        "attention_paths": _attention_paths(device),
        "encoder": data.encoder_info(),
    }


def _attention_paths(device: str) -> dict[str, dict[str, str]]:
    """For each dtype, the backend that attention takes at head width 64, and why."""
    import torch

    from scfm.ops.backend import explain_backend

    paths = {}
    for name in ("float32", "bfloat16", "float16"):
        query_THK = torch.empty(1, 1, HEAD_WIDTH, dtype=getattr(torch, name), device=device)
        backend, reason = explain_backend(query_THK)
        paths[name] = {"backend": backend, "reason": reason}
    return paths


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
        *((f"  {name}", f"{path['backend']}: {path['reason']}") for name, path in facts["attention_paths"].items()),
        ("encoder", f"{'compiled' if encoder['available'] else 'NumPy'} ({encoder['reason']})"),
    ]
    if not (attention["available"] and encoder["available"]):
        lines.append(
            ("advice", "everything works, but more slowly; install with a C++ compiler to get the compiled kernels")
        )
    return "\n".join(f"{name:<11} {value}" for name, value in lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
