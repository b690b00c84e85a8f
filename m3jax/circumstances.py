"""When, on what and with which versions a measurement was taken, for the head of its JSON file."""

import datetime
import importlib.metadata

import jax

_PACKAGES = ("jax", "jaxlib", "jax-triton", "triton")


def circumstances(commit: str | None) -> dict[str, object]:
    """Date, commit (if known), device and versions; of packages that are installed."""
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "device": jax.devices()[0].device_kind,
        **{name: importlib.metadata.version(name) for name in _PACKAGES if name in installed},
    }
